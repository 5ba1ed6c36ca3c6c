"""Layers with quantized weights: the float layer with one more submodule, visible in its forward.

Where no gradient is taken (evaluation, sensitivity) these layers multiply whole numbers, as an INT8 engine does:
y = (codes of x * codes of w) * (step of x * step of w) + bias. Float32 adds whole numbers exactly up to 2^24, so the
sums do not depend on their order, and a figure is the same for every thread count, memory layout and library.
Sums of step * code round in another order each time, and a few values that fall to the other side of a grid step move
the AP of a hundred images by up to 0.003 (benchmarks/numerical_spread.py).

Under autocast they multiply codes, too, in bfloat16 or float16: these types hold every code, and no step * code. Codes
are divided by a power of two that brings them to [-1, 1] (unsigned ones to [0, 1]), so that float16's sums cannot
overflow. The gradient is that of the product of values. Sums are rounded once, to the type of autocast; steps and bias
are applied in float32.

FP8 codes are not whole numbers: layers with an FP8 grid multiply values in float32, under autocast, too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.grid import Grid
from quant.fake_quantize import FakeQuantize, Mode, WeightFakeQuantize, rounding_again
from quant.rounding import affine, affine_gradients, codes_of, scaled

InputGrid = tuple[FakeQuantize, ...]  # a tuple, so that the quantizer is not a second submodule of the layer


class _Codes(torch.autograd.Function):
    """Codes of values on a grid, as multiples of a power of two and in a type that holds them exactly."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, unit: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.unit = unit
        return codes_of(values, scale, unit, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        return scaled(gradients[0], ctx.unit / scale), None, None, None


class _Affine(torch.autograd.Function):
    """Sums of codes as values: times the step of each output channel, plus the bias; float32."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, steps: Tensor, bias: Tensor, axis: int) -> Tensor:
        ctx.save_for_backward(steps)
        ctx.axis, ctx.dtype = axis, sums.dtype
        return affine(sums, steps, bias, axis)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (steps,) = ctx.saved_tensors
        grad_sums, grad_bias = affine_gradients(outer[0], steps, ctx.axis, ctx.dtype)
        return grad_sums, None, grad_bias, None


def _not_keeping(input: Tensor) -> AbstractContextManager[Any]:
    """Where the backward pass of a layer does not keep an input that comes from a quantizer.

    It rounds again what the quantizer keeps for its own backward pass.
    """
    again, place = rounding_again(input), (input.data_ptr(), input.shape)
    if again is None:
        return nullcontext()

    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        return tensor if (tensor.data_ptr(), tensor.shape) != place else again

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _on_codes(layer: QuantizedLayer, input: Tensor) -> bool:
    """Whether the input has passed one quantizer, which is on, so that its codes are known, and all are integers."""
    return (
        bool(layer.input_grid)
        and not (layer.input_grid[0].grid.is_fp8 or layer.weight_quantizer.grid.is_fp8)
        and layer.input_grid[0].mode is Mode.QUANTIZE
        and input.dtype is layer.weight.dtype is torch.float32
    )


def _weight(layer: QuantizedLayer, quantized: Tensor | None) -> Tensor:
    """The layer's quantized weight, given or not."""
    return layer.weight_quantizer(layer.weight) if quantized is None else quantized


def _operands(
    layer: QuantizedLayer, input: Tensor, quantized: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of the input and of the weight, and the step of their products, shape [output channels]."""
    activations, weights = layer.input_grid[0], layer.weight_quantizer
    scale = activations.scale
    if not torch.is_autocast_enabled(input.device.type):
        codes, steps = weights.codes(layer.weight)
        return codes_of(input, scale), codes, scale * steps
    dtype = torch.get_autocast_dtype(input.device.type)
    units = [1 / (quantizer.grid.high + 1) for quantizer in (activations, weights)]
    codes = _Codes.apply(input, scale, units[0], dtype)
    values = _weight(layer, quantized)  # first: it may move the scale
    weight = _Codes.apply(values, weights.steps(layer.weight.ndim), units[1], dtype)
    return codes, weight, scale * weights.scale / (units[0] * units[1])


def _scaled(sums: Tensor, steps: Tensor, bias: Tensor | None, axis: int) -> Tensor:
    """Sums of codes as values, float32: times the step of each output channel, plus the bias."""
    axis %= sums.ndim
    if steps.numel() != sums.shape[axis]:  # one step for the tensor, or for each place in a group
        steps = steps.repeat(sums.shape[axis] // steps.numel())
    if bias is None:
        return sums.float().mul_(steps.reshape([-1 if d == axis else 1 for d in range(sums.ndim)]))
    if torch.is_grad_enabled():
        return _Affine.apply(sums, steps, bias, axis)
    return affine(sums, steps, bias, axis, sums if sums.dtype == torch.float32 else None)


def _compute(
    layer: QuantizedLayer,
    input: Tensor,
    operation: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    quantized: Tensor | None,
    axis: int = 1,
) -> Tensor:
    """A layer's `operation` (input, weight, bias) with its quantized weight; on codes where that is of use.

    `quantized` is that weight, or None if it is still to be quantized. `axis` counts the output's channels.
    """
    weights = layer.weight_quantizer
    autocast = torch.is_autocast_enabled(input.device.type)
    off = weights.mode is not Mode.QUANTIZE or torch.onnx.is_in_onnx_export()
    if off:
        return operation(input, weights(layer.weight), layer.bias)
    if torch.is_grad_enabled() and not autocast:
        weight = _weight(layer, quantized)
        with _not_keeping(input):
            return operation(input, weight, layer.bias)
    if _on_codes(layer, input):
        codes, weight, steps = _operands(layer, input, quantized)
        return _scaled(operation(codes, weight, None), steps, layer.bias, axis)
    # float32 even under autocast, whose types would move the weights off their grid
    with torch.autocast(input.device.type, enabled=False):
        weight = _weight(layer, quantized)
        return operation(input.to(layer.weight.dtype), weight, layer.bias)


class QuantizedConv2d(nn.Conv2d):
    """`nn.Conv2d` whose weight passes a quantizer; input [B, C, H, W] comes quantized by the graph."""

    weight_quantizer: WeightFakeQuantize
    input_grid: InputGrid = ()

    def forward(self, input: Tensor, quantized: Tensor | None = None) -> Tensor:
        """Convolve with the quantized weight, given or not; the bias stays float."""
        return _compute(self, input, self._conv_forward, quantized)


class QuantizedConv1d(nn.Conv1d):
    """`nn.Conv1d` whose weight passes a quantizer."""

    weight_quantizer: WeightFakeQuantize
    input_grid: InputGrid = ()

    def forward(self, input: Tensor, quantized: Tensor | None = None) -> Tensor:
        """Convolve with the quantized weight, given or not; the bias stays float."""
        return _compute(self, input, self._conv_forward, quantized)


class QuantizedConvTranspose2d(nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` whose weight passes a quantizer (output channels on axis 1)."""

    weight_quantizer: WeightFakeQuantize
    input_grid: InputGrid = ()

    def forward(
        self, input: Tensor, output_size: list[int] | None = None, quantized: Tensor | None = None
    ) -> Tensor:
        """Convolve with the quantized weight, given or not; the bias stays float."""
        if output_size is not None:
            raise ValueError("a quantized transposed convolution takes no output_size: set output_padding")
        return _compute(self, input, self._transposed, quantized)

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

    def forward(self, input: Tensor, quantized: Tensor | None = None) -> Tensor:
        """Multiply with the quantized weight, given or not; the bias stays float."""
        return _compute(self, input, F.linear, quantized, axis=-1)


class QuantizedMatMul(nn.Module):
    """`torch.matmul` of two tensors that the graph quantizes, instead of the function.

    Args:
        first: the quantizer that the first operand has passed.
        second: that of the second operand.
    """

    def __init__(self, first: FakeQuantize, second: FakeQuantize) -> None:
        super().__init__()
        self.input_grids: InputGrid = (first, second)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Multiply [..., N, K] with [..., K, M]; on codes where layers do so, see the module's text."""
        autocast = torch.is_autocast_enabled(first.device.type)
        off = any(quantizer.mode is not Mode.QUANTIZE for quantizer in self.input_grids)
        if off or torch.onnx.is_in_onnx_export() or (torch.is_grad_enabled() and not autocast):
            return torch.matmul(first, second)
        if any(quantizer.grid.is_fp8 for quantizer in self.input_grids):
            # float32 even under autocast, whose types would move the values off their grid
            with torch.autocast(first.device.type, enabled=False):
                return torch.matmul(first, second)
        codes, steps = [], []
        for values, quantizer in zip((first, second), self.input_grids, strict=True):
            unit = 1 / (quantizer.grid.high + 1) if autocast else 1.0
            dtype = torch.get_autocast_dtype(first.device.type) if autocast else torch.float32
            codes.append(_Codes.apply(values, quantizer.scale, unit, dtype))
            steps.append(quantizer.scale / unit)
        return torch.matmul(*codes).float().mul_(steps[0] * steps[1])


QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.Linear: QuantizedLinear,
}
QuantizedLayer = QuantizedConv1d | QuantizedConv2d | QuantizedConvTranspose2d | QuantizedLinear


def quantize_layer(layer: nn.Module, axis: int, grid: Grid, learned: bool) -> None:
    """Turn a float layer into its quantized form in place: same parameters, one more submodule.

    Integer weights have one scale for each output channel. FP8 weights have one for the tensor: their steps are
    relative to the value, so that small channels keep their precision, and TensorRT for RTX then finishes a
    convolution (bias, FP16 result) in its own kernel; with scales per channel it writes FP32 for a second one.

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
    channels = 1 if grid.is_fp8 else weight.shape[axis]
    quantizer = WeightFakeQuantize(channels, axis, grid, learned).to(weight.device)
    layer.add_module("weight_quantizer", quantizer)
