"""Float detectors: networks, decode, loss, and loading of checkpoints without running anything they name.

`models.api` lists the public names; it is imported when one of them is first used, so that `octet inspect --help`
starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    api = import_module("models.api")
    if name in api.__all__:
        return getattr(api, name)
    raise AttributeError(f"module 'models' has no attribute {name!r}")
