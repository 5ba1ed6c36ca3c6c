"""Grids: the values that a quantized tensor can have, up to its scale.

Every part that needs to know the codes asks a `Grid`: fake quantization, calibration, export. None of them computes
codes from a width. The zero point is always 0: a value is scale * code.

A code is a number: an integer, or for FP8 one of the 253 values of E4M3 (arXiv:2209.05433, table 1; `float8_e4m3fn`):
a sign, four bits of exponent with bias 7, three bits of mantissa; no infinities, one NaN for each sign. Normal values
reach from 2^-6 to 448, and below 2^-6 they are multiples of 2^-9. So the step between two codes grows with them: 2^-9
of the scale close to zero, 32 times the scale at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core.choices import FP8, GRIDS, INTEGER
from core.errors import ConfigError

MIN_BITS, MAX_BITS = 2, 8
E4M3_MAX = 448


@dataclass(frozen=True)
class Grid:
    """Codes low..high, each of which is a number.

    Attributes:
        bits: width of a code, 2 to 8; 8 for FP8.
        signed: codes on both sides of zero, or from zero upwards for tensors that are never negative. FP8 is signed.
        symmetric: without the lowest signed code, as weights are quantized: [-(2^(bits-1) - 1), 2^(bits-1) - 1]. FP8
            is symmetric either way.
        kind: `integer`, or `fp8` for E4M3.

    Raises:
        ConfigError: another width or kind.
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = False
    kind: str = INTEGER

    def __post_init__(self) -> None:
        if self.kind not in GRIDS:
            raise ConfigError(f"grid {self.kind!r}: expected one of {', '.join(GRIDS)}")
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ConfigError(
                f"{self.bits} bits are not a supported width: choose {MIN_BITS} to {MAX_BITS}, or keep the layer in "
                "float"
            )
        if self.is_fp8 and (self.bits != MAX_BITS or not self.signed):
            raise ConfigError(
                f"an FP8 grid has {MAX_BITS} bits, one of them the sign; got {self.bits} bits, signed={self.signed}"
            )

    @property
    def is_fp8(self) -> bool:
        """Whether codes are E4M3 values."""
        return self.kind == FP8

    @property
    def name(self) -> str:
        """`INT8`, `INT4`, ..., or `FP8`."""
        return "FP8" if self.is_fp8 else f"INT{self.bits}"

    @property
    def low(self) -> int:
        """Lowest code."""
        if not self.signed:
            return 0
        return -self.high if self.symmetric or self.is_fp8 else -self.high - 1

    @property
    def high(self) -> int:
        """Highest code."""
        return E4M3_MAX if self.is_fp8 else int(2 ** (self.bits - self.signed)) - 1

    def codes(self, x: Tensor, scale: Tensor | float) -> Tensor:
        """Codes of x, in the type of x / scale; halves go to the even code. `scale` broadcasts over x."""
        codes = (x / scale).clamp_(self.low, self.high)
        return codes.to(torch.float8_e4m3fn).to(codes.dtype) if self.is_fp8 else codes.round_()

    def round(self, x: Tensor, scale: Tensor | float) -> Tensor:
        """The values of the grid that are closest to x; `scale` broadcasts over x."""
        return self.codes(x, scale).mul_(scale)

    def ranks(self, codes: Tensor) -> Tensor:
        """Places of codes among all codes in rising order, zero's being 0; int16. Neighbours differ by 1."""
        if not self.is_fp8:
            return codes.round().to(torch.int16)
        bits = codes.to(torch.float8_e4m3fn).view(torch.int8).to(torch.int16)
        return torch.where(bits < 0, -(bits + 128), bits)  # a sign, and the place among the magnitudes

    def ranked(self, ranks: Tensor) -> Tensor:
        """The codes at some places, float32: the inverse of `ranks`."""
        if not self.is_fp8:
            return ranks.float()
        magnitudes = ranks.abs().to(torch.int8).view(torch.float8_e4m3fn).float()
        return torch.where(ranks < 0, -magnitudes, magnitudes)


INT8 = Grid()
INT8_WEIGHTS = Grid(symmetric=True)
FP8_E4M3 = Grid(kind=FP8)
FP8_WEIGHTS = Grid(symmetric=True, kind=FP8)
