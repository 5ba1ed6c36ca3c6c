"""Grids: the values that a quantized tensor can have, up to its scale.

Every part that needs to know the codes asks a `Grid`: fake quantization, calibration, export. None of them computes
codes from a width, so that a grid of another kind (FP8 E4M3) can be added here as a second class with the same
members. The zero point is always 0: a value is scale * code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.errors import ConfigError

if TYPE_CHECKING:  # the methods need nothing but a tensor's own operations
    from torch import Tensor

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class Grid:
    """Integer codes low..high.

    Attributes:
        bits: width of a code, 2 to 8.
        signed: codes on both sides of zero, or from zero upwards for tensors that are never negative.
        symmetric: without the lowest signed code, as weights are quantized: [-(2^(bits-1) - 1), 2^(bits-1) - 1].

    Raises:
        ConfigError: another width.
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ConfigError(
                f"{self.bits} bits are not a supported width: choose {MIN_BITS} to {MAX_BITS}, or keep the layer in "
                "float"
            )

    @property
    def low(self) -> int:
        """Lowest code."""
        if not self.signed:
            return 0
        return -self.high if self.symmetric else -self.high - 1

    @property
    def high(self) -> int:
        """Highest code."""
        return int(2 ** (self.bits - self.signed)) - 1

    def codes(self, x: Tensor, scale: Tensor | float) -> Tensor:
        """Codes of x, in the type of x / scale; halves go to the even code. `scale` broadcasts over x."""
        return (x / scale).round_().clamp_(self.low, self.high)

    def round(self, x: Tensor, scale: Tensor | float) -> Tensor:
        """The values of the grid that are closest to x; `scale` broadcasts over x."""
        return self.codes(x, scale).mul_(scale)


INT8 = Grid()
INT8_WEIGHTS = Grid(symmetric=True)
