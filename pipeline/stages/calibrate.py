"""The stage `calibrate`: quantizers inserted by the placement, every scale chosen, the row `ptq`."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median

import torch
from torch import fx

from core.rows import PTQ
from pipeline.job import Job
from pipeline.networks import QUANTIZED, SWAPPED
from pipeline.run.progress import say
from pipeline.splits import TRAIN, VAL
from pipeline.stages.calibration import calibrated, calibration_images
from pipeline.stages.load import FLOAT_FILES, MEASURED_BY
from pipeline.stages.place import PLACEMENT
from pipeline.stages.recalibration import recalibrate, recalibration_file
from pipeline.stages.stage import Stage
from quant import CalibrationResult, load_placement, reconstruct

CALIBRATION, REPAIRS = "calibration.json", "repairs.json"
REPAIR_IMAGES = 32  # for rounding and bias correction


def calibrate_stage(job: Job) -> None:
    """Insert the quantizers, choose every scale, measure the row `ptq`.

    The processes of a team share the images of calibration and of the measurement; the first makes repairs.
    """
    config = job.config.quant
    placement = load_placement(job.run.need(PLACEMENT, "place"))
    say(
        f"placement: {len(placement.weights)} layers and {sum(len(g.tensors) for g in placement.groups)} tensors in "
        f"{len(placement.groups)} groups quantized, {len(placement.kept_float)} layers float"
    )
    model, result = calibrated(job, placement)
    if job.stage_team.first:
        _finish(job, model, result)
    model = job.keep(model, placement, PTQ)
    imported = {"imported_groups": len(result.imported.groups)} if result.imported is not None else {}
    measured = job.measure(PTQ, job.predictor(model))
    job.record(PTQ, measured, observer=config.observer, **imported)


def _finish(job: Job, model: fx.GraphModule, result: CalibrationResult) -> None:
    """Say and keep what calibration found, and repair what its settings want."""
    config = job.config.quant
    for line in result.imported.describe() if result.imported is not None else ():
        say(line)
    if result.convergence is not None:
        say(f"calibration: {result.convergence.sentence()}")
    if config.greedy_rounding or config.bias_correction:
        _repair(job, model)
    recalibrate(job, model, PTQ)
    job.run.write_json(CALIBRATION, result.as_dict())


def _repair(job: Job, model: fx.GraphModule) -> None:
    """Rounding and bias correction by the layers' outputs; `repairs.json` has the figures of every layer."""
    config = job.config.quant
    images = torch.cat(list(calibration_images(job, REPAIR_IMAGES)))
    repairs = reconstruct(model, images, config.greedy_rounding, config.bias_correction)
    job.run.write_json(REPAIRS, {"images": len(images), "layers": [asdict(repair) for repair in repairs]})
    rounded = [
        repair.error_rounded / repair.error_nearest
        for repair in repairs
        if repair.error_nearest and repair.error_rounded is not None
    ]
    if rounded:
        say(f"greedy rounding: {len(rounded)} layers; output error {median(rounded):.2f} of nearest (median)")
    shifts = [repair.shift for repair in repairs if repair.shift is not None]
    if shifts:
        say(f"bias correction: {len(shifts)} layers; largest mean shift corrected {max(shifts):.3g}")


CALIBRATE = Stage(
    "calibrate",
    calibrate_stage,
    settings=("quant", "data.limit_train", *MEASURED_BY),
    ignored=("quant.placement", "quant.policy", "quant.float_patterns", "quant.accuracy_budget"),
    splits=(TRAIN, VAL),
    reads=(*FLOAT_FILES, SWAPPED, PLACEMENT),
    writes=(QUANTIZED[PTQ], CALIBRATION, REPAIRS, recalibration_file(PTQ), PTQ.path),
    is_shared=True,
)
