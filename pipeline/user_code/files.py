"""Modules of the user's that are named by file: `model.factory=models/mynet.py:build`.

The file is imported under a name that no package of ours or of anybody else has: this module's name, a dot and the
file's path. Whoever imports that name gets the file, so that objects of its classes can be pickled to the loader's
worker processes, freshly started ones included: there the import of this module comes first and brings the finder.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from urllib.parse import quote, unquote

__path__: list[str] = []  # what the import system asks of a module with submodules
_PREFIX = f"{__name__}."


def import_file(path: Path) -> ModuleType:
    """Import a Python file once; its own folder is searched last for what it imports.

    Args:
        path: an existing file.

    Raises:
        Exception: whatever the file raises.
    """
    path = path.resolve()
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    return importlib.import_module(_PREFIX + quote(str(path)).replace(".", "%2E"))


class _FileFinder:
    """Finds the file whose path is the last part of a module name of this kind."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a file, or None for names of another kind."""
        if not name.startswith(_PREFIX):
            return None
        return spec_from_file_location(name, unquote(name.removeprefix(_PREFIX)))


sys.meta_path.append(_FileFinder)
