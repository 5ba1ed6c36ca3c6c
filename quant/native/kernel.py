"""Which form of fake quantization is used, and the calls into the native one.

The native form takes dense tensors of float32 and bfloat16 on a CPU; everything else is torch's operators
(quant/rounding.py), and so is all of it where the kernel cannot be built. Both give the same bits, but for the
gradients of scales, and of biases under autocast, whose sums have another order here, and are in double but for the
first few values. SiLU before a quantizer is computed with it (quant/fusing.py) where torch's vector code for the
processor gives the same bits; the last values of a tensor torch computes one by one, with another exponential.
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.choices import AUTO, NATIVE, TORCH
from core.errors import KernelError
from core.grid import Grid
from quant.native.building import load_library

log = logging.getLogger(__name__)
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}  # as the C file numbers them
_CLASSES = (Tensor, nn.Parameter)
POINTER, INT, SIZE, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_choice = AUTO


def choose_kernel(choice: str) -> None:
    """Choose the form of fake quantization for this process.

    Args:
        choice: `auto` (native where it can be had), `native`, or `torch`.

    Raises:
        KernelError: `native` cannot be had here.
    """
    global _choice
    if choice == NATIVE:
        _loaded()
    _choice = choice


def is_chosen() -> bool:
    """Whether native code is to be used where it can be had."""
    return _choice != TORCH


def describe_kernel() -> str:
    """The form that tensors on a CPU get, with the reason where it is not the native one."""
    if _choice == TORCH:
        return "torch operators"
    try:
        _loaded()
    except KernelError as error:
        return f"torch operators ({error})"
    return "native kernel"


def kernel_for(scale: Tensor, *tensors: Tensor) -> Kernel | None:
    """The native form for tensors; None where torch's operators are to be used.

    Args:
        scale: float32, a scalar or of shape [1, .., C, .., 1]; then the axis of C is the outermost in memory.
        tensors: the last one is fresh from `torch.empty_like`, whose strides are those of its model if that is dense.
    """
    if not _reads(scale, *tensors):
        return None
    if scale.ndim > 0 and scale.numel() > 1:
        last = tensors[-1]
        axis = max(range(scale.ndim), key=scale.shape.__getitem__)
        if scale.ndim != last.ndim or scale.numel() != last.shape[axis]:
            return None
        if last.stride(axis) * last.shape[axis] != last.numel():
            return None
    return _available()


def weights_kernel() -> Kernel | None:
    """The native form for `round_each`; None where torch's operators are to be used."""
    return None if _choice == TORCH or torch.compiler.is_compiling() else _available()


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is contiguous or channels-last."""
    return tensor.is_contiguous() or (
        tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def in_layout_of(x: Tensor, gradient: Tensor) -> Tensor:
    """A gradient with the strides of x, copied only where it has others."""
    if gradient.stride() == x.stride():
        return gradient
    return torch.empty_like(x, dtype=gradient.dtype).copy_(gradient)


def is_in_rows(tensor: Tensor, axis: int | None) -> bool:
    """Whether a tensor is float32 on a CPU, dense, with an axis outermost in memory; None for any."""
    if not tensor.is_cpu or tensor.dtype != torch.float32 or type(tensor) not in _CLASSES:
        return False
    if not tensor.numel() or not is_dense(tensor):
        return False
    return axis is None or tensor.stride(axis) * tensor.shape[axis] == tensor.numel()


def affine_kernel_for(steps: Tensor, bias: Tensor, *tensors: Tensor) -> Kernel | None:
    """The native form for `quant.rounding.affine`; tensors as for `kernel_for`, with channels on any axis."""
    is_read = bias.dtype == torch.float32 and bias.is_contiguous() and _reads(steps, *tensors)
    return _available() if is_read else None


def _reads(scale: Tensor, *tensors: Tensor) -> bool:
    """Whether the kernel reads the tensors: dense, of one layout, of its types, on a CPU."""
    if _choice == TORCH or not tensors[-1].numel():
        return False
    if scale.dtype != torch.float32 or not scale.is_contiguous():
        return False
    strides = tensors[-1].stride()
    for tensor in tensors:
        if (
            not tensor.is_cpu
            or tensor.dtype not in TYPES
            or type(tensor) not in _CLASSES
            or tensor.stride() != strides
        ):
            return False
    return not torch.compiler.is_compiling()


@cache
def _loaded() -> Kernel:
    return Kernel(load_library())


@cache
def _available() -> Kernel | None:
    """The kernel; None, with a line in the log, where it cannot be had."""
    log.info("fake quantization: %s", describe_kernel())
    try:
        return _loaded()
    except KernelError:
        return None


class Kernel:
    """The functions of the C file on dense tensors of one shape and layout; results go into their last tensor.

    Scales are contiguous.

    Args:
        library: from `load_library`.

    Raises:
        KernelError: its results are not those of torch's operators.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._round, self._gradients = library.octet_round, library.octet_gradients
        self._round_each, self._gradients_each = library.octet_round_each, library.octet_gradients_each
        self._codes, self._scaled = library.octet_codes, library.octet_scaled
        self._affine, self._affine_gradients = library.octet_affine, library.octet_affine_gradients
        rows, channels = [SIZE] * 2, [SIZE] * 3
        self._round.argtypes = [POINTER, INT, *[POINTER] * 2, *rows, POINTER, *[FLOAT] * 2, INT]
        self._gradients.argtypes = [
            POINTER, POINTER, INT, INT, POINTER, *rows, POINTER, *[FLOAT] * 4, POINTER, INT
        ]  # fmt: skip
        self._round_each.argtypes = [SIZE, *[POINTER] * 5, *[FLOAT] * 2, INT]
        self._gradients_each.argtypes = [SIZE, *[POINTER] * 6, *[FLOAT] * 4, POINTER, INT]
        self._codes.argtypes = [POINTER, POINTER, INT, *rows, POINTER, FLOAT, INT]
        self._scaled.argtypes = [POINTER, INT, POINTER, *rows, POINTER, INT]
        self._affine.argtypes = [POINTER, INT, POINTER, *channels, *[POINTER] * 2, INT]
        self._affine_gradients.argtypes = [POINTER, POINTER, INT, *channels, *[POINTER] * 2, INT]
        for name in vars(self).values():
            name.restype = None
        self._check()
        self.computes_silu = bool(library.octet_has_silu()) and self._agrees_on_silu()

    def round(self, x: Tensor, scale: Tensor, grid: Grid, y: Tensor, codes: Tensor | None = None) -> None:
        """`quant.rounding.round_to_grid`; with `codes`, which get the codes, `quant.rounding.silu_to_grid`."""
        self._round(
            x.data_ptr(), TYPES[x.dtype], y.data_ptr(), None if codes is None else codes.data_ptr(),
            *_rows(scale, x), scale.data_ptr(), grid.low, grid.high, torch.get_num_threads(),
        )  # fmt: skip

    def gradients(
        self,
        g: Tensor,
        x: Tensor,
        scale: Tensor,
        grid: Grid,
        bounds: tuple[float, float],
        learned: bool,
        grad_x: Tensor,
        of_silu: bool = False,
    ) -> Tensor | None:
        """`quant.rounding.gradients`, or `silu_gradients`; returns the gradient for the logarithm of the scale."""
        sums = torch.empty_like(scale) if learned else None
        self._gradients(
            g.data_ptr(), x.data_ptr(), TYPES[x.dtype], of_silu, grad_x.data_ptr(), *_rows(scale, x),
            scale.data_ptr(), grid.low, grid.high, *bounds,
            None if sums is None else sums.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return sums

    def round_each(
        self, x: Sequence[Tensor], scales: Sequence[Tensor], grid: Grid, y: Sequence[Tensor]
    ) -> None:
        """`round` for float32 tensors with rows (`is_in_rows`), each with the scales of its rows."""
        self._round_each(
            len(x), _pointers(x), _pointers(y), *_all_rows(scales, x), _pointers(scales), grid.low, grid.high,
            torch.get_num_threads(),
        )  # fmt: skip

    def gradients_each(
        self,
        g: Sequence[Tensor],
        x: Sequence[Tensor],
        scales: Sequence[Tensor],
        grid: Grid,
        bounds: tuple[float, float],
        grad_x: Sequence[Tensor],
        sums: Sequence[Tensor | None],
    ) -> None:
        """`gradients` for such tensors; sums [rows] get the gradients for the logarithms of the scales."""
        self._gradients_each(
            len(x), _pointers(g), _pointers(x), _pointers(grad_x), *_all_rows(scales, x), _pointers(scales),
            grid.low, grid.high, *bounds, _pointers(sums), torch.get_num_threads(),
        )  # fmt: skip

    def codes(self, values: Tensor, scale: Tensor, unit: float, codes: Tensor) -> None:
        """`quant.rounding.codes_of`."""
        self._codes(
            values.data_ptr(), codes.data_ptr(), TYPES[codes.dtype], *_rows(scale, values), scale.data_ptr(), unit,
            torch.get_num_threads(),
        )  # fmt: skip

    def scaled(self, codes: Tensor, scale: Tensor, values: Tensor) -> None:
        """`quant.rounding.scaled`."""
        self._scaled(
            codes.data_ptr(), TYPES[codes.dtype], values.data_ptr(), *_rows(scale, codes), scale.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip

    def affine(self, sums: Tensor, steps: Tensor, bias: Tensor, axis: int, values: Tensor) -> None:
        """`quant.rounding.affine`."""
        self._affine(
            sums.data_ptr(), TYPES[sums.dtype], values.data_ptr(), *_channels(sums, axis), steps.data_ptr(),
            bias.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip

    def affine_gradients(self, g: Tensor, steps: Tensor, axis: int, grad_sums: Tensor) -> Tensor:
        """The gradients of `quant.rounding.affine`; returns that for the bias."""
        grad_bias = torch.empty_like(steps)
        self._affine_gradients(
            g.data_ptr(), grad_sums.data_ptr(), TYPES[grad_sums.dtype], *_channels(g, axis), steps.data_ptr(),
            grad_bias.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return grad_bias

    def _check(self) -> None:
        """Compare one result with torch's: this detects a compiler with options that change floating-point results."""
        scale = torch.tensor(0.0173)
        x = torch.arange(-400, 401) * (scale / 2)  # on codes, and half way between them
        y = torch.empty_like(x)
        self.round(x, scale, Grid(), y)
        if not torch.equal(y, (x * scale.reciprocal()).round_().clamp_(-128, 127).mul_(scale)):
            raise KernelError(
                "the native kernel does not give the results of torch's operators: remove options such as -ffast-math "
                "from CC, or use quant.kernel=auto"
            )

    def _agrees_on_silu(self) -> bool:
        """Whether SiLU and its gradient are those of torch's vector code, which differs by processor, bit for bit."""
        x, g = torch.linspace(-110, 110, 4096), torch.linspace(-1, 1, 4096)
        scale, grid = torch.tensor(0.01), Grid()
        y, expected, grad_x = (torch.empty_like(x) for _ in range(3))
        self.round(x, scale, grid, y, torch.empty_like(x, dtype=torch.int8))
        self.round(F.silu(x), scale, grid, expected)
        self.gradients(g, x, scale, grid, (-math.inf, math.inf), False, grad_x, of_silu=True)
        return torch.equal(y, expected) and torch.equal(grad_x, torch.ops.aten.silu_backward(g, x))


def _rows(scale: Tensor, x: Tensor) -> tuple[int, int]:
    """Number of rows with one scale each, and values in a row."""
    return scale.numel(), x.numel() // scale.numel()


def _all_rows(scales: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Any, Any]:
    """Numbers of rows and values in a row, of several tensors."""
    rows = [scale.numel() for scale in scales]
    widths = [tensor.numel() // count for tensor, count in zip(x, rows, strict=True)]
    return (SIZE * len(rows))(*rows), (SIZE * len(rows))(*widths)


def _pointers(tensors: Sequence[Tensor | None]) -> Any:
    """Where the values of several tensors lie; NULL for None."""
    return (POINTER * len(tensors))(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))


def _channels(x: Tensor, axis: int) -> tuple[int, int, int]:
    """A dense tensor in the order of memory as [outer, channels, inner]."""
    channels = x.shape[axis]
    inner = x.stride(axis) if channels > 1 else 1
    return x.numel() // (channels * inner), channels, inner
