"""The steps that load the float model: `load` keeps it in the run directory, `float` measures it."""

from __future__ import annotations

from core.rows import FLOAT
from pipeline.job import Job
from pipeline.layout import keep_inference_layout
from pipeline.networks import FLOAT_MODEL, INFERENCE_LAYOUT
from pipeline.splits import VAL
from pipeline.stages.stage import Stage

FLOAT_FILES = (FLOAT_MODEL, f"{FLOAT_MODEL}.json", INFERENCE_LAYOUT)


def load_stage(job: Job) -> None:
    """Read the weights, fold them, and keep them as the run's float model, with the layout to evaluate it in."""
    job.networks.keep(job.networks.initial())
    keep_inference_layout(job)


def float_stage(job: Job) -> None:
    """Measure the float detector; the row `float`."""
    detector = job.networks.detector
    measured = job.measure(FLOAT, job.predictor(detector.network))
    job.record(FLOAT, measured, architecture=detector.architecture, activation=detector.activation)


LOAD = Stage(
    "load",
    load_stage,
    settings=("model", "data.merge_classes", "data.image_size", "evaluate.layout"),
    splits=(VAL,),
    files=("weights",),
    writes=FLOAT_FILES,
)
MEASURED_BY = ("data.image_size", "data.limit_val", "evaluate", "metric")  # what every figure depends on
MEASURE_FLOAT = Stage(
    "float",
    float_stage,
    settings=MEASURED_BY,
    splits=(VAL,),
    reads=FLOAT_FILES,
    writes=(FLOAT.path,),
    is_shared=True,
)
