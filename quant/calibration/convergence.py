"""Whether calibration saw enough images: what the scales of half of them, a quarter, ... would have cost.

Histograms are copied whenever the number of images has doubled, and the scales of every copy are computed. A scale is
judged by its squared rounding and clipping error over the values of all images; a scale itself may move by a lot where
that error hardly depends on it. Where the scales of fewer images do nearly as well, more images would change nothing
that matters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from quant.calibration.observers import Histogram

FIRST = 8  # images of the first copy
CLOSE = 0.05  # additional squared error, as a share, that counts as none: 0.2 dB

Histograms = dict[str, Histogram]


class Milestones:
    """Copies of growing histograms at doubling image counts.

    Where several processes take the batches in turn, each copies its share at the counts of them all, so that the
    copies of all processes add up to those of one.

    Args:
        batch_size: images per batch, for more than one process.
        rank: number of this process among `num_processes`.
        num_processes: that take the batches in turn.

    Attributes:
        counts: images of this process in every copy.
        copies: what it had counted.
    """

    def __init__(self, batch_size: int = 1, rank: int = 0, num_processes: int = 1) -> None:
        self.counts: list[int] = []
        self.copies: list[Histograms] = []
        self._batch_size, self._rank, self._num_processes = batch_size, rank, num_processes
        self._next = FIRST
        self._num_batches = 0

    @property
    def is_empty(self) -> bool:
        """Whether this process had no batch."""
        return self._num_batches == 0

    def see(self, histograms: Histograms, num_images: int) -> None:
        """Take a copy if the count has doubled since the last one; called after each batch of this process."""
        self._num_batches += 1
        if self._num_processes == 1:
            if num_images >= self._next:
                self._copy(histograms, num_images, num_images)
            return
        while (batches := -(-self._next // self._batch_size)) <= self._rank + (
            self._num_batches * self._num_processes
        ):  # those of all processes, up to the next one of this process
            before = batches <= self._rank  # the first batch of this one
            self._copy({} if before else histograms, 0 if before else num_images, batches * self._batch_size)

    def _copy(self, histograms: Histograms, num_images: int, reached: int) -> None:
        self.counts.append(num_images)
        self.copies.append(copy.deepcopy(histograms))
        while self._next <= reached:
            self._next *= 2


@dataclass(frozen=True)
class Convergence:
    """Scales over image counts.

    Attributes:
        counts: image counts, rising; the last is all images.
        scales: group -> its scale at each count; groups with a fixed scale are left out.
        errors: group -> squared error of all images' values under each of these scales.
    """

    counts: tuple[int, ...]
    scales: dict[str, tuple[float, ...]]
    errors: dict[str, tuple[float, ...]]

    def excess(self, index: int) -> list[float]:
        """Additional squared error of every group with the scale of a count, as a share of that with its final one."""
        return [
            max(errors[index] / errors[-1] - 1, 0.0) if errors[-1] > 0 else 0.0
            for errors in self.errors.values()
        ] or [0.0]

    @property
    def enough(self) -> int:
        """The smallest count from which on no scale costs more than `CLOSE`."""
        found = self.counts[-1]
        for index in reversed(range(len(self.counts))):
            if max(self.excess(index)) > CLOSE:
                break
            found = self.counts[index]
        return found

    def sentence(self) -> str:
        """Summary of the convergence in one sentence."""
        if len(self.counts) < 2:
            return f"{self.counts[-1]} images are too few to judge whether the scales have converged"
        last = self.excess(-2)
        text = (
            f"scales from {self.counts[-2]} instead of {self.counts[-1]} images increase the squared error of a "
            f"tensor by at most {max(last):.1%} (median {median(last):.1%}); "
        )
        if self.enough < self.counts[-1]:
            return f"{text}{self.enough} images are enough to stay within {CLOSE:.0%}"
        return (
            f"{text}more images may still improve some tensors: raise quant.calibration_images if the dataset has "
            "more"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file: additional error per count, and what is enough."""
        found = [self.excess(index) for index in range(len(self.counts))]
        return {
            "images": list(self.counts),
            "largest": [max(shares) for shares in found],
            "median": [median(shares) for shares in found],
            "enough": self.enough,
            "scales": {name: list(scales) for name, scales in self.scales.items()},
        }


def merge_milestones(parts: Sequence[Milestones]) -> Milestones:
    """The copies of all processes added up, as far as every one of them came that had a batch."""
    merged = Milestones()
    parts = [part for part in parts if not part.is_empty]
    for index in range(min((len(part.counts) for part in parts), default=0)):
        merged.counts.append(sum(part.counts[index] for part in parts))
        merged.copies.append(merge_histograms([part.copies[index] for part in parts]))
    return merged


def merge_histograms(parts: Sequence[Histograms]) -> Histograms:
    """Histograms of several processes added up, per group; exact, whatever the order."""
    merged = {name: Histogram() for part in parts for name in part}
    for part in parts:
        for name, histogram in part.items():
            merged[name].merge(histogram)
    return merged


def follow_scales(
    milestones: Milestones,
    num_images: int,
    final: dict[str, float],
    scale_of: Callable[[str, Histogram], float],
    errors_of: Callable[[str, Sequence[float]], Sequence[float]],
) -> Convergence:
    """Scales of every copy, and the final ones at the end, with what each of them costs on all images.

    Args:
        milestones: copies of the histograms.
        num_images: images seen at the end.
        final: group -> final scale, of the groups whose scale was chosen.
        scale_of: chooses the scale of a group from a histogram.
        errors_of: squared errors of a group's values, of all images, under some scales.
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
    errors = {name: tuple(errors_of(name, found)) for name, found in scales.items()}
    return Convergence((*(count for count, _ in earlier), num_images), scales, errors)
