"""The main job: ties the packages together.

Waiting OpenMP threads sleep instead of spinning: with data workers or any other busy process beside it, a spinning
torch was measured six to nine times slower on two cores (benchmarks/torch_waiting.py). The variable must be set
before torch is imported, which is why it stands here; a value that the user sets wins.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pipeline.exporting import run_export
from pipeline.main import run_job
from pipeline.run.directory import Run
from pipeline.run.terminal import report_sweep
from pipeline.user_code.network import CustomDetector

__all__ = ["CustomDetector", "Run", "report_sweep", "run_export", "run_job"]
