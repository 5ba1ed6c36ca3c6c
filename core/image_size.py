"""Height and width of the network's input, read and written in one way by every package.

A setting, a file and a command line say a square with one number and a rectangle with two, height first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SizeLike = int | Sequence[int]
"""One number for a square, or (height, width); pixels."""


MOST_DIGITS = 9


class ImageSize(NamedTuple):
    """Size of a network's input.

    Attributes:
        height: pixels.
        width: pixels.
    """

    height: int
    width: int

    @classmethod
    def of(cls, value: SizeLike) -> ImageSize:
        """The size given by one number (a square) or by one or two numbers (height, width).

        Raises:
            ValueError: not one or two numbers.
        """
        numbers = (value,) if isinstance(value, int) else tuple(value)
        if not 1 <= len(numbers) <= 2:
            raise ValueError(
                f"{list(numbers)} is not an image size: expected one number, or height and width"
            )
        return cls(numbers[0], numbers[-1])

    @classmethod
    def parse(cls, text: str) -> ImageSize | None:
        """The size given as "384x640" or "640" in files and on command lines; None for other text."""
        parts = text.split("x")
        if len(parts) > 2 or not all(part.isdecimal() and len(part) < MOST_DIGITS for part in parts):
            return None
        size = cls.of([int(part) for part in parts])
        return size if min(size) else None

    @property
    def is_square(self) -> bool:
        """Whether height and width are equal."""
        return self.height == self.width

    @property
    def plain(self) -> int | list[int]:
        """As settings and reports hold it: one number for a square, else [height, width]."""
        return self.height if self.is_square else [self.height, self.width]

    @property
    def text(self) -> str:
        """`384x640`: height x width, as `octet.image_size` in a file's metadata."""
        return f"{self.height}x{self.width}"
