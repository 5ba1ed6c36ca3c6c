"""The arithmetic of fake quantization: rounding to a grid, and the gradients for the values and the scale.

For x quantized to y = s * clamp(round(x / s), lo, hi), with m = 1 where round(x / s) stays inside [lo, hi] and 0
elsewhere, LSQ (arXiv:1902.08153, equation 3) says

    dy/ds = round(x/s) - x/s   where m = 1,    lo or hi   elsewhere,

so s * dy/ds = y - m * x everywhere, and for a loss L with g = dL/dy

    dL/dx     = m * g                        (straight-through, clipped)
    dL/dlog s = sum(g * (y - m * x)).

The difference y - m * x is taken value by value, before the sum: <g, y> and <m * g, x> can each be a thousand times as
large as what is left of them, and float32 then loses the gradient of a scale whose values and gradients have a mean.

An operator of torch on a large tensor costs what its way through memory costs, and torch's `fake_quantize_*` operators
cost several times that. So on CPUs each function with one scale is one pass in C (quant/native). Where that cannot be
had, values are taken in pieces that stay in a processor's cache, and each piece is multiplied, rounded, clamped and
multiplied in place. Nothing but x is kept for the backward pass, which computes y and m again. Results have the memory
layout of x.

SiLU(x), which torch computes in two passes of its own, forward and backward, costs little more in these passes than
there: it is bound by arithmetic. Of x, SiLU(x) and y only x and the codes of y, one byte each, are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from core.grid import Grid
from quant.native.kernel import Kernel, affine_kernel_for, in_layout_of, is_dense, kernel_for

PIECE = 1 << 18  # values for each thread: 1 MiB of float32

_zero_outside = torch.ops.aten.hardtanh_backward  # first argument where low < second < high, 0 elsewhere


def round_to_grid(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The values of the grid that are closest to x, float32; `scale` is a scalar or broadcasts over x."""
    if grid.is_fp8:
        return grid.round(x.float(), scale)
    y = torch.empty_like(x, dtype=torch.float32)
    if kernel := kernel_for(scale, x, y):
        kernel.round(x, scale, grid, y)
        return y
    inverse = scale.reciprocal()
    for source, result in _pieces((x, y)) if scale.ndim == 0 else [(x, y)]:
        _scaled_into(result, source, inverse).round_().clamp_(grid.low, grid.high).mul_(scale)
    return y


def codes_of(values: Tensor, scale: Tensor, unit: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes of float32 values that lie on a grid, times a power of two, in a type that holds them exactly."""
    codes = torch.empty_like(values, dtype=dtype)
    if values.dtype == torch.float32 and (kernel := kernel_for(scale, values, codes)):
        kernel.codes(values, scale, unit, codes)
        return codes
    inverse = scale.reciprocal()
    for source, result in _pieces((values, codes)) if scale.ndim == 0 else [(values, codes)]:
        exact = result if dtype == torch.float32 else torch.empty_like(source, dtype=torch.float32)
        _scaled_into(exact, source, inverse).round_()
        if unit != 1.0:
            exact.mul_(unit)
        if exact is not result:
            result.copy_(exact)
    return codes


def scaled(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes or gradients of any type times a scale, float32; for codes these are the values of their grid."""
    values = torch.empty_like(codes, dtype=torch.float32)
    if kernel := kernel_for(scale, codes, values):
        kernel.scaled(codes, scale, values)
        return values
    for source, result in _pieces((codes, values)) if scale.ndim == 0 else [(codes, values)]:
        _scaled_into(result, source, scale)
    return values


def silu_kernel(x: Tensor, scale: Tensor) -> Kernel | None:
    """The native form where it takes SiLU of such values on its way, so that one pass over memory is saved."""
    kernel = kernel_for(scale, x) if is_dense(x) else None
    return kernel if kernel and kernel.computes_silu else None


def silu_to_grid(x: Tensor, scale: Tensor, grid: Grid, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """The values of an integer grid that are closest to SiLU(x), float32, and their codes, int8 or uint8.

    Args:
        x: float32 or bfloat16.
        scale: the scale, a scalar.
        grid: the codes.
        kernel: from `silu_kernel`.
    """
    y = torch.empty_like(x, dtype=torch.float32)
    codes = torch.empty_like(x, dtype=torch.int8 if grid.signed else torch.uint8)
    kernel.round(x, scale, grid, y, codes)
    return y, codes


def silu_gradients(
    g: Tensor, x: Tensor, scale: Tensor, grid: Grid, learned: bool, kernel: Kernel
) -> tuple[Tensor, Tensor | None]:
    """As `gradients`, where `silu_to_grid` has rounded SiLU(x) with the same kernel."""
    g, grad_x, bounds = in_layout_of(x, g), torch.empty_like(x), open_bounds(grid.low, grid.high)
    return grad_x, kernel.gradients(g, x, scale, grid, bounds, learned, grad_x, of_silu=True)


def gradients(g: Tensor, x: Tensor, scale: Tensor, grid: Grid, learned: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients for x, in its type, and for the logarithm of its one scale (None unless learned).

    Args:
        g: gradient of the loss for the result of `round_to_grid`, float32.
        x: what was rounded, float32 or the type of autocast.
        scale: the scale, a scalar.
        grid: the codes.
        learned: whether the second gradient is needed.
    """
    g = in_layout_of(x, g)
    if grid.is_fp8:
        grad_x, exact = _inside_fp8(g, x, scale, grid), x.float()
        rest = grid.round(exact, scale).sub_(_inside_fp8(exact, x, scale, grid)) if learned else None
        return grad_x.to(x.dtype), None if rest is None else (g * rest).sum()
    if x.dtype == torch.float16 and x.device.type == "cpu":  # a type that the kernel does not read
        grad_x, grad_log_scale = gradients(g, x.float(), scale, grid, learned)
        return grad_x.to(x.dtype), grad_log_scale
    grad_x, (low, high) = torch.empty_like(x), open_bounds(grid.low, grid.high)
    if g.dtype == torch.float32 and (kernel := kernel_for(scale, g, x, grad_x)):
        return grad_x, kernel.gradients(g, x, scale, grid, (low, high), learned, grad_x)
    inverse = scale.reciprocal()
    sums, scratch = [], _Scratch()
    for source, along, result in _pieces((x, g, grad_x)):
        u, inside = scratch.like(source)
        _scaled_into(u, source, inverse)
        if result.dtype == torch.float32:
            _zero_outside.grad_input(along, u, low, high, grad_input=result)
        else:
            result.copy_(_zero_outside.grad_input(along, u, low, high, grad_input=inside))
        if learned:
            exact = source if source.dtype == torch.float32 else inside.copy_(source)
            _zero_outside.grad_input(exact, u, low, high, grad_input=inside)
            u.round_().clamp_(grid.low, grid.high).mul_(scale).sub_(inside)
            sums.append(torch.dot(along, u) if u.ndim == 1 else u.mul_(along).sum())
    if len(sums) > 1:
        return grad_x, torch.stack(sums).double().sum().float()
    return grad_x, sums[0] if learned else None


def affine(sums: Tensor, steps: Tensor, bias: Tensor, axis: int, values: Tensor | None = None) -> Tensor:
    """The values sums * steps + bias, float32.

    Args:
        sums: of any type.
        steps: float32, of the channels.
        bias: float32, of the channels.
        axis: of the channels.
        values: where the result goes, may be `sums`; None makes a tensor.
    """
    values = torch.empty_like(sums, dtype=torch.float32) if values is None else values
    if kernel := affine_kernel_for(steps, bias, sums, values):
        kernel.affine(sums, steps, bias, axis, values)
        return values
    shape = [-1 if d == axis else 1 for d in range(sums.ndim)]
    return values.copy_(sums).mul_(steps.view(shape)).add_(bias.view(shape))


def affine_gradients(g: Tensor, steps: Tensor, axis: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of `affine` for sums of a type, in the layout of g, and for the bias.

    Args:
        g: gradient of the loss for the result, float32.
        steps: float32, of the channels.
        axis: of the channels.
        dtype: of the sums.
    """
    grad_sums = torch.empty_like(g, dtype=dtype)
    if kernel := affine_kernel_for(steps, steps, g, grad_sums):
        return grad_sums, kernel.affine_gradients(g, steps, axis, grad_sums)
    shape = [-1 if d == axis else 1 for d in range(g.ndim)]
    grad_bias = g.sum([d for d in range(g.ndim) if d != axis])
    return grad_sums.copy_(g * steps.view(shape)), grad_bias


def channel_gradients(
    g: Tensor, x: Tensor, scale: Tensor, grid: Grid, learned: bool
) -> tuple[Tensor, Tensor | None]:
    """The same for scales of channels, which broadcast over x; the second gradient has the shape of `scale`."""
    if grid.is_fp8:
        grad_x = _inside_fp8(g, x, scale, grid)
        inside = _inside_fp8(x, x, scale, grid) if learned else x
        y = grid.round(x, scale) if learned else x
    else:
        low, high = open_bounds(grid.low, grid.high)
        result = torch.empty_like(x)
        g = in_layout_of(result, g)
        if kernel := kernel_for(scale, g, x, result):
            return result, kernel.gradients(g, x, scale, grid, (low, high), learned, result)
        u = x * scale.reciprocal()
        grad_x = _zero_outside(g, u, low, high)
        inside = _zero_outside(x, u, low, high) if learned else x
        y = u.round_().clamp_(grid.low, grid.high).mul_(scale) if learned else x
    return grad_x, y.sub_(inside).mul_(g).sum_to_size(scale.shape) if learned else None


def _scaled_into(result: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """The float32 tensor `result`, filled with x * factor; x of another type is made float32 first."""
    if x.dtype == torch.float32:
        return torch.mul(x, factor, out=result)
    return result.copy_(x).mul_(factor)


def _inside_fp8(values: Tensor, x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Values where x is inside an FP8 grid, 0 elsewhere."""
    return values * (x.abs() <= scale * grid.high)


@cache
def open_bounds(low: int, high: int) -> tuple[float, float]:
    """The float32 numbers between which, without them, lie all that round to codes low..high; halves go to even."""
    below, above = torch.tensor(low - 0.5), torch.tensor(high + 0.5)
    if low % 2 == 0:
        below = torch.nextafter(below, torch.tensor(-math.inf))
    if high % 2 == 0:
        above = torch.nextafter(above, torch.tensor(math.inf))
    return float(below), float(above)


class _Scratch:
    """Two buffers that all pieces of a tensor use."""

    def __init__(self) -> None:
        self.buffers: tuple[Tensor, Tensor] | None = None

    def like(self, piece: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers in the shape of a piece; the first piece is the largest."""
        if self.buffers is None:
            first, second = (torch.empty_like(piece, dtype=torch.float32) for _ in range(2))
            self.buffers = first, second
        first, second = self.buffers
        if first.shape == piece.shape:
            return first, second
        return first[: len(piece)], second[: len(piece)]


def _pieces(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one layout cut into flat pieces; whole on a GPU, or where they are not dense."""
    x = tensors[0]
    size = PIECE * torch.get_num_threads()
    flat = _flattened(tensors)
    if flat is None or x.device.type != "cpu" or x.numel() <= size:
        yield tuple(flat or tensors)
        return
    yield from zip(*(tensor.split(size) for tensor in flat), strict=True)


def _flattened(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """Flat views in the order of memory; None where the tensors are neither contiguous nor channels-last."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(-1) for tensor in tensors]
    for layout, order in ((torch.channels_last, (0, 2, 3, 1)), (torch.channels_last_3d, (0, 2, 3, 4, 1))):
        if all(t.ndim == len(order) and t.is_contiguous(memory_format=layout) for t in tensors):
            return [tensor.permute(order).view(-1) for tensor in tensors]
    return None
