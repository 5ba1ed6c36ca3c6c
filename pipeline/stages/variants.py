"""The calibrated models that plans are made of: the run's own, and its placement in the other kind of codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import fx

from core.choices import FP8, INT8, INTEGER
from core.errors import ConfigError
from core.grid import FP8_E4M3, FP8_WEIGHTS, INT8_WEIGHTS
from core.grid import INT8 as INT8_GRID
from pipeline.job import Job
from pipeline.networks import Networks
from pipeline.run.progress import say
from pipeline.stages.calibration import (
    calibration_images,
    imported_ranges,
    prepared_network,
    weight_method,
)
from pipeline.stages.plans import FLOATING
from quant import Placement, PlacementOptions, calibrate, insert, place, placement_of

KINDS = {INT8: INTEGER, FP8: FP8}  # precision -> kind of its grids
GRIDS = {INT8: (INT8_GRID, INT8_WEIGHTS), FP8: (FP8_E4M3, FP8_WEIGHTS)}  # of activations, of weights


def precisions_of(job: Job, able: Sequence[str]) -> list[str]:
    """Quantized precisions that a unit can have, the run's own first.

    Args:
        job: the job.
        able: those that the GPU or runtime runs.

    Raises:
        ConfigError: `autotune.precisions` leaves the run's own out.
    """
    own, wanted = FP8 if job.config.quant.grid == FP8 else INT8, job.config.autotune.precisions
    if own not in wanted:
        raise ConfigError(
            f"autotune.precisions=[{','.join(wanted)}] with quant.grid={job.config.quant.grid}: the run's calibrated "
            f"model is {own}, so add {own}, or use quant={wanted[0]}"
        )
    return [own, *(name for name in wanted if name != own and name in able)]


def calibrated_as(job: Job, model: fx.GraphModule, precision: str) -> fx.GraphModule:
    """The placement of a calibrated model in another precision, calibrated on the same images.

    The options that repair a calibrated model (`quant.greedy_rounding`, `quant.bias_correction`) are left out.
    """
    config = job.config.quant
    placement = converted(placement_of(model), precision)
    other = insert(prepared_network(job), placement, job.config.qat.learn_scales).to(job.device).eval()
    observer = "mse" if config.observer == "entropy" else config.observer  # which FP8 does not have
    say(f"autotune: calibrating {precision} beside {config.grid} codes")
    images, ranges = calibration_images(job), imported_ranges(job)
    calibrate(other, images, observer, weight_method(job), config.percentile, ranges=ranges)
    return other


def converted(placement: Placement, precision: str) -> Placement:
    """A placement with all codes in one precision; fixed scales keep their range."""
    activations, weights = GRIDS[precision]
    groups = []
    for group in placement.groups:
        if group.grid.kind != activations.kind:
            scale = None if group.scale is None else group.scale * group.grid.high / activations.high
            observer = None if group.observer == "entropy" else group.observer
            group = dataclasses.replace(group, grid=activations, scale=scale, observer=observer)
        groups.append(group)
    sites = [
        site if site.grid.kind == weights.kind else dataclasses.replace(site, grid=weights)
        for site in placement.weights
    ]
    return dataclasses.replace(placement, groups=tuple(groups), weights=tuple(sites))


def options_of(
    networks: Networks, placement: Placement, precisions: Sequence[str]
) -> Mapping[str, tuple[str, ...]]:
    """Unit -> what it can be: float first, then the precisions that every layer of it can have.

    FP8 is left out for units with a layer that `quant=fp8` leaves in float: one that reads the image, or that no engine
    runs in FP8. A unit whose codes a policy rule or an edited placement has made of another kind than the run's keeps
    that kind.

    Args:
        networks: the run's networks.
        placement: the run's.
        precisions: quantized ones, the run's own first.
    """
    without_fp8 = set()
    if FP8 in precisions[1:]:
        without_fp8 = set(place(networks.student, PlacementOptions(grid=FP8)).kept_float)
    found = {}
    for group in placement.groups:
        able = precisions if group.grid.kind == KINDS[precisions[0]] else []
        if without_fp8.intersection(group.layers):
            able = [name for name in able if name != FP8]
        found[group.name] = (
            FLOATING,
            *(able or (name for name in precisions if group.grid.kind == KINDS[name])),
        )
    return found
