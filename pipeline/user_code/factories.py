"""The `factory` settings: Python code of the user's, named as `path/to/file.py:function` or `package.module:function`.

These are the only settings that run code. They count where the user wrote them: `configs.trust` refuses those of run
directories and of `--config-dir` files. And they load code of the working folder (or Octet's examples) only, so that no
setting can call a function of Python's library or of an installed package. A file is looked for from the working
directory. A module is looked for where Python looks anyway, and last in the working directory, so it never replaces a
module of Octet or of an installed package. Worker processes and `export.py` look the same way.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from core.errors import ConfigError, OctetError
from core.names import closest
from pipeline.user_code.files import import_file

EXAMPLES = (
    Path(__file__).resolve().parents[2] / "examples"
)  # Octet's own, where it is not installed as a package


def load_factory(setting: str, reference: str) -> Callable[..., Any]:
    """Import the function that a setting names.

    Args:
        setting: the setting's key, for messages: `model.factory`.
        reference: `path/to/file.py:function`, or `package.module:function`.

    Raises:
        ConfigError: no such file, module or function, one outside the working folder, or the file fails while it is
            imported.
    """
    source, _, name = reference.rpartition(":")
    directory = str(Path.cwd())
    if directory not in sys.path:
        sys.path.append(directory)
    if source.endswith(".py") and not Path(source).is_file():
        raise ConfigError(
            f"{setting}={reference}: there is no file {source} in {directory}; give its path from where the command is "
            "typed, or in full"
        )
    try:
        if source.endswith(".py"):
            _refuse_outside(setting, reference, Path(source))
            module = import_file(Path(source))
        else:
            for place in _places(source):
                _refuse_outside(setting, reference, place)
            module = importlib.import_module(source)
    except OctetError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not f"{source}.".startswith(f"{error.name}."):
            raise _broken(setting, reference, "importing it", error) from error
        remedy = _file_hint(reference) or "run the command in the folder of the module, or install it"
        raise ConfigError(
            f"{setting}={reference}: there is no module {error.name!r} in {directory}, next to the entry or among the "
            f"installed packages; {remedy}"
        ) from error
    except Exception as error:
        raise _broken(setting, reference, "importing it", error) from error
    found = vars(module).get(name)
    if found is None:
        near = closest(name, [key for key in vars(module) if not key.startswith("_")])
        hint = _file_hint(reference, module) or (f"closest: {near}" if near else "")
        raise ConfigError(
            f"{setting}={reference}: {module.__file__} has no {name!r}" + (f"; {hint}" if hint else "")
        )
    if not callable(found):
        raise ConfigError(
            f"{setting}={reference}: {name} is a {type(found).__name__}, expected a function that can be called"
        )
    return found


def call_user(setting: str, reference: str, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call code of the user's; what goes wrong in it becomes one message with the line.

    Errors that already say what is wrong with input (`ConfigError`, `DataError`, ...) pass through.

    Args:
        setting: as for `load_factory`.
        reference: as for `load_factory`.
        what: what is being called, for the message: "its loss".
        function: the code.
        arguments: what it is given.

    Raises:
        ConfigError: the function raises anything else.
    """
    try:
        return function(*arguments)
    except OctetError:
        raise
    except Exception as error:
        raise _broken(setting, reference, what, error) from error


def _places(source: str) -> Iterator[Path | None]:
    """Files of a module and of the packages around it, outermost first, each before it is run; None for built-in ones.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    parts = source.split(".")
    for length in range(1, len(parts) + 1):
        name = ".".join(parts[:length])
        loaded = sys.modules.get(name)
        spec: ModuleSpec | None = getattr(loaded, "__spec__", None) or importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if spec.origin is None and spec.submodule_search_locations is not None:
            continue  # a folder without code of its own
        yield Path(spec.origin) if spec.has_location and spec.origin is not None else None
        importlib.import_module(name)  # where its parts lie is for the package to say


def _refuse_outside(setting: str, reference: str, place: Path | None) -> None:
    """Refuse code that is not below the working directory."""
    roots = (Path.cwd().resolve(), EXAMPLES)
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")}
    found = None if place is None else place.resolve()
    is_own = (
        found is not None
        and any(found.is_relative_to(root) for root in roots)
        and not any(found.is_relative_to(folder) for folder in installed)  # an environment may lie in a root
    )
    if not is_own:
        remedy = _file_hint(reference) or "run the command in the folder of your code, or copy the code here"
        raise ConfigError(
            f"{setting}={reference}: {place or 'a built-in module'} is not below the working directory {roots[0]}; "
            f"{remedy}"
        )


def _file_hint(reference: str, module: ModuleType | None = None) -> str:
    """How to name the file that a module of another package hides, or "" where there is no such file."""
    source, _, name = reference.rpartition(":")
    path = Path(*source.split(".")).with_suffix(".py")
    if source.endswith(".py") or not path.is_file():
        return ""
    if module is not None and module.__file__ is not None and path.samefile(module.__file__):
        return ""
    return f"a package of that name has priority, so give the file: write {path.as_posix()}:{name}"


def _broken(setting: str, reference: str, what: str, error: Exception) -> ConfigError:
    """Name the line: the last one in the user's file where there is one, else the last of all."""
    source = reference.rpartition(":")[0]
    path = (
        str(Path(source).resolve())
        if source.endswith(".py")
        else getattr(sys.modules.get(source), "__file__", None)
    )
    frames = traceback.extract_tb(error.__traceback__)
    frame = ([frame for frame in frames if frame.filename == path] or list(frames))[-1]
    place = f"{error.filename}:{error.lineno}" if isinstance(error, SyntaxError) else ""
    return ConfigError(
        f"{setting}={reference}: {what} failed at {place or f'{frame.filename}:{frame.lineno}'}: "
        f"{type(error).__name__}: {error}"
    )
