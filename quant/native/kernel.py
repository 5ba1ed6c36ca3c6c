"""Which form of fake quantization is used, and the calls into the native one.

The native form takes dense tensors of float32 and bfloat16 on a CPU; everything else is torch's operators
(quant/rounding.py), and so is all of it where the kernel cannot be built. Both give the same bits, but for the
gradients of scales: their sums are in double here.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache

import torch
from torch import Tensor, nn

from core.choices import AUTO, NATIVE, TORCH
from core.errors import KernelError
from core.grid import Grid
from quant.native.building import load_library

log = logging.getLogger(__name__)
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}  # as the C file numbers them
_POINTER, _INT, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
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
    """The native form for tensors with one scale; None where torch's operators are to be used.

    Args:
        scale: float32 scalar.
        tensors: the last one is fresh from `torch.empty_like`, whose strides are those of its model if that is dense.
    """
    if _choice == TORCH or scale.ndim > 0 or scale.dtype != torch.float32:
        return None
    strides = tensors[-1].stride()
    for tensor in tensors:
        if (
            tensor.device.type != "cpu"
            or tensor.dtype not in _TYPES
            or type(tensor) not in (Tensor, nn.Parameter)
            or tensor.stride() != strides
        ):
            return None
    return None if torch.compiler.is_compiling() else _available()


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

    Args:
        library: from `load_library`.

    Raises:
        KernelError: its results are not those of torch's operators.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._round, self._gradients = library.octet_round, library.octet_gradients
        self._codes, self._scaled = library.octet_codes, library.octet_scaled
        self._round.argtypes = [_POINTER, _INT, _POINTER, _SIZE, *[_FLOAT] * 4, _INT]
        self._gradients.argtypes = [_POINTER, _POINTER, _INT, _POINTER, _SIZE, *[_FLOAT] * 6, _INT, _INT]
        self._codes.argtypes = [_POINTER, _POINTER, _INT, _SIZE, _FLOAT, _FLOAT, _INT]
        self._scaled.argtypes = [_POINTER, _INT, _POINTER, _SIZE, _FLOAT, _INT]
        self._round.restype = self._codes.restype = self._scaled.restype = None
        self._gradients.restype = _FLOAT
        self._check()

    def round(self, x: Tensor, scale: Tensor, grid: Grid, y: Tensor) -> None:
        """`quant.rounding.round_to_grid`."""
        self._round(
            x.data_ptr(), _TYPES[x.dtype], y.data_ptr(), x.numel(),
            float(scale.reciprocal()), float(scale), grid.low, grid.high, torch.get_num_threads(),
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
    ) -> Tensor | None:
        """`quant.rounding.gradients`; returns the gradient for the logarithm of the scale."""
        sum_ = self._gradients(
            g.data_ptr(), x.data_ptr(), _TYPES[x.dtype], grad_x.data_ptr(), x.numel(),
            float(scale.reciprocal()), float(scale), grid.low, grid.high, *bounds, learned, torch.get_num_threads(),
        )  # fmt: skip
        return torch.tensor(sum_, dtype=torch.float32) if learned else None

    def codes(self, values: Tensor, scale: Tensor, unit: float, codes: Tensor) -> None:
        """`quant.rounding.codes_of`."""
        self._codes(
            values.data_ptr(), codes.data_ptr(), _TYPES[codes.dtype], values.numel(),
            float(scale.reciprocal()), unit, torch.get_num_threads(),
        )  # fmt: skip

    def scaled(self, codes: Tensor, scale: Tensor, values: Tensor) -> None:
        """`quant.rounding.scaled`."""
        self._scaled(
            codes.data_ptr(), _TYPES[codes.dtype], values.data_ptr(), codes.numel(),
            float(scale), torch.get_num_threads(),
        )  # fmt: skip

    def _check(self) -> None:
        """Compare one result with torch's: a compiler that was told to calculate loosely is noticed here."""
        scale = torch.tensor(0.0173)
        x = torch.arange(-400, 401) * (scale / 2)  # on codes, and half way between them
        y = torch.empty_like(x)
        self.round(x, scale, Grid(), y)
        if not torch.equal(y, (x * scale.reciprocal()).round_().clamp_(-128, 127).mul_(scale)):
            raise KernelError(
                "the native kernel does not give the results of torch's operators: remove options such as -ffast-math "
                "from CC, or use quant.kernel=auto"
            )
