"""Tells boxes that are given by two corners from boxes given as their format says, by all boxes of a split together."""

from collections.abc import Sequence
from dataclasses import dataclass

from data.inventory import Inventory

LEAST = 4  # boxes needed for a judgement
SHARE = 0.5  # of the boxes that leave their image when read as the format says


@dataclass
class Corners:
    """Counts boxes that would be corners.

    Two corners have the third number above the first and the fourth above the second in every line, and read as a
    position and a size about half of them leave the image.

    Attributes:
        expected: what the format says the four numbers are.
        total: boxes seen.
        ordered: boxes whose last two numbers are above the first two.
        leaving: boxes that leave their image.
        first: place of the first that leaves it.
    """

    expected: str
    total: int = 0
    ordered: int = 0
    leaving: int = 0
    first: str = ""

    def add(self, box: Sequence[float], leaves: bool, place: str) -> None:
        """Count one box: its four numbers as the file has them, and whether it leaves its image as read."""
        self.total += 1
        self.ordered += box[2] > box[0] and box[3] > box[1]
        self.leaving += leaves
        if leaves and not self.first:
            self.first = place

    def check(self, inventory: Inventory) -> None:
        """Add a fault where the boxes are corners."""
        if self.total >= LEAST and self.ordered == self.total and self.leaving >= SHARE * self.total:
            inventory.fault(
                f"{self.first}: {self.leaving} of {self.total} boxes leave their image, and the last two numbers are "
                f"above the first two in all of them: these are the corners x1, y1, x2, y2, expected {self.expected}."
            )
