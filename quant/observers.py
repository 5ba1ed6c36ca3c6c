"""Observers: one histogram per placement group, from which every calibration method takes its scale.

Activation grids are symmetric, so a histogram of magnitudes says all that a scale needs. Its range is always a
power of two and it holds `BINS` equal bins. When a larger value arrives the range doubles and neighbouring bins
are added in pairs: since the edges are exact powers of two times an integer, the result is the same as if the
larger range had been known from the start. So no count is lost, the order of the batches does not matter, and
histograms of several processes add up.

    bins of [0, 1):  3 1 0 4      a value of 1.5 arrives, range becomes [0, 2):  4 4 0 1

One pass over the data therefore serves all four methods: min-max, percentile, MSE and entropy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 4096
METHODS = ("minmax", "percentile", "mse", "entropy")
_TINY = 2.0**-60  # smaller magnitudes count as zero
_HUGE = 2.0**90  # larger ones as infinite


class Histogram:
    """Counts of magnitudes, with a range that grows by doubling.

    Attributes:
        counts: float64 [BINS] on the CPU; bin i holds |x| in [i, i + 1) * range / BINS.
        exponent: the range is 2 ** exponent; None before the first non-zero value.
        maximum: largest finite magnitude seen.
        num_values: finite values seen, zeros included.
        num_ignored: NaN and infinite values, which are left out.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.exponent: int | None = None
        self.maximum = 0.0
        self.num_values = 0
        self.num_ignored = 0

    def update(self, x: Tensor) -> None:
        """Count the magnitudes of x, any shape and floating type."""
        if x.numel() == 0:
            return
        magnitude = x.detach().float().abs().flatten()
        largest = float(magnitude.max())
        if not largest < _HUGE:  # NaN compares false, too
            finite = magnitude[magnitude < _HUGE]
            self.num_ignored += magnitude.numel() - finite.numel()
            if finite.numel() == 0:
                return
            magnitude, largest = finite, float(finite.max())
        self.num_values += magnitude.numel()
        self.maximum = max(self.maximum, largest)
        if largest <= _TINY:
            self._grow(self.exponent if self.exponent is not None else math.frexp(_TINY)[1])
        else:
            self._grow(math.frexp(largest)[1])
        assert self.exponent is not None
        limit = math.ldexp(1.0, self.exponent)
        self.counts += torch.histc(magnitude, BINS, 0.0, limit).double().cpu()

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram (of another process, say)."""
        if other.exponent is None:
            self.num_ignored += other.num_ignored
            return
        self._grow(other.exponent)
        assert self.exponent is not None
        self.counts += _halve(other.counts, self.exponent - other.exponent)
        self.maximum = max(self.maximum, other.maximum)
        self.num_values += other.num_values
        self.num_ignored += other.num_ignored

    def _grow(self, exponent: int) -> None:
        if self.exponent is None:
            self.exponent = exponent
        elif exponent > self.exponent:
            self.counts = _halve(self.counts, exponent - self.exponent)
            self.exponent = exponent

    @property
    def centres(self) -> Tensor:
        """Middle of each bin, float64 [BINS]."""
        width = math.ldexp(1.0, self.exponent or 0) / BINS
        return (torch.arange(BINS, dtype=torch.float64) + 0.5) * width


def _halve(counts: Tensor, times: int) -> Tensor:
    """Counts for a range `2 ** times` larger: groups of `2 ** times` bins become one."""
    group = min(1 << times, BINS) if times < 31 else BINS
    merged = torch.zeros_like(counts)
    merged[: BINS // group] = counts.reshape(BINS // group, group).sum(1)
    return merged


@dataclass(frozen=True)
class ScaleChoice:
    """What a method chose for one group.

    Attributes:
        amax: largest magnitude that the grid is to represent.
        scale: amax / highest code; positive and finite.
        clipped: share of the values above amax.
    """

    amax: float
    scale: float
    clipped: float


def choose_scale(histogram: Histogram, method: str, bits: int = 8, percentile: float = 99.99) -> ScaleChoice:
    """Choose the scale of a signed `bits` wide grid for the values in the histogram.

    A histogram without any non-zero value gives scale 1: every value is representable then.

    Args:
        histogram: counts of magnitudes.
        method: `minmax`, `percentile`, `mse` or `entropy`.
        bits: width of the grid, 2 to 8.
        percentile: for `percentile`, the share of values to represent, in percent.

    Raises:
        ValueError: unknown method.
    """
    high = 2 ** (bits - 1) - 1
    if histogram.maximum <= _TINY:
        return ScaleChoice(float(high), 1.0, 0.0)
    if method == "minmax":
        amax = histogram.maximum
    elif method == "percentile":
        amax = _percentile(histogram, percentile)
    elif method == "mse":
        amax = _least_squared_error(histogram, high)
    elif method == "entropy":
        amax = _least_divergence(histogram, high + 1)
    else:
        raise ValueError(f"unknown calibration method {method!r}: choose one of {', '.join(METHODS)}")
    amax = min(amax, histogram.maximum)
    above = histogram.counts[histogram.centres > amax].sum()
    return ScaleChoice(amax, amax / high, float(above / histogram.counts.sum()))


def _percentile(histogram: Histogram, percentile: float) -> float:
    cumulative = histogram.counts.cumsum(0)
    index = int(torch.searchsorted(cumulative, cumulative[-1] * (percentile / 100.0)))
    width = float(histogram.centres[0]) * 2
    return (min(index, BINS - 1) + 1) * width


def _least_squared_error(histogram: Histogram, high: int, num_candidates: int = 200) -> float:
    """Amax with the least sum of squared rounding and clipping errors over the histogram."""
    filled = histogram.counts > 0
    x, counts = histogram.centres[filled], histogram.counts[filled]
    candidates = histogram.maximum * torch.linspace(0.05, 1.0, num_candidates, dtype=torch.float64)
    scale = (candidates / high)[:, None]
    error = (torch.clamp(torch.round(x / scale), max=high) * scale - x).square() @ counts
    return float(candidates[int(error.argmin())])


def _least_divergence(histogram: Histogram, levels: int, num_candidates: int = 128) -> float:
    """Amax with the least Kullback-Leibler divergence between the clipped and the rounded distribution.

    The method of Migacz, "8-bit inference with TensorRT" (GTC 2017): the reference keeps the first i bins and
    adds all outliers to the last; the approximation spreads the count of each of `levels` equal parts evenly
    over the part's non-empty bins.
    """
    counts = histogram.counts
    top = int(torch.nonzero(counts).max()) + 1
    ends = torch.linspace(min(levels, top), top, num_candidates).round().long().unique()  # [C]
    bins = torch.arange(BINS)
    inside = bins[None, :] < ends[:, None]  # [C, BINS]
    reference = torch.where(inside, counts[None, :], 0.0)
    clipped = counts.sum() - reference.sum(1)
    reference[torch.arange(len(ends)), ends - 1] += clipped
    filled = torch.where(inside, (counts[None, :] > 0).double(), 0.0)
    part = torch.clamp(bins[None, :] * levels // ends[:, None], max=levels - 1)
    zeros = torch.zeros(len(ends), levels, dtype=torch.float64)
    mass = zeros.scatter_add(1, part, torch.where(inside, counts[None, :], 0.0))
    cells = zeros.scatter_add(1, part, filled)
    spread = (mass / cells.clamp(min=1.0)).gather(1, part) * filled
    p = reference / reference.sum(1, keepdim=True)
    q = (spread / spread.sum(1, keepdim=True).clamp(min=1e-300)).clamp(min=1e-12)
    divergence = torch.where(p > 0, p * (p.clamp(min=1e-300) / q).log(), 0.0).sum(1)
    width = float(histogram.centres[0]) * 2
    return float(ends[int(divergence.argmin())]) * width


def choose_weight_scale(
    weight: Tensor, axis: int, method: str, bits: int, num_candidates: int = 80
) -> Tensor:
    """Choose one scale per output channel of a symmetric grid [-(2^(bits-1)-1), 2^(bits-1)-1].

    Args:
        weight: weight tensor; `axis` counts its output channels.
        axis: axis of the output channels.
        method: `minmax` for the largest magnitude; every other method searches the least squared error.
        bits: width of the grid.
        num_candidates: clipping points tried per channel, from 0.4 (0.2 below 6 bits) of the largest magnitude.

    Returns:
        Positive finite scales, float32 [channels]; 1 for a channel of zeros.
    """
    high = 2 ** (bits - 1) - 1
    w = weight.detach().double().movedim(axis, 0).flatten(1)  # [C, N]
    amax = w.abs().amax(1)
    amax = torch.where(amax > _TINY, amax, torch.full_like(amax, float(high)))
    if method == "minmax":
        return (amax / high).float()
    best_error = torch.full_like(amax, torch.inf)
    best_scale = amax / high
    lowest = 0.4 if bits >= 6 else 0.2
    for fraction in torch.linspace(1.0, lowest, num_candidates, dtype=torch.float64).tolist():
        scale = amax * fraction / high
        grid = scale[:, None]
        error = ((w / grid).round().clamp(-high, high) * grid - w).square().sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale.float()
