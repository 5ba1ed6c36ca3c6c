"""Datasets, augmentation, loaders, the synthetic set, and COCO metrics.

`data.api` lists the public names; it is imported when one of them is first used, so that `python -m data` starts
without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from data.letterbox import letterbox  # at once: the module of the same name would be found in its place

if TYPE_CHECKING:
    from data.api import *  # noqa: F403

__all__ = ["letterbox"]


def __getattr__(name: str) -> Any:
    api = import_module("data.api")
    if name in api.__all__:
        return getattr(api, name)
    raise AttributeError(f"module 'data' has no attribute {name!r}")
