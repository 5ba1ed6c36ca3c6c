"""Whether calibration saw enough images: the scales that half of them, a quarter, ... would have given.

Histograms are copied whenever the number of images has doubled, and every copy is asked for its scales. Where the
scales of a smaller count lie close to those of all images, more images would change nothing that matters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from quant.observers import Histogram

FIRST = 8  # images of the first copy
CLOSE = 0.05  # relative distance of scales that counts as none

Histograms = dict[str, Histogram]


class Milestones:
    """Copies of growing histograms at doubling image counts.

    Args:
        num_processes: among which the images are divided; counts are of this process.
    """

    def __init__(self, num_processes: int = 1) -> None:
        self.counts: list[int] = []
        self.copies: list[Histograms] = []
        self._next = -(-FIRST // num_processes)

    def see(self, histograms: Histograms, num_images: int) -> None:
        """Take a copy if the count has doubled since the last one."""
        if num_images >= self._next:
            self.counts.append(num_images)
            self.copies.append(copy.deepcopy(histograms))
            while self._next <= num_images:
                self._next *= 2


@dataclass(frozen=True)
class Convergence:
    """Scales over image counts.

    Attributes:
        counts: image counts, rising; the last is all images.
        scales: group -> its scale at each count; groups with a fixed scale are left out.
    """

    counts: tuple[int, ...]
    scales: dict[str, tuple[float, ...]]

    def distances(self, index: int) -> list[float]:
        """Relative distance of every group's scale at a count from its final one."""
        return [abs(scales[index] / scales[-1] - 1) for scales in self.scales.values()] or [0.0]

    @property
    def enough(self) -> int:
        """The smallest count from which on every scale stays within `CLOSE` of its final value."""
        found = self.counts[-1]
        for index in reversed(range(len(self.counts))):
            if max(self.distances(index)) > CLOSE:
                break
            found = self.counts[index]
        return found

    def sentence(self) -> str:
        """What a person wants to know."""
        if len(self.counts) < 2:
            return f"{self.counts[-1]} images are too few to see whether the scales have settled"
        last = self.distances(-2)
        text = (
            f"scales moved by at most {max(last):.1%} (median {median(last):.1%}) from {self.counts[-2]} to "
            f"{self.counts[-1]} images; "
        )
        if self.enough < self.counts[-1]:
            return (
                f"{text}{self.enough} images are enough: every scale is within {CLOSE:.0%} of the final one"
            )
        return (
            f"{text}more images may move some by more than {CLOSE:.0%}: raise quant.calibration_images to see"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file: distances from the final scale per count, and what is enough."""
        found = [self.distances(index) for index in range(len(self.counts))]
        return {
            "images": list(self.counts),
            "largest": [max(distances) for distances in found],
            "median": [median(distances) for distances in found],
            "enough": self.enough,
            "scales": {name: list(scales) for name, scales in self.scales.items()},
        }


def merge_milestones(parts: Sequence[Milestones]) -> Milestones:
    """The copies of all processes added up, as far as every one of them came."""
    merged = Milestones()
    for index in range(min(len(part.counts) for part in parts)):
        merged.counts.append(sum(part.counts[index] for part in parts))
        merged.copies.append(merge_histograms([part.copies[index] for part in parts]))
    return merged


def merge_histograms(parts: Sequence[Histograms]) -> Histograms:
    """Histograms of several processes added up, per group; exact, whatever the order."""
    merged = {name: Histogram() for name in parts[0]}
    for part in parts:
        for name, histogram in part.items():
            merged[name].merge(histogram)
    return merged


def follow_scales(
    milestones: Milestones,
    num_images: int,
    final: dict[str, float],
    scale_of: Callable[[str, Histogram], float],
) -> Convergence:
    """Scales of every copy, and the final ones at the end.

    Args:
        milestones: copies of the histograms.
        num_images: images seen at the end.
        final: group -> final scale, of the groups whose scale was chosen.
        scale_of: chooses the scale of a group from a histogram.
    """
    earlier = [
        (count, copied)
        for count, copied in zip(milestones.counts, milestones.copies, strict=True)
        if count < num_images
    ]
    scales = {
        name: (*(scale_of(name, copied[name]) for _, copied in earlier), scale)
        for name, scale in final.items()
    }
    return Convergence((*(count for count, _ in earlier), num_images), scales)
