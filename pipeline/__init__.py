"""The main job: ties the packages together.

Waiting OpenMP threads sleep instead of spinning: with data workers or any other busy process, a spinning
torch was measured six to nine times slower on two cores (benchmarks/torch_waiting.py). The variable must be set
before torch is imported, so it is set here; a value that the user sets wins.

The public names are imported when they are first used, so that small commands start without torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from pipeline.exporting import run_export
    from pipeline.main import run_job
    from pipeline.run.directory import Run
    from pipeline.run.terminal import report_sweep
    from pipeline.user_code.network import CustomDetector

__all__ = ["CustomDetector", "Run", "report_sweep", "run_export", "run_job"]
MODULES = {
    "CustomDetector": "pipeline.user_code.network",
    "Run": "pipeline.run.directory",
    "report_sweep": "pipeline.run.terminal",
    "run_export": "pipeline.exporting",
    "run_job": "pipeline.main",
}


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return getattr(import_module(MODULES[name]), name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
