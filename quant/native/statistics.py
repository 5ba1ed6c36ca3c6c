"""What calibration and sensitivity ask of tensors on a CPU, in C; None where torch's operators are to be used."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import KernelError
from core.grid import Grid
from quant.native.building import GRADIENTS, STATISTICS, load_library
from quant.native.kernel import FLOAT, INT, POINTER, SIZE, TYPES, in_layout_of, is_chosen, is_dense

_COUNTED = (torch.float32, torch.bfloat16)
_NUM_BINS, _NO_MEMORY = 4096, -(2**31)  # as in the C file
_FUNCTIONS: dict[Path, dict[str, tuple[Any, list[Any]]]] = {  # results and arguments
    STATISTICS: {
        "octet_count": (INT, [POINTER, INT, SIZE, INT, *[POINTER] * 3, INT]),
        "octet_changes": (None, [POINTER, POINTER, *[SIZE] * 7, *[FLOAT] * 3, POINTER, INT]),
    },
    GRADIENTS: {
        "octet_silu_changes": (None, [*[POINTER] * 3, *[SIZE] * 2, *[FLOAT] * 3, POINTER, INT]),
        "octet_weights": (None, [*[POINTER] * 3, SIZE, POINTER, INT, POINTER, INT]),
    },
}


def count_magnitudes(values: Tensor, exponent: int, num_bins: int) -> tuple[Tensor, int, float, int] | None:
    """Counts of magnitudes in equal bins of [0, 2 ** exponent), in one pass.

    Values of 2 ** 90 and more, and NaN, are left out.

    Args:
        values: flat, contiguous.
        exponent: of the range, to begin with; it grows to hold all values above 2 ** -60.
        num_bins: 4096, for which the kernel is written.

    Returns:
        Counts, int64 [num_bins]; the exponent; the largest magnitude; the number of values left out.
    """
    library = (
        _library(STATISTICS) if values.is_cpu and values.dtype in _COUNTED and num_bins == _NUM_BINS else None
    )
    if library is None:
        return None
    counts = torch.zeros(num_bins, dtype=torch.int64)
    largest, num_ignored = ctypes.c_float(), ctypes.c_int64()
    exponent = library.octet_count(
        values.data_ptr(), TYPES[values.dtype], values.numel(), exponent, counts.data_ptr(),
        ctypes.byref(largest), ctypes.byref(num_ignored), torch.get_num_threads(),
    )  # fmt: skip
    if exponent == _NO_MEMORY:
        return None
    return counts, exponent, largest.value, num_ignored.value


def squared_changes(x: Tensor, gradient: Tensor, scale: float, grid: Grid) -> Tensor | None:
    """Sum over each image of (gradient * (Q(x) - x))^2, float32 [B], where Q rounds to a grid with one scale.

    Args:
        x: [B, ...].
        gradient: of the same shape.
        scale: of the grid.
        grid: the codes.
    """
    library = _library(STATISTICS) if _are_read(x, gradient) else None
    runs = None if library is None or grid.is_fp8 else _runs((x, gradient))
    if library is None or runs is None:
        return None
    (outer, inner), distances = runs
    sums = torch.empty(len(x))
    library.octet_changes(
        x.data_ptr(), gradient.data_ptr(), len(x), outer, inner, x.stride(0), distances[0],
        gradient.stride(0), distances[1], scale, grid.low, grid.high, sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return sums


def silu_gradient_and_changes(
    y: Tensor, gradient: Tensor, scale: float, grid: Grid
) -> tuple[Tensor, Tensor] | None:
    """The gradient for the input of a SiLU, and the sums of `squared_changes` for its output, in one pass.

    Args:
        y: input of the SiLU, [B, ...].
        gradient: of the loss for its output.
        scale: of the grid that the output is rounded to.
        grid: the codes.

    Returns:
        Gradient, of the shape and layout of y; sums, float32 [B]. None where y has neither of torch's two layouts, too.
    """
    library = _library(GRADIENTS) if _are_read(y, gradient) else None
    if library is None or grid.is_fp8 or not is_dense(y):
        return None
    gradient = in_layout_of(y, gradient)
    result, sums = torch.empty_like(y), torch.empty(len(y))
    library.octet_silu_changes(
        y.data_ptr(), gradient.data_ptr(), result.data_ptr(), len(y), y[0].numel(), scale, grid.low, grid.high,
        sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return result, sums


def squared_weight_changes(
    x: Tensor,
    gradient: Tensor,
    error: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    products: torch.dtype = torch.float32,
) -> Tensor | None:
    """Sum over each image of (dW * error)^2, float32 [B], where dW is the gradient for a convolution's weight.

    Args:
        x: inputs, [B, C, H, W].
        gradient: of the loss for the outputs, [B, O, h, w].
        error: of the weight, [O, height, width, C], contiguous: channels last.
        stride: of the convolution.
        padding: with zeros, on both sides.
        products: bfloat16 rounds x and gradient to that type before they are multiplied, where the processor
            multiplies it and each value of x has at least 48 products (outputs times height of the kernel). Sums are
            float32.
    """
    library = _library(GRADIENTS) if _are_read(x, gradient) else None
    if library is None or not error.is_contiguous():
        return None
    shape = (
        *x.shape[1:],
        *gradient.shape[1:],
        *error.shape[1:3],
        *stride,
        *padding,
        *x.stride(),
        *gradient.stride(),
    )
    sums = torch.empty(len(x))
    library.octet_weights(
        x.data_ptr(), gradient.data_ptr(), error.data_ptr(), len(x), (SIZE * len(shape))(*shape),
        products == torch.bfloat16, sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return sums


def _are_read(*tensors: Tensor) -> bool:
    return all(t.is_cpu and t.dtype == torch.float32 and t.numel() for t in tensors)


def _runs(tensors: Sequence[Tensor]) -> tuple[tuple[int, int], list[int]] | None:
    """How the images of tensors of one shape lie in memory.

    Returns:
        Number of runs of an image and values in a run, and the distance of two runs in each tensor. None where the
        values of some tensor lie in another order.
    """
    first = tensors[0]
    dims = [d for d in range(1, first.ndim) if first.shape[d] > 1]
    dims.sort(key=first.stride)
    inner = 1
    while dims and all(tensor.stride(dims[0]) == inner for tensor in tensors):
        inner *= first.shape[dims.pop(0)]
    if not dims:
        return (1, inner), [inner] * len(tensors)
    outer = 1
    steps = [tensor.stride(dims[0]) for tensor in tensors]
    for d in dims:
        if any(tensor.stride(d) != step * outer for tensor, step in zip(tensors, steps, strict=True)):
            return None
        outer *= first.shape[d]
    return (outer, inner), steps


def _library(source: Path) -> ctypes.CDLL | None:
    return _loaded(source) if is_chosen() else None


@cache
def _loaded(source: Path) -> ctypes.CDLL | None:
    """The library of a C file; None where it cannot be had."""
    try:
        library = load_library(source, ("-ffp-contract=fast",))
    except KernelError:
        return None
    for name, (result, arguments) in _FUNCTIONS[source].items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
