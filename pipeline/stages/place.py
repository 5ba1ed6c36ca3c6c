"""The stage `place`: which tensors get quantizers, and which of them share one scale."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from configs.quant_schema import QuantConfig
from configs.schema import Config
from core.choices import AUTO
from core.targets import TARGETS
from pipeline.job import Job
from pipeline.networks import SWAPPED
from pipeline.run.progress import say
from pipeline.splits import TRAIN, VAL
from pipeline.stages.activation import MEASURED, decide_activation, timed_where
from pipeline.stages.calibration import calibration_images, prepared_network, weight_method
from pipeline.stages.export import targets
from pipeline.stages.load import FLOAT_FILES, MEASURED_BY
from pipeline.stages.stage import Stage
from quant import (
    Placement,
    PlacementOptions,
    Rule,
    dump_placement,
    load_placement,
    measure_sharing,
    place,
)

PLACEMENT = "placement.yaml"
SHARING = "sharing.json"
COMPARED_IMAGES = 16  # for the outputs that decide about shared scales
AFTER_CALIBRATION = ("accuracy_budget", "greedy_rounding", "bias_correction", "recalibrate_scores")


def place_stage(job: Job) -> None:
    """Decide the placement and save it, to be read and edited; a summary is printed where the stage was asked for.

    With `quant.swap_activation=auto` the activation is decided before, see `decide_activation`.
    """
    if job.config.quant.swap_activation == AUTO:
        decide_activation(job, make_placement)
    placement = make_placement(job)
    text = dump_placement(placement)
    job.run.ledger.announce("place", {PLACEMENT: hashlib.sha256(text.encode()).hexdigest()})
    job.run.write_text(PLACEMENT, text)
    hint_at_unsigned(job, placement)
    if job.networks.swap is not None:
        say(
            f"SiLU is replaced by {job.networks.swap}: the row ptq is measured before the network is "
            "fine-tuned with it, the row qat afterwards"
        )
    if "place" in job.config.stages:
        print(placement.summarize())
        say(
            f"placement: {job.run.path(PLACEMENT)}; edit it there and resume, or pass it to another run with "
            f"quant.placement=FILE. As a tree: octet placement {job.run.directory}"
        )


def make_placement(job: Job) -> Placement:
    """The placement for this job: a saved and edited one, or a fresh one by the policy."""
    config = job.config.quant
    if config.placement is not None:
        return load_placement(Path(config.placement))
    if config.share_concat_scales == "measured":
        return _measured_placement(job, *options_and_rules(config))
    return placed_by_rules(config, job.networks.student)


def placed_by_rules(config: QuantConfig, network: nn.Module) -> Placement:
    """A fresh placement by the section `quant`; what it says of measured concats is left out.

    Raises:
        PolicyError: a rule matches nothing.
    """
    return place(network, *options_and_rules(config))


def options_and_rules(config: QuantConfig) -> tuple[PlacementOptions, tuple[Rule, ...]]:
    """The section `quant` as placement expects it."""
    rules = [Rule(match=pattern, keep_float=True) for pattern in config.float_patterns]
    rules += [
        Rule(rule.match, rule.keep_float, rule.bits, rule.scale, rule.observer, rule.share, rule.grid)
        for rule in config.policy
    ]
    options = PlacementOptions(
        weight_bits=config.weights.bits,
        activation_bits=config.activations.bits,
        edge_bits=config.edge_bits,
        unsigned=config.activations.unsigned,
        attention=config.attention,
        share_concat_scales=config.share_concat_scales != "none",
        grid=config.grid,
    )
    return options, tuple(rules)


def _measured_placement(job: Job, options: PlacementOptions, rules: tuple[Rule, ...]) -> Placement:
    """The placement in which only those concats share a scale where that costs no accuracy; `sharing.json` says why."""
    config = job.config.quant
    result = measure_sharing(
        prepared_network(job),
        options,
        rules,
        calibration_images(job),
        list(calibration_images(job, COMPARED_IMAGES)),
        config.observer,
        weight_method(job),
        config.percentile,
        config.share_tolerance,
    )
    job.run.write_json(SHARING, result.as_dict())
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


def hint_at_unsigned(job: Job, placement: Placement) -> None:
    """Say where a CPU engine could use a finer grid than the placement has: for example groups after a ReLU."""
    config = job.config.quant
    if config.activations.unsigned or config.placement is not None:
        return
    if any(TARGETS[target].signed_only for target in targets(job)):
        return
    finer = place(job.networks.student, PlacementOptions(unsigned=True))
    signs = {site.node: group.grid.signed for group in finer.groups for site in group.tensors}
    never_negative = sum(
        group.grid.signed and not any(signs.get(site.node, True) for site in group.tensors)
        for group in placement.groups
    )
    if never_negative > len(placement.groups) // 2:
        say(
            f"{never_negative} of {len(placement.groups)} groups are never negative: "
            "quant.activations.unsigned=true halves their step on CPU engines"
        )


def placement_settings(config: Config) -> Sequence[str]:
    """What a placement depends on; with measured concats or activations also what calibration does."""
    if config.quant.swap_activation == AUTO:
        names = (field.name for field in dataclasses.fields(QuantConfig))
        kept = (f"quant.{name}" for name in names if name not in AFTER_CALIBRATION)
        return (*kept, "data.limit_train", *MEASURED_BY)
    if config.quant.share_concat_scales == "measured":
        return ("quant", "data.image_size", "data.limit_train")
    return tuple(
        f"quant.{name}"
        for name in (
            "grid", "attention", "share_concat_scales", "weights", "activations", "edge_bits", "float_patterns",
            "policy", "swap_activation",
        )
    )  # fmt: skip


PLACE = Stage(
    "place",
    place_stage,
    settings=placement_settings,
    machine=timed_where,
    splits=lambda config: (TRAIN, VAL) if config.quant.swap_activation == AUTO else (TRAIN,),
    files=("quant.placement",),
    reads=FLOAT_FILES,
    writes=(PLACEMENT, SHARING, SWAPPED, MEASURED),
    editable=(PLACEMENT,),
)
