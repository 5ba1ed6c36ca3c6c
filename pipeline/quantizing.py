"""Stages before fine-tuning: the float row, placement and calibration."""

from __future__ import annotations

from pathlib import Path

from pipeline.job import Job
from pipeline.progress import say
from quant import (
    Placement,
    PlacementOptions,
    Rule,
    calibrate,
    dump_placement,
    insert,
    load_placement,
    place,
)


def float_stage(job: Job) -> None:
    """Measure the float detector; the row `float`."""
    metrics = job.measure(job.predictor(job.detector.network), "float")
    job.record_row(
        "float", metrics, architecture=job.detector.architecture, activation=job.detector.activation
    )


def calibrate_stage(job: Job) -> None:
    """Place and insert the quantizers, choose every scale, measure the row `ptq`."""
    config = job.config.quant
    placement = make_placement(job)
    job.run.write_text("placement.yaml", dump_placement(placement))
    say(
        f"placement: {len(placement.weights)} layers and {sum(len(g.tensors) for g in placement.groups)} tensors in "
        f"{len(placement.groups)} groups quantized, {len(placement.kept_float)} layers float"
    )
    model = insert(job.detector.network, placement, job.config.qat.learn_scales).to(job.device).eval()
    weight_method = "minmax" if config.observer == "minmax" else "mse"
    result = calibrate(model, job.calibration_images(), config.observer, weight_method, config.percentile)
    job.run.write_json("calibration.json", result.as_dict())
    job.save_quantized(model, "ptq.safetensors")
    job.record_row("ptq", job.measure(job.predictor(model), "ptq"), observer=config.observer)


def make_placement(job: Job) -> Placement:
    """The plan for this job: a saved and edited one, or a fresh one by the policy."""
    config = job.config.quant
    if config.plan is not None:
        return load_placement(Path(config.plan))
    rules = [Rule(match=pattern, keep_float=True) for pattern in config.float_patterns]
    rules += [
        Rule(rule.match, rule.keep_float, rule.bits, rule.scale, rule.observer, rule.share)
        for rule in config.policy
    ]
    options = PlacementOptions(
        weight_bits=config.weights.bits,
        activation_bits=config.activations.bits,
        edge_bits=config.edge_bits,
        share_concat_scales=config.share_concat_scales != "none",
    )
    return place(job.detector.network, options, tuple(rules))
