"""Calibration: one pass of float inference shows every group its values; then each scale is chosen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from core.choices import OBSERVERS
from core.errors import CalibrationError
from core.names import listing
from quant.calibration.convergence import (
    Convergence,
    Histograms,
    Milestones,
    follow_scales,
    merge_histograms,
    merge_milestones,
)
from quant.calibration.imported import ImportedRanges, import_ranges
from quant.calibration.observers import (
    NO_ENTROPY,
    Histogram,
    choose_scale,
    choose_weight_scale,
    squared_errors,
)
from quant.fake_quantize import Mode
from quant.insertion import activation_quantizers, placement_of, quantized_layers, quantizers, set_mode

log = logging.getLogger(__name__)
FIXED = "fixed"  # instead of a method, for scales that the placement gives
IMPORTED = "imported"  # ... for a group whose range is in the checkpoint


Gather = Callable[
    [Any], list[Any]
]  # this process's item -> every process's items, in the same order everywhere


@dataclass(frozen=True)
class Share:
    """What one of several processes calibrates: they take the batches in turn.

    Attributes:
        gather: collects an item from all processes.
        rank: number of this process among `size`; it has batch `rank`, `rank + size`, ...; there may be none.
        size: number of processes.
        batch_size: images per batch, but for the last of all.
    """

    gather: Gather
    rank: int
    size: int
    batch_size: int


@dataclass(frozen=True)
class GroupCalibration:
    """What calibration found for one group: all in the tensor's own units; `clipped` is a share of the values.

    `maximum` and `clipped` are None where no value was looked at, because the range was imported.
    """

    name: str
    method: str
    maximum: float | None
    amax: float
    scale: float
    clipped: float | None
    num_values: int
    num_ignored: int


@dataclass(frozen=True)
class CalibrationResult:
    """Result of `calibrate`: one entry per group, the number of images, how the scales settled, what was imported."""

    groups: tuple[GroupCalibration, ...]
    num_images: int
    convergence: Convergence | None = None
    imported: ImportedRanges | None = None

    def as_dict(self) -> dict[str, object]:
        """Plain data for a JSON file."""
        content: dict[str, object] = {
            "num_images": self.num_images,
            "groups": [asdict(group) for group in self.groups],
        }
        if self.convergence is not None:
            content["convergence"] = self.convergence.as_dict()
        if self.imported is not None:
            content["imported"] = self.imported.as_dict()
        return content


def calibrate(
    model: fx.GraphModule,
    batches: Iterable[Tensor],
    method: str = "mse",
    weight_method: str = "mse",
    percentile: float = 99.99,
    share: Share | None = None,
    ranges: Mapping[str, Tensor] | None = None,
) -> CalibrationResult:
    """Set every scale of an inserted model and leave all quantizers switched on.

    Weight scales depend on the weights alone. Activation scales come from one pass of float inference over the
    batches; a group with a fixed scale keeps it, one with an observer of its own uses that. What has an imported
    range is not calibrated; where every group has one, no batch is drawn.

    Args:
        model: result of `insert`.
        batches: float images [B, C, H, W], prepared as for inference (letterboxed, never mosaics).
        method: default method for activations: `minmax`, `percentile`, `mse` or `entropy`.
        weight_method: `minmax` or `mse`.
        percentile: for the percentile method, in percent.
        share: where several processes calibrate one model: what `batches` of this process are. Counts add up exactly,
            so the scales do not depend on the number of processes.
        ranges: of a quantized checkpoint, as `import_ranges` takes them; None or empty calibrates everything.

    Raises:
        CalibrationError: no batch, an unknown method, `entropy` for an FP8 group, a group that saw NaN or infinite
            values only, or such a weight.
        RangeError: an imported range does not fit.
    """
    _check_methods(model, method, weight_method)
    imported = import_ranges(model, ranges) if ranges else ImportedRanges()
    calibrate_weights(model, weight_method, imported.weights)
    milestones = Milestones() if share is None else Milestones(share.batch_size, share.rank, share.size)
    histograms, num_images = collect_histograms(
        model, batches, milestones.see, imported.groups, may_be_empty=share is not None and share.rank > 0
    )
    if share is not None:
        parts = share.gather((histograms, num_images, milestones))
        histograms = merge_histograms([part[0] for part in parts])
        num_images = sum(part[1] for part in parts)
        milestones = merge_milestones([part[2] for part in parts])
    result = apply_histograms(model, histograms, method, percentile, num_images, imported.groups)
    set_mode(model, Mode.QUANTIZE)
    convergence = _convergence(model, result, milestones, histograms, percentile) if num_images else None
    return replace(result, convergence=convergence, imported=imported if ranges else None)


def _check_methods(model: fx.GraphModule, method: str, weight_method: str) -> None:
    for name in (method, weight_method):
        if name not in OBSERVERS:
            raise CalibrationError(
                f"unknown calibration method {name!r}: choose one of {', '.join(OBSERVERS)}"
            )
    for group in placement_of(model).groups:
        if group.grid.is_fp8 and (group.observer or method) == "entropy":
            raise CalibrationError(f"group {group.name!r} is FP8: {NO_ENTROPY}")


def _convergence(
    model: fx.GraphModule,
    result: CalibrationResult,
    milestones: Milestones,
    histograms: Mapping[str, Histogram],
    percentile: float,
) -> Convergence:
    """The scales that fewer images would have given, chosen by the method that chose the final ones."""
    quantizer_of = activation_quantizers(model)
    chosen = {group.name: group for group in result.groups if group.method not in (FIXED, IMPORTED)}

    def scale_of(name: str, histogram: Histogram) -> float:
        quantizer = quantizer_of[name]
        return choose_scale(histogram, chosen[name].method, quantizer.grid, percentile).scale

    def errors_of(name: str, scales: Sequence[float]) -> list[float]:
        candidates = torch.tensor(scales, dtype=torch.float64)
        errors: list[float] = squared_errors(histograms[name], candidates, quantizer_of[name].grid).tolist()
        return errors

    final = {name: group.scale for name, group in chosen.items()}
    return follow_scales(milestones, result.num_images, final, scale_of, errors_of)


def calibrate_weights(model: fx.GraphModule, method: str = "mse", skip: Collection[str] = ()) -> None:
    """Choose one scale per output channel of every quantized layer (one in all for FP8), those to skip aside.

    Raises:
        CalibrationError: a layer has NaN or infinite weights.
    """
    for name, layer in quantized_layers(model).items():
        if not bool(torch.isfinite(layer.weight).all()):
            raise CalibrationError(
                f"layer {name!r} has NaN or infinite weights: use a checkpoint from before the training diverged"
            )
        if name in skip:
            continue
        quantizer = layer.weight_quantizer
        one_scale = quantizer.grid.is_fp8
        weight = layer.weight.flatten()[None] if one_scale else layer.weight
        scale = choose_weight_scale(weight, 0 if one_scale else quantizer.axis, method, quantizer.grid)
        quantizer.set_scale(scale.to(layer.weight.device), layer.weight)


def collect_histograms(
    model: fx.GraphModule,
    batches: Iterable[Tensor],
    after_batch: Callable[[Histograms, int], None] | None = None,
    skip: Collection[str] = (),
    may_be_empty: bool = False,
) -> tuple[Histograms, int]:
    """Run float inference and count the magnitudes in every group, those to skip aside.

    `after_batch` is called with the histograms and the image count after each batch. The network's training flag and
    the quantizers' modes are restored afterwards.

    Returns:
        The histograms, and the number of images; none is looked at where all groups are skipped.

    Raises:
        CalibrationError: no image, unless `may_be_empty`.
    """
    groups = {name: found for name, found in activation_quantizers(model).items() if name not in skip}
    if skip and not groups:
        return {}, 0
    histograms = {name: Histogram() for name in groups}
    modes = [(quantizer, quantizer.mode) for quantizer in quantizers(model)]
    training = model.training
    num_images = 0
    model.eval()
    set_mode(model, Mode.OFF)
    for name, observed in groups.items():
        observed.observer, observed.mode = histograms[name], Mode.OBSERVE
    try:
        with torch.no_grad():
            for images in batches:
                model(images)
                num_images += len(images)
                if after_batch is not None:
                    after_batch(histograms, num_images)
    finally:
        for observed in groups.values():
            observed.observer = None
        for quantizer, mode in modes:
            quantizer.mode = mode
        model.train(training)
    if num_images == 0 and not may_be_empty:
        raise CalibrationError("calibration got no image: raise the number of calibration images above 0")
    return histograms, num_images


def apply_histograms(
    model: fx.GraphModule,
    histograms: dict[str, Histogram],
    method: str,
    percentile: float,
    num_images: int,
    imported: Mapping[str, float] | None = None,
) -> CalibrationResult:
    """Set each group's scale from its histogram; a group with an imported range has its scale already."""
    quantizer_of = activation_quantizers(model)
    found = []
    _check_seen(histograms)
    for group in placement_of(model).groups:
        if imported and group.name in imported:
            amax = imported[group.name]
            scale = amax / quantizer_of[group.name].grid.high
            found.append(GroupCalibration(group.name, IMPORTED, None, amax, scale, None, 0, 0))
            continue
        histogram, quantizer = histograms[group.name], quantizer_of[group.name]
        if histogram.num_ignored:
            log.warning("group %s: %d NaN or infinite values left out", group.name, histogram.num_ignored)
        chosen_by = group.observer or method
        choice = choose_scale(histogram, chosen_by, quantizer.grid, percentile)
        scale = choice.scale
        if group.scale is None:
            quantizer.set_scale(scale)
        else:
            chosen_by, scale = FIXED, group.scale
        found.append(
            GroupCalibration(
                name=group.name,
                method=chosen_by,
                maximum=histogram.maximum,
                amax=scale * quantizer.grid.high,
                scale=scale,
                clipped=choice.clipped,
                num_values=histogram.num_values,
                num_ignored=histogram.num_ignored,
            )
        )
    return CalibrationResult(tuple(found), num_images)


def _check_seen(histograms: Mapping[str, Histogram]) -> None:
    """List the groups that saw nothing a scale can come from: no finite value is an error, zeros only are logged."""
    empty = [name for name, histogram in histograms.items() if histogram.num_values == 0]
    if empty:
        raise CalibrationError(
            f"group {empty[0]!r} saw {histograms[empty[0]].num_ignored} values, none of them finite"
            + (f", and so did {listing(empty[1:], 5)}" if empty[1:] else "")
            + ": the float network overflows on these images; check the weights and the preprocessing"
        )
    dead = [name for name, histogram in histograms.items() if histogram.maximum == 0]
    if dead:
        log.warning(
            "%d groups saw zeros only (%s): no scale fits them; check the weights and the images",
            len(dead),
            listing(dead, 5),
        )
