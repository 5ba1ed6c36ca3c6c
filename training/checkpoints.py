"""Saved states of a training: the last two, each with a checksum.

A state is written whole or not at all (core/files.py). Its file is named by a number that grows and by a checksum of
its content, `000012-9f86d081884c7d65.pt`, so that a damaged one is recognised and the one before it is taken.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from core.errors import StateError
from core.files import hash_file, rename, written_atomically

NUM_KEPT = 2
_DIGITS = 16  # of the checksum in a name
_log = logging.getLogger(__name__)


class Checkpoints:
    """A folder of saved states.

    Args:
        folder: made with the first state.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, content: Mapping[str, Any]) -> Path:
        """Write a state of tensors and plain data, and remove all but the last two.

        Raises:
            WriteError: it cannot be written; the earlier states are as they were.
        """
        earlier = self._newest_first()
        number = 1 + (int(earlier[0].name.split("-")[0]) if earlier else 0)
        complete = self.folder / "unnamed.pt"
        with written_atomically(complete) as (part,):
            torch.save(dict(content), part)
        path = self.folder / f"{number:06d}-{hash_file(complete)[:_DIGITS]}.pt"
        rename(complete, path)
        for old in earlier[NUM_KEPT - 1 :]:
            old.unlink(missing_ok=True)
        return path

    def load(self, device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """The newest state that is whole; None where none was ever saved. A damaged one is named in the log.

        Raises:
            StateError: states are there, and all of them are damaged.
        """
        paths = self._newest_first()
        for path in paths:
            found = _read(path, device)
            if found is not None:
                return found
            _log.warning("%s is damaged: the state before it is taken", path)
        if paths:
            raise StateError(
                f"all saved states in {self.folder} are damaged ({', '.join(path.name for path in paths)}): check the "
                "disk, and remove this folder to run the stage from its beginning"
            )
        return None

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*-*.pt"), reverse=True)


def _read(path: Path, device: torch.device | str) -> dict[str, Any] | None:
    """A state, None where the file is damaged."""
    try:
        if path.stem.split("-")[-1] != hash_file(path)[:_DIGITS]:
            return None
        content = torch.load(path, map_location=device, weights_only=True)
    except (OSError, EOFError, ValueError, RuntimeError, pickle.UnpicklingError):
        return None
    return content if isinstance(content, dict) else None
