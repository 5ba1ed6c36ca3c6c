"""Stages before fine-tuning: the float row, placement and calibration."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, fx, nn

from core.errors import ConfigError
from pipeline.job import Job
from pipeline.run.progress import say
from quant import (
    Placement,
    PlacementOptions,
    Rule,
    calibrate,
    dump_placement,
    equalize,
    insert,
    load_placement,
    measure_sharing,
    place,
    reconstruct,
)

PLAN = "placement.yaml"
REPAIR_IMAGES = 32  # for rounding and bias correction
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
    """Insert the quantizers, choose every scale, measure the row `ptq`; all processes of a team work on the scales."""
    config = job.config.quant
    if job.team.first and not job.run.is_done("place"):
        save_placement(job)
    job.team.wait()
    placement = load_placement(job.run.path(PLAN))
    say(
        f"placement: {len(placement.weights)} layers and {sum(len(g.tensors) for g in placement.groups)} tensors in "
        f"{len(placement.groups)} groups quantized, {len(placement.kept_float)} layers float"
    )
    network = prepared_network(job)
    model = insert(network, placement, job.config.qat.learn_scales).to(job.device).eval()
    images, ranges = job.calibration_images(job.team), imported_ranges(job)
    result = calibrate(
        model, images, config.observer, weight_method(job), config.percentile, job.team.gather, ranges
    )
    if not job.team.first:
        return
    for line in result.imported.describe() if result.imported is not None else ():
        say(line)
    if result.convergence is not None:
        say(f"calibration: {result.convergence.sentence()}")
    if config.adaround or config.bias_correction:
        _repair(job, model)
    job.run.write_json("calibration.json", result.as_dict())
    job.save_quantized(model, "ptq.safetensors")
    imported = {"imported_groups": len(result.imported.groups)} if result.imported is not None else {}
    job.record_row("ptq", job.measure(job.predictor(model), "ptq"), observer=config.observer, **imported)


def imported_ranges(job: Job) -> dict[str, Tensor]:
    """Ranges that the float weights brought along from a quantized checkpoint, where the settings want them.

    Raises:
        ConfigError: equalisation would move the ranges.
    """
    ranges = job.detector.amax
    if ranges and job.config.quant.imported_ranges == "ignore":
        say(f"imported ranges: {len(ranges)} ignored (quant.imported_ranges=ignore)")
        return {}
    if ranges and job.config.quant.equalize:
        raise ConfigError(
            f"quant.equalize=true moves ranges between channels, and the weights bring {len(ranges)} ranges of their "
            "own: add quant.imported_ranges=ignore, or leave equalisation out"
        )
    return ranges


def prepared_network(job: Job) -> nn.Module:
    """The float network that is quantized: the run's, or its equalised copy."""
    if not job.config.quant.equalize:
        return job.detector.network
    result = equalize(job.detector.network)
    say(
        f"equalised {len(result.pairs)} pairs of layers; {len(result.left_alone)} left alone, since the activation "
        "between them is not homogeneous"
    )
    return result.network


def _repair(job: Job, model: fx.GraphModule) -> None:
    """Rounding and bias correction by the layers' outputs; `repairs.json` has the figures of every layer."""
    config = job.config.quant
    images = torch.cat(job.few_calibration_images(REPAIR_IMAGES))
    repairs = reconstruct(model, images, config.adaround, config.bias_correction)
    job.run.write_json(
        "repairs.json", {"images": len(images), "layers": [asdict(repair) for repair in repairs]}
    )
    rounded = [
        repair.error_rounded / repair.error_nearest
        for repair in repairs
        if repair.error_nearest and repair.error_rounded is not None
    ]
    if rounded:
        say(
            f"adaround: {len(rounded)} layers; output error {median(rounded):.2f} of rounding to nearest (median)"
        )
    shifts = [repair.shift for repair in repairs if repair.shift is not None]
    if shifts:
        say(f"bias correction: {len(shifts)} layers; largest mean shift taken out {max(shifts):.3g}")


def weight_method(job: Job) -> str:
    """How weight scales are chosen: the range for observer=minmax, else the least squared error."""
    return "minmax" if job.config.quant.observer == "minmax" else "mse"


def save_placement(job: Job) -> Placement:
    """Make this job's plan and keep it."""
    placement = make_placement(job)
    job.run.write_text(PLAN, dump_placement(placement))
    hint_at_unsigned(job, placement)
    return placement


def hint_at_unsigned(job: Job, placement: Placement) -> None:
    """Say where a CPU engine could use a finer grid than the plan has: groups behind a ReLU, say."""
    deploy = job.config.deploy
    config = job.config.quant
    if config.activations.unsigned or config.plan is not None:
        return
    if deploy.target.startswith("trt") or "tensorrt" in deploy.runtimes:
        return
    finer = place(job.detector.network, PlacementOptions(unsigned=True))
    signs = {site.node: group.signed for group in finer.groups for site in group.tensors}
    never_negative = sum(
        group.signed and not any(signs.get(site.node, True) for site in group.tensors)
        for group in placement.groups
    )
    if never_negative > len(placement.groups) // 2:
        say(
            f"{never_negative} of {len(placement.groups)} groups are never negative: "
            "quant.activations.unsigned=true halves their step on CPU engines"
        )


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
        unsigned=config.activations.unsigned,
        share_concat_scales=config.share_concat_scales != "none",
    )
    if config.share_concat_scales == "measured":
        return _measured_placement(job, options, tuple(rules))
    return place(job.detector.network, options, tuple(rules))


def _measured_placement(job: Job, options: PlacementOptions, rules: tuple[Rule, ...]) -> Placement:
    """The plan in which only those concats share a scale where that costs no accuracy; `sharing.json` says why."""
    config = job.config.quant
    result = measure_sharing(
        prepared_network(job),
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
