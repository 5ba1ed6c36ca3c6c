"""Ranges that came with a checkpoint: put on the quantizers that they belong to, instead of calibrating those.

Other tools keep a range for each convolution (the largest magnitude of its input, and of each output channel of its
weights). Here one scale belongs to a placement group, which several convolutions may read: it must hold what the
widest of them holds, so the group takes the largest of their ranges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, fx

from core.errors import RangeError
from quant.insertion import activation_quantizers, placement_of, quantized_layers
from quant.layers import QuantizedLayer

INPUT, WEIGHT = ".input", ".weight"


@dataclass(frozen=True)
class ImportedRanges:
    """What `import_ranges` did.

    Attributes:
        groups: group -> the range it took (largest magnitude, in the tensor's units).
        joined: group that several layers read -> the range of each of them.
        weights: layers whose weight scales were taken.
        unused: ranges that found no quantizer: `<layer>.input` or `.weight`, with the reason.
        groups_without: groups that no range belongs to, calibrated as ever.
        weights_without: quantized layers whose weights have no range, likewise.
    """

    groups: dict[str, float] = field(default_factory=dict)
    joined: dict[str, dict[str, float]] = field(default_factory=dict)
    weights: tuple[str, ...] = ()
    unused: dict[str, str] = field(default_factory=dict)
    groups_without: tuple[str, ...] = ()
    weights_without: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """Plain data for a JSON file."""
        return asdict(self)

    def describe(self) -> list[str]:
        """Lines for the log: what was taken, what was joined, and what had no counterpart, in both directions."""
        lines = [
            f"imported ranges: used for {len(self.groups)} groups and the weights of {len(self.weights)} layers"
        ]
        if self.joined:
            group = max(self.joined, key=lambda name: self.groups[name] / min(self.joined[name].values()))
            found = ", ".join(f"{layer} {value:g}" for layer, value in self.joined[group].items())
            lines.append(
                f"  {len(self.joined)} groups are read by several layers and use the largest of their ranges; "
                f"largest difference: {group} uses {self.groups[group]:g} ({found})"
            )
        unused = [f"{name} ({reason})" for name, reason in self.unused.items()]
        for label, names in (
            ("in the checkpoint, without a quantizer in the placement", unused),
            ("groups without a range in the checkpoint (calibrated)", self.groups_without),
            ("weights without a range in the checkpoint (searched)", self.weights_without),
        ):
            lines.append(f"  {label}: {len(names)}{': ' if names else ''}{', '.join(names)}")
        return lines


def import_ranges(model: fx.GraphModule, ranges: Mapping[str, Tensor]) -> ImportedRanges:
    """Set the scales of an inserted model from the ranges of a checkpoint: scale = largest magnitude / highest code.

    A group whose scale is fixed by a rule keeps it.

    Args:
        model: result of `insert`.
        ranges: `<layer>.input` -> largest magnitude of what the layer reads; `<layer>.weight` -> that of its weights,
            one value, or one per output channel.

    Raises:
        RangeError: a range is not positive and finite, or has another number of values than the layer has output
            channels.
    """
    for name, values in ranges.items():
        if not values.numel() or not bool((values > 0).all() & values.isfinite().all()):
            raise RangeError(
                f"imported range {name} is {values.flatten()[:4].tolist()}; expected positive, finite"
            )
    left = dict(ranges)
    unused: dict[str, str] = {}
    groups, joined, groups_without = _import_groups(model, left, unused)
    layers = quantized_layers(model)
    taken = tuple(name for name in layers if name + WEIGHT in left)
    for layer_name in taken:
        layer, values = layers[layer_name], left.pop(layer_name + WEIGHT)
        layer.weight_quantizer.set_scale(_weight_scale(layer_name, layer, values), layer.weight)
    missing = tuple(name for name in layers if name not in taken)
    floating = placement_of(model).kept_float
    for name in left:
        layer_name = name.rpartition(".")[0]
        unused[name] = f"float: {floating[layer_name]}" if layer_name in floating else "no such layer"
    return ImportedRanges(groups, joined, taken, unused, groups_without, missing)


def _import_groups(
    model: fx.GraphModule, left: dict[str, Tensor], unused: dict[str, str]
) -> tuple[dict[str, float], dict[str, dict[str, float]], tuple[str, ...]]:
    """Set the scales of the groups; ranges that were looked at are taken out of `left`."""
    groups: dict[str, float] = {}
    joined: dict[str, dict[str, float]] = {}
    without = []
    quantizer_of = activation_quantizers(model)
    for group in placement_of(model).groups:
        found = {
            layer: float(left.pop(layer + INPUT).max()) for layer in group.layers if layer + INPUT in left
        }
        if group.scale is not None:
            unused.update({layer + INPUT: "the scale is fixed by a rule" for layer in found})
            continue
        if not found:
            without.append(group.name)
            continue
        quantizer = quantizer_of[group.name]
        groups[group.name] = max(found.values())
        quantizer.set_scale(groups[group.name] / quantizer.grid.high)
        if len(found) > 1:
            joined[group.name] = found
    return groups, joined, tuple(without)


def _weight_scale(name: str, layer: QuantizedLayer, values: Tensor) -> Tensor:
    quantizer = layer.weight_quantizer
    channels = layer.weight.shape[quantizer.axis]
    if values.numel() not in (1, channels):
        raise RangeError(
            f"imported range {name}{WEIGHT} has {values.numel()} values and the layer {channels} output channels: the "
            "checkpoint belongs to another network; use quant.imported_ranges=ignore to calibrate instead"
        )
    amax = values.detach().to(layer.weight.device, torch.float32).flatten().expand(channels)
    return (amax.amax().reshape(1) if quantizer.grid.is_fp8 else amax) / quantizer.grid.high
