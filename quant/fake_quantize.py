"""Fake quantization: the two quantizers that a network carries, and their place in autograd.

Scales are learned in the log domain, which keeps every scale positive by construction and lets one learning rate serve
scales that differ by orders of magnitude. The arithmetic and the gradients are in quant/rounding.py.

LSQ (arXiv:1902.08153) also divides the gradient by sqrt(number of values * highest code), to balance the steps of
scales and weights under SGD. Here it is left out: AdamW divides a gradient by its own size, so the factor changes
nothing, unless it makes the gradient so small that AdamW's eps (1e-8) outweighs it, and then scales move the slower the
larger image and batch are.

The codes are those of a `Grid` (core/grid.py). An FP8 grid has codes q of unequal steps instead of round(x / s),
and m = 1 where |x / s| <= 448: with y = s * q(x / s) and the straight-through dq/dx = m / s, dy/ds is q(x/s) - x/s or
+-448 in the same way, so that the two formulas for the gradients hold for it, too. Rounding is a cast to
torch.float8_e4m3fn.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from core.grid import INT8, INT8_WEIGHTS, Grid
from quant.native.kernel import Kernel
from quant.rounding import (
    channel_gradients,
    gradients,
    round_to_grid,
    scaled,
    silu_gradients,
    silu_kernel,
    silu_to_grid,
)

MIN_SCALE = 1e-10
MAX_SCALE = 1e30


class Mode(enum.Enum):
    """What a quantizer does with the tensor that passes through it."""

    OFF = "off"  # passes the tensor on, bit for bit
    OBSERVE = "observe"  # passes it on and shows it to the observer
    QUANTIZE = "quantize"  # rounds it to the grid


class _FakeQuantizeTensor(torch.autograd.Function):
    """Per-tensor fake quantization with gradients for x and the logarithm of the scale; given a kernel, of SiLU(x)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_scale: Tensor, scale: Tensor, grid: Grid, kernel: Kernel | None = None
    ) -> Tensor:
        ctx.grid, ctx.kernel = grid, kernel
        if kernel is None:
            ctx.save_for_backward(x, scale)
            return round_to_grid(x, scale, grid)
        y, codes = silu_to_grid(x, scale, grid, kernel)
        ctx.save_for_backward(x, scale, codes)
        return y

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, *_ = ctx.saved_tensors
        given = outer[0], x, scale, ctx.grid, ctx.needs_input_grad[1]
        found = gradients(*given) if ctx.kernel is None else silu_gradients(*given, ctx.kernel)
        return *found, None, None, None


def rounding_again(y: Tensor) -> Callable[[], Tensor] | None:
    """What computes a quantizer's float32 result again, from what it keeps for its backward pass.

    None where `y` is not the result of a quantizer, or has no gradient. To be called before that backward pass.
    """
    if type(y.grad_fn) is not _FakeQuantizeTensor._backward_cls:  # type: ignore[attr-defined]
        return None
    node: Any = y.grad_fn

    def again() -> Tensor:
        x, scale, *codes = node.saved_tensors
        return scaled(codes[0], scale) if codes else round_to_grid(x, scale, node.grid)

    return again


class _FakeQuantizeChannel(torch.autograd.Function):
    """Per-channel fake quantization with gradients for the input and the logarithm of each scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_scale: Tensor, steps: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(x, steps)
        ctx.grid = grid
        return round_to_grid(x, steps, grid)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        x, steps = ctx.saved_tensors
        grad_x, grad_steps = channel_gradients(outer[0], x, steps, ctx.grid, ctx.needs_input_grad[1])
        return grad_x, None if grad_steps is None else grad_steps.reshape(-1), None, None


class _ExportFP8(torch.autograd.Function):
    """FP8 rounding that torch's ONNX exporter writes as Q/DQ: it knows no FP8 form of torch.fake_quantize_*."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, axis: int, grid: Grid) -> Tensor:
        return grid.round(x, _broadcast(scale, axis, x.ndim) if scale.ndim else scale)

    @staticmethod
    def symbolic(g: Any, x: Any, scale: Any, axis: int, grid: Grid) -> Any:
        sizes = scale.type().sizes()
        zero_point = g.op("Constant", value_t=torch.zeros(sizes, dtype=torch.float8_e4m3fn))
        along = {"axis_i": axis} if sizes else {}
        codes = g.op("QuantizeLinear", x, scale, zero_point, **along)
        return g.op("DequantizeLinear", codes, scale, zero_point, **along)


def _broadcast(scale: Tensor, axis: int, ndim: int) -> Tensor:
    """Scales of the channels on an axis, in a shape that broadcasts over a tensor of `ndim` axes."""
    return scale.reshape([-1 if d == axis else 1 for d in range(ndim)])


class FakeQuantize(nn.Module):
    """Rounds activations to a grid with one scale for the whole tensor; zero is always a code.

    One module serves every tensor of a placement group, so the members share the scale by being the same object.

    Args:
        grid: The codes.
        learned: Whether fine-tuning may move the scale.
    """

    def __init__(self, grid: Grid = INT8, learned: bool = True) -> None:
        super().__init__()
        self.grid = grid
        self.mode = Mode.OFF
        self.observer: Any = None
        self.log_scale = nn.Parameter(torch.zeros(()), requires_grad=learned)

    @property
    def scale(self) -> Tensor:
        """The positive step between two codes, a scalar tensor without gradient."""
        return self.log_scale.detach().exp().clamp(MIN_SCALE, MAX_SCALE)

    def set_scale(self, scale: Tensor | float) -> None:
        """Set the step; raises ValueError unless it is positive and finite."""
        with torch.no_grad():
            self.log_scale.copy_(_log_of(torch.as_tensor(scale, dtype=torch.float64)))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return x (off, observe) or x rounded to the grid (quantize); any shape; `scale` is `self.scale`, if at hand.

        The result has the type of x, under autocast float32: bfloat16 holds 8 bits of a value, so that it would
        move scale * code by up to half a step. The layers take the codes from it (quant/layers.py).
        """
        if self.mode is Mode.OFF:
            return x
        if self.mode is Mode.OBSERVE:
            if self.observer is not None:
                self.observer.update(x.detach())
            return x
        low, high = self.grid.low, self.grid.high
        if torch.onnx.is_in_onnx_export():
            if self.grid.is_fp8:
                scale = torch.tensor(float(self.scale), device=x.device)  # a constant in the file
                return _ExportFP8.apply(x, scale, 0, self.grid)  # type: ignore[no-any-return]
            return torch.fake_quantize_per_tensor_affine(x, float(self.scale), 0, low, high)
        return self._rounded(x, scale)

    def of_silu(self, x: Tensor, scale: Tensor) -> Tensor | None:
        """SiLU(x) rounded to the grid in one pass over memory, bit for bit as in two; None where that cannot be had.

        The native kernel gives it in the mode quantize, unless hooks want to see SiLU(x).
        """
        if (
            self.mode is not Mode.QUANTIZE
            or self.grid.is_fp8
            or self._forward_pre_hooks
            or self._forward_hooks
            or torch.onnx.is_in_onnx_export()
        ):
            return None
        kernel = silu_kernel(x, scale)
        return None if kernel is None else self._rounded(x, scale, kernel)

    def _rounded(self, x: Tensor, scale: Tensor | None, kernel: Kernel | None = None) -> Tensor:
        """X on the grid, or given a kernel, SiLU(x)."""
        scale, log_scale = self.scale if scale is None else scale, self.log_scale
        if torch.is_grad_enabled() and (x.requires_grad or log_scale.requires_grad):
            y = _FakeQuantizeTensor.apply(x, log_scale, scale, self.grid, kernel)
        elif kernel is None:
            y = round_to_grid(x, scale, self.grid)
        else:
            y, _ = silu_to_grid(x, scale, self.grid, kernel)
        return y if y.dtype == x.dtype or torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    def extra_repr(self) -> str:
        """One line for `print(model)`."""
        return f"{self.grid}, scale={float(self.scale):.6g}, mode={self.mode.value}"


class WeightFakeQuantize(nn.Module):
    """Rounds a weight tensor to a symmetric grid with one scale per output channel, or one for the whole tensor.

    Args:
        channels: Number of output channels; 1 for one scale, as FP8 weights have it (see `quantize_layer`).
        axis: Axis of the output channels in the weight (0 for convolutions and linear layers, 1 for transposed).
        grid: The codes.
        learned: Whether fine-tuning may move the scales. Otherwise they follow the weights: each channel's
            scale keeps its calibrated proportion to the channel's largest weight.
    """

    proportion: Tensor

    def __init__(self, channels: int, axis: int = 0, grid: Grid = INT8_WEIGHTS, learned: bool = True) -> None:
        super().__init__()
        self.axis = axis
        self.grid = grid
        self.learned = learned
        self.mode = Mode.OFF
        self.log_scale = nn.Parameter(torch.zeros(channels), requires_grad=learned)
        self.register_buffer("proportion", torch.ones(channels))
        self._kept: tuple[tuple[int, ...], tuple[Tensor, ...], tuple[Tensor, Tensor]] | None = None

    def train(self, mode: bool = True) -> WeightFakeQuantize:
        """Change the mode; training drops the codes that evaluation has kept."""
        if mode:
            self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a file of the module holds: all but the kept codes."""
        return {**self.__dict__, "_kept": None}

    @property
    def scale(self) -> Tensor:
        """Positive steps, shape [channels], without gradient."""
        return self.log_scale.detach().exp().clamp(MIN_SCALE, MAX_SCALE)

    def steps(self, ndim: int) -> Tensor:
        """The steps, without gradient, in a shape that broadcasts over a weight of `ndim` axes."""
        return _broadcast(self.scale, self.axis, ndim)

    def set_scale(self, scale: Tensor, weight: Tensor) -> None:
        """Set the steps, shape [channels], and remember their proportion to the weight's amax."""
        with torch.no_grad():
            self.log_scale.copy_(_log_of(scale.double()))
            proportion = self.scale / self.amax_scale(weight)
            self.proportion.copy_(torch.where(self._dead(weight), 1.0, proportion))

    def amax_scale(self, weight: Tensor) -> Tensor:
        """Steps that put each channel's largest magnitude on the highest code, shape [channels]; 1 if all are 0."""
        step = self._amax(weight) / self.grid.high
        return torch.where(self._dead(weight), 1.0, step.clamp(MIN_SCALE, MAX_SCALE))

    def _amax(self, weight: Tensor) -> Tensor:
        magnitudes = weight.detach().float().abs()
        if self.log_scale.numel() == 1:
            return magnitudes.amax().reshape(1)
        return magnitudes.amax([d for d in range(weight.ndim) if d != self.axis])

    def _dead(self, weight: Tensor) -> Tensor:
        """Channels without a usable weight: any proportion to them would be noise once they come alive."""
        return self._amax(weight) <= MIN_SCALE * self.grid.high

    def follow(self, weight: Tensor) -> None:
        """Move scales that are not learned to where the weights have gone."""
        with torch.no_grad():
            self.log_scale.copy_(_log_of((self.amax_scale(weight) * self.proportion).double()))

    def before_rounding(self, weight: Tensor) -> None:
        """Bring the scales to where they are to be, and drop codes of weights that an optimizer may have moved."""
        if torch.is_grad_enabled():
            self._kept = None
        if self.training and not self.learned and self.mode is Mode.QUANTIZE:
            self.follow(weight)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight itself unless the mode is quantize."""
        self.before_rounding(weight)
        if self.mode is not Mode.QUANTIZE:
            return weight
        if torch.onnx.is_in_onnx_export():
            # The exporter knows the full signed range only; after clipping, no code falls on the lowest.
            scale = torch.tensor(self.scale.tolist(), device=weight.device)  # a constant in the file
            if self.grid.is_fp8:
                if scale.numel() == 1:
                    scale = scale.reshape(())
                return _ExportFP8.apply(weight, scale, self.axis, self.grid)  # type: ignore[no-any-return]
            zero_point = torch.zeros(scale.shape, dtype=torch.int32, device=weight.device)
            limit = _broadcast(scale * self.grid.high, self.axis, weight.ndim)
            clipped = weight.clamp(-limit, limit)
            return torch.fake_quantize_per_channel_affine(
                clipped, scale, zero_point, self.axis, self.grid.low - 1, self.grid.high
            )
        w = weight.float()
        y = _FakeQuantizeChannel.apply(w, self.log_scale, self.steps(w.ndim), self.grid)
        return y.to(weight.dtype)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of the weight, float32 [its shape], and the steps [channels], both without gradient.

        Outside of training they are kept until the weight or the scales change. A change is seen by the version
        counters of the two tensors and by their place in memory. Fused optimizers do not count, so that a forward
        pass with gradients drops the codes, too. In evaluation, a change through `.data` is not seen.
        """
        if self.training or weight.is_inference() or self.log_scale.is_inference():
            return self._codes(weight)
        tensors = (weight, self.log_scale)
        state = tuple(number for tensor in tensors for number in (tensor.data_ptr(), tensor._version))
        if self._kept is None or self._kept[0] != state:
            # holding on to the two tensors keeps their memory from being given to others
            self._kept = state, tuple(tensor.detach() for tensor in tensors), self._codes(weight)
        return self._kept[2]

    def _codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        values = self(weight)  # first: it may move the scale
        return self.grid.codes(values, self.steps(weight.ndim)), self.scale

    def extra_repr(self) -> str:
        """One line for `print(model)`."""
        return f"channels={self.log_scale.numel()}, {self.grid}, mode={self.mode.value}"


@torch.no_grad()
def scales_of(*quantizers: FakeQuantize | WeightFakeQuantize) -> tuple[Tensor, ...]:
    """The `scale` of each quantizer, in fewer calls."""
    scales = torch._foreach_exp([quantizer.log_scale for quantizer in quantizers])
    torch._foreach_clamp_min_(scales, MIN_SCALE)
    torch._foreach_clamp_max_(scales, MAX_SCALE)
    return tuple(scales)


def _log_of(scale: Tensor) -> Tensor:
    if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
        raise ValueError(
            f"scale {scale.flatten()[:4].tolist()} is not positive and finite: calibrate again on real images"
        )
    return scale.clamp(MIN_SCALE, MAX_SCALE).log()
