"""Export passes per target, graph check, runtimes and benchmark, for any ONNX file.

`deploy.api` lists the public names; it is imported when one of them is first used, so that commands which need neither
torch nor a runtime, such as `python -m deploy.check`, start without them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploy.api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    api = import_module("deploy.api")
    if name in api.__all__:
        return getattr(api, name)
    raise AttributeError(f"module 'deploy' has no attribute {name!r}")
