"""The hall: ties the rooms together into the main job."""

from pipeline.errors import EXIT_CODES
from pipeline.exporting import run_export
from pipeline.main import run_job
from pipeline.run import Run

__all__ = ["EXIT_CODES", "Run", "run_export", "run_job"]
