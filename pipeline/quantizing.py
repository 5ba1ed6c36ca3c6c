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
    measure_sharing,
    place,
)

PLAN = "placement.yaml"
COMPARED_IMAGES = 16  # for the outputs that decide about shared scales


def float_stage(job: Job) -> None:
    """Measure the float detector; the row `float`."""
    metrics = job.measure(job.predictor(job.detector.network), "float")
    job.record_row(
        "float", metrics, architecture=job.detector.architecture, activation=job.detector.activation
    )


def place_stage(job: Job) -> None:
    """Decide the plan, print it as a tree and save it; the stage `calibrate` then takes it, edited or not."""
    print(save_placement(job).describe())
    say(
        f"plan: {job.run.path(PLAN)}; edit it there and resume, or pass it to another run with quant.plan=FILE"
    )


def calibrate_stage(job: Job) -> None:
    """Insert the quantizers, choose every scale, measure the row `ptq`."""
    config = job.config.quant
    placement = load_placement(job.run.path(PLAN)) if job.run.is_done("place") else save_placement(job)
    say(
        f"placement: {len(placement.weights)} layers and {sum(len(g.tensors) for g in placement.groups)} tensors in "
        f"{len(placement.groups)} groups quantized, {len(placement.kept_float)} layers float"
    )
    model = insert(job.detector.network, placement, job.config.qat.learn_scales).to(job.device).eval()
    result = calibrate(
        model, job.calibration_images(), config.observer, weight_method(job), config.percentile
    )
    job.run.write_json("calibration.json", result.as_dict())
    job.save_quantized(model, "ptq.safetensors")
    job.record_row("ptq", job.measure(job.predictor(model), "ptq"), observer=config.observer)


def weight_method(job: Job) -> str:
    """How weight scales are chosen: the range for observer=minmax, else the least squared error."""
    return "minmax" if job.config.quant.observer == "minmax" else "mse"


def save_placement(job: Job) -> Placement:
    """Make this job's plan and keep it."""
    placement = make_placement(job)
    job.run.write_text(PLAN, dump_placement(placement))
    return placement


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
    if config.share_concat_scales == "measured":
        return _measured_placement(job, options, tuple(rules))
    return place(job.detector.network, options, tuple(rules))


def _measured_placement(job: Job, options: PlacementOptions, rules: tuple[Rule, ...]) -> Placement:
    """The plan in which only those concats share a scale where that costs no accuracy; `sharing.json` says why."""
    config = job.config.quant
    result = measure_sharing(
        job.detector.network,
        options,
        rules,
        job.calibration_images(),
        job.few_calibration_images(COMPARED_IMAGES),
        config.observer,
        weight_method(job),
        config.percentile,
        config.share_tolerance,
    )
    job.run.write_json("sharing.json", result.as_dict())
    for decision in result.decisions:
        verdict = "one scale" if decision.shared else "split"
        say(
            f"concat {decision.concat}: {verdict}; output error {decision.error_shared:.4g} shared, "
            f"{decision.error_split:.4g} split ({decision.cost:+.1%})"
        )
    split = [decision.concat for decision in result.decisions if not decision.shared]
    say(
        f"{len(split)} of {len(result.decisions)} concats split (tolerance {result.tolerance:.1%}): output error "
        f"{result.error_all_shared:.4g} -> {result.error_decided:.4g}"
    )
    return result.placement
