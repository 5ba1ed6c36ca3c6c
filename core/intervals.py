"""Confidence intervals of a score over the images that it was measured on.

A score of a few hundred images would be another one on other images. The bootstrap (Efron, 1979) estimates by how much:
images are drawn with replacement, as many as there are, and the score is computed again, many times. All rows of a run
are computed on the same draws, so that the differences of two rows are paired: images that are difficult for both
models cancel out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95  # share of the draws inside an interval
NUM_DRAWS = 1000


@dataclass(frozen=True)
class Interval:
    """Percentile interval at LEVEL: `low` to `high`."""

    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        """Whether no difference lies inside, so that a difference may be noise."""
        return self.low <= 0 <= self.high


def interval(draws: Sequence[float]) -> Interval | None:
    """Percentile interval of a score's draws, linearly interpolated; None where there are none.

    Example: `interval(range(1001))` is `Interval(25.0, 975.0)`.
    """
    ordered = sorted(value for value in draws if math.isfinite(value))
    if not ordered:
        return None
    return Interval(_quantile(ordered, (1 - LEVEL) / 2), _quantile(ordered, (1 + LEVEL) / 2))


def paired_interval(draws: Sequence[float], reference: Sequence[float]) -> Interval | None:
    """Interval of the difference `draws` less `reference`, draw by draw; None where they were not drawn together.

    Args:
        draws: of one model.
        reference: of another one on the same images, drawn with the same seed.
    """
    if len(draws) != len(reference):
        return None
    return interval([mine - other for mine, other in zip(draws, reference, strict=True)])


def _quantile(ordered: Sequence[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
