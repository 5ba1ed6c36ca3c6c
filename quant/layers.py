"""Layers with quantized weights: the float layer with one more submodule, visible in its forward.

Where no gradient is taken (evaluation, sensitivity) these layers multiply whole numbers, as an INT8 engine does:
y = (codes of x * codes of w) * (step of x * step of w) + bias. Float32 adds whole numbers exactly up to 2^24, so the
sums do not depend on their order, and a figure is the same for every thread count, memory layout and library.
Sums of step * code round in another order each time, and a few values that fall to the other side of a grid step move
the AP of a hundred images by up to 0.003 (benchmarks/numerical_spread.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.fake_quantize import FakeQuantize, Mode, WeightFakeQuantize

InputGrid = tuple[FakeQuantize, ...]  # a tuple, so that the quantizer is no second submodule of the layer


def _whole_numbers(layer: QuantizedLayer, input: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Codes of the input and of the weight, and the step of their products, shape [output channels].

    None where the layer has to work on floats: while gradients are taken or an ONNX file is written, where a quantizer
    is off, or where the inputs come from several grids.
    """
    if not layer.input_grid or torch.is_grad_enabled() or torch.onnx.is_in_onnx_export():
        return None
    grid, weights = layer.input_grid[0], layer.weight_quantizer
    if not (
        grid.mode is weights.mode is Mode.QUANTIZE and input.dtype is layer.weight.dtype is torch.float32
    ):
        return None
    steps = weights.scale
    shape = [-1 if dimension == weights.axis else 1 for dimension in range(layer.weight.ndim)]
    codes = (input * grid.scale.reciprocal()).round_()
    return codes, (weights(layer.weight) / steps.reshape(shape)).round_(), grid.scale * steps


def _scaled(sums: Tensor, steps: Tensor, bias: Tensor | None, axis: int) -> Tensor:
    """Sums of codes as values: times the step of each output channel, plus the bias."""
    shape = [-1 if dimension == axis % sums.ndim else 1 for dimension in range(sums.ndim)]
    steps = steps.repeat(
        sums.shape[axis] // steps.numel()
    )  # a grouped transposed layer has one step per place in a group
    values = sums.mul_(steps.reshape(shape))
    return values if bias is None else values.add_(bias.reshape(shape))


def _compute(
    layer: QuantizedLayer,
    input: Tensor,
    operation: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    axis: int = 1,
) -> Tensor:
    """A layer's `operation` (input, weight, bias) with its quantized weight, on whole numbers where that is possible.

    `axis` counts the output's channels.
    """
    operands = _whole_numbers(layer, input)
    if operands is None:
        return operation(input, layer.weight_quantizer(layer.weight), layer.bias)
    codes, weight, steps = operands
    return _scaled(operation(codes, weight, None), steps, layer.bias, axis)


class QuantizedConv2d(nn.Conv2d):
    """`nn.Conv2d` whose weight passes a quantizer; input [B, C, H, W] comes quantized by the graph."""

    weight_quantizer: WeightFakeQuantize
    input_grid: InputGrid = ()

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the quantized weight; the bias stays float."""
        return _compute(self, input, self._conv_forward)


class QuantizedConv1d(nn.Conv1d):
    """`nn.Conv1d` whose weight passes a quantizer."""

    weight_quantizer: WeightFakeQuantize
    input_grid: InputGrid = ()

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the quantized weight; the bias stays float."""
        return _compute(self, input, self._conv_forward)


class QuantizedConvTranspose2d(nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` whose weight passes a quantizer (output channels on axis 1)."""

    weight_quantizer: WeightFakeQuantize
    input_grid: InputGrid = ()

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve with the quantized weight; the bias stays float."""
        if output_size is not None:
            raise ValueError("a quantized transposed convolution takes no output_size: set output_padding")
        return _compute(self, input, self._transposed)

    def _transposed(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # names for the padding are for plain convolutions, as torch's own forward says
        assert isinstance(self.padding, tuple)
        return F.conv_transpose2d(
            input,
            weight,
            bias,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.dilation,
        )


class QuantizedLinear(nn.Linear):
    """`nn.Linear` whose weight passes a quantizer."""

    weight_quantizer: WeightFakeQuantize
    input_grid: InputGrid = ()

    def forward(self, input: Tensor) -> Tensor:
        """Multiply with the quantized weight; the bias stays float."""
        return _compute(self, input, F.linear, axis=-1)


QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.Linear: QuantizedLinear,
}
QuantizedLayer = QuantizedConv1d | QuantizedConv2d | QuantizedConvTranspose2d | QuantizedLinear


def quantize_layer(layer: nn.Module, axis: int, bits: int, learned: bool) -> None:
    """Turn a float layer into its quantized form in place: same parameters, one more submodule.

    Raises:
        TypeError: the layer's type has no quantized form.
    """
    kind = QUANTIZED.get(type(layer))
    if kind is None:
        known = ", ".join(sorted(t.__name__ for t in QUANTIZED))
        raise TypeError(f"{type(layer).__name__} has no quantized form; these have: {known}")
    weight = layer.weight
    assert isinstance(weight, Tensor)
    layer.__class__ = kind
    quantizer = WeightFakeQuantize(weight.shape[axis], axis, bits, learned).to(weight.device)
    layer.add_module("weight_quantizer", quantizer)
