"""Scores that come back to those of the float network: one straight line per class, folded into the last layers.

Quantization moves class logits a little, and near a user's threshold a little decides whether a box is shown. For each
class a slope a > 0 and an offset b are fitted, such that a z + b comes close to the float network's logit z on
calibration images. Both go into the layers that compute the logits: weight and weight scale times a, bias times a plus
b. Codes of integer weights stay as they are and the graph gets no further node. A rising line leaves the order of a
class's scores, and so its AP, as it was.

Scaling logits by fitted numbers is Platt's method (Guo et al., arXiv:1706.04599, section 4.1); here the target is the
float network's logit, not the truth.

Legend: K classes, L layers (levels of a detector), N anchors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant.layers import QuantizedLayer

LEAST_EVIDENCE = 50  # anchors; a class with fewer keeps its logits
LEAST_SPREAD = 1e-6  # variance of a class's logits from which on a slope is fitted
SLOPES = (0.5, 2.0)  # the slope stays in between


@dataclass(frozen=True)
class ScoreLine:
    """The line of one class: float logit = slope * quantized logit + offset.

    Attributes:
        slope: positive.
        offset: in logits.
        anchors: whose float score is at least as high as those that are looked at, over all images.
        error_before: root mean square difference of the scores over them, 0..1; None without any.
        error_after: the same with the line.
    """

    slope: float
    offset: float
    anchors: int
    error_before: float | None
    error_after: float | None

    @property
    def inverse(self) -> ScoreLine:
        """The line that takes this one back."""
        return ScoreLine(
            1 / self.slope, -self.offset / self.slope, self.anchors, self.error_after, self.error_before
        )


def recalibrate_scores(
    model: nn.Module, reference: nn.Module, images: Iterable[Tensor], layers: Sequence[str], lowest: float
) -> list[ScoreLine]:
    """Fit a line per class and fold it into the layers, in place.

    The squared difference of the scores is made small, to first order: differences of logits weigh as the slope of the
    sigmoid at the float logit, p (1 - p).

    Args:
        model: quantized, quantizers on, in evaluation mode.
        reference: the float network, with layers of the same names.
        images: batches as for inference, on the model's device.
        layers: the layers whose outputs [B, K, ...] are the class logits; all share one line per class.
        lowest: least float score of the anchors that are looked at, 0..1; what users see, say.

    Returns:
        The lines, by class.

    Raises:
        ValueError: no layer, or layers of different numbers of classes.
    """
    if not layers:
        raise ValueError("no layer gives class scores")
    lines = [fit_line(found, wanted) for found, wanted in _collect(model, reference, images, layers, lowest)]
    for name in layers:
        fold_lines(model.get_submodule(name), lines)
    return lines


def fit_line(found: Tensor, wanted: Tensor) -> ScoreLine:
    """The line of one class from its logits [N] in the quantized and in the float network.

    With fewer than `LEAST_EVIDENCE` of them, or with logits that are all equal, the line is the identity.
    """
    x, y, p = found.double(), wanted.double(), wanted.double().sigmoid()
    if not len(x):
        return ScoreLine(1.0, 0.0, 0, None, None)
    slope, offset = 1.0, 0.0
    weights = (p * (1 - p)).square()
    weights /= weights.sum()
    mean_x, mean_y = weights @ x, weights @ y
    spread = weights @ (x - mean_x).square()
    if len(x) >= LEAST_EVIDENCE and float(spread) > LEAST_SPREAD:
        slope = float(weights @ ((x - mean_x) * (y - mean_y)) / spread)
        slope = min(max(slope, SLOPES[0]), SLOPES[1])
        offset = float(mean_y - slope * mean_x)
    errors = [float((line.sigmoid() - p).square().mean().sqrt()) for line in (x, slope * x + offset)]
    return ScoreLine(slope, offset, len(x), *errors)


@torch.no_grad()
def fold_lines(layer: nn.Module, lines: Sequence[ScoreLine]) -> None:
    """Make a convolution or linear layer give slope * output + offset in each of its output channels, in place.

    Integer codes of quantized weights do not change: their scales take the slope. FP8 weights have one scale for all
    channels and are rounded anew.

    Raises:
        ValueError: another kind of layer, one without bias, or with another number of channels.
    """
    fits = (
        isinstance(layer, nn.Conv2d | nn.Linear)
        and layer.bias is not None
        and len(layer.weight) == len(lines)
    )
    if not fits:
        raise ValueError(
            f"{layer} cannot take {len(lines)} lines; expected a convolution or linear layer with as many output "
            "channels and a bias"
        )
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    weight, bias = layer.weight, layer.bias
    assert bias is not None
    slopes = weight.new_tensor([line.slope for line in lines])
    offsets = weight.new_tensor([line.offset for line in lines])
    weight.mul_(slopes.reshape(-1, *[1] * (weight.ndim - 1)))
    bias.mul_(slopes).add_(offsets)
    if isinstance(layer, QuantizedLayer):
        quantizer = layer.weight_quantizer
        per_channel = quantizer.scale.numel() == len(lines)
        quantizer.set_scale(quantizer.scale * (slopes if per_channel else slopes.max()), weight)


@torch.no_grad()
def _collect(
    model: nn.Module, reference: nn.Module, images: Iterable[Tensor], layers: Sequence[str], lowest: float
) -> list[tuple[Tensor, Tensor]]:
    """For each class its logits [N] in both networks, where the float score is at least `lowest`."""
    caught: tuple[list[Tensor], list[Tensor]] = ([], [])
    hooks = [
        network.get_submodule(name).register_forward_hook(_keep_logits(side))
        for side, network in zip(caught, (model, reference), strict=True)
        for name in layers
    ]
    parts: list[list[tuple[Tensor, Tensor]]] = []
    try:
        for batch in images:
            model(batch)
            reference(batch)
            found, wanted = (torch.cat(side, dim=1) for side in caught)
            parts.append(
                [
                    (f[seen].cpu(), w[seen].cpu())
                    for f, w, seen in zip(found, wanted, wanted.sigmoid() >= lowest, strict=True)
                ]
            )
            for side in caught:
                side.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return [
        (torch.cat([found for found, _ in part]), torch.cat([wanted for _, wanted in part]))
        for part in zip(*parts, strict=True)
    ]


def _keep_logits(kept: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], None]:
    """A hook that appends a layer's output [B, K, ...] as [K, B * ...]."""

    def hook(_: nn.Module, _inputs: Any, output: Tensor) -> None:
        kept.append(output.float().transpose(0, 1).flatten(1))

    return hook
