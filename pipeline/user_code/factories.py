"""The `factory` settings: Python code of the user's, named as `package.module:function`.

These are the only settings that run code. The module is looked for where Python looks anyway (beside the entry, among
the installed packages) and last in the working directory, so a file beside where you type the command is found,
and never replaces a module of Octet or of an installed package. Worker processes and `export.py` look the same way.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from core.errors import ConfigError, OctetError
from core.names import closest


def load_factory(setting: str, reference: str) -> Callable[..., Any]:
    """Import the function that a setting names.

    Args:
        setting: the setting's key, for messages: `model.factory`.
        reference: `package.module:function`.

    Raises:
        ConfigError: no such module or function, or the module fails while it is imported.
    """
    module_name, _, name = reference.partition(":")
    directory = str(Path.cwd())
    if directory not in sys.path:
        sys.path.append(directory)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _broken(setting, reference, "importing it", error) from error
        raise ConfigError(
            f"{setting}={reference}: there is no module {error.name!r} in {directory}, beside the entry or among the "
            "installed packages; run the command where the module lies, or install it"
        ) from error
    except Exception as error:
        raise _broken(setting, reference, "importing it", error) from error
    found = vars(module).get(name)
    if found is None:
        near = closest(name, [key for key in vars(module) if not key.startswith("_")])
        hint = f"; closest: {near}" if near else ""
        raise ConfigError(f"{setting}={reference}: {_file(module)} has no {name!r}{hint}")
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


def _broken(setting: str, reference: str, what: str, error: Exception) -> ConfigError:
    """Name the line: the last one in the user's module where there is one, else the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    module = sys.modules.get(reference.partition(":")[0])
    own = [frame for frame in frames if module is not None and frame.filename == _file(module)]
    frame = (own or list(frames))[-1]
    place = f"{error.filename}:{error.lineno}" if isinstance(error, SyntaxError) else ""
    return ConfigError(
        f"{setting}={reference}: {what} failed at {place or f'{frame.filename}:{frame.lineno}'}: "
        f"{type(error).__name__}: {error}"
    )


def _file(module: ModuleType) -> str:
    return str(module.__file__)
