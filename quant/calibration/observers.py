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

from core.choices import OBSERVERS
from core.grid import INT8, Grid
from quant.native.statistics import count_magnitudes

NO_ENTROPY = "entropy needs steps of equal size, which FP8 does not have: choose mse, minmax or percentile"
BINS = 4096
_CHUNK = 1 << 18  # values counted at a time on a CPU: their bin numbers stay in its cache
_TINY = 2.0**-60  # smaller magnitudes count as zero
_HUGE = 2.0**90  # larger ones as infinite
_LOWEST = -59  # exponent of the smallest range: it holds _TINY


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
        values = _flat(x.detach())
        lowest = self.exponent if self.exponent is not None else _LOWEST
        found = count_magnitudes(values, lowest, BINS) or _count_magnitudes(values.float(), lowest)
        counts, exponent, largest, num_ignored = found
        self.num_ignored += num_ignored
        if values.numel() == num_ignored:
            return
        self.num_values += values.numel() - num_ignored
        self.maximum = max(self.maximum, largest)
        self._grow(exponent)
        self.counts += counts

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


def _flat(x: Tensor) -> Tensor:
    """The values in the order in which they lie in memory, which needs no copy in any dense layout."""
    return x.permute(sorted(range(x.ndim), key=x.stride, reverse=True)).reshape(-1)


def _largest(values: Tensor) -> float:
    """Largest magnitude; NaN if there is any NaN."""
    lowest, highest = torch.aminmax(values)
    return float(torch.maximum(-lowest, highest))


def _count_magnitudes(values: Tensor, exponent: int) -> tuple[Tensor, int, float, int]:
    """`quant.native.statistics.count_magnitudes` by torch's operators, for float32 on any device."""
    largest, num_values = _largest(values), values.numel()
    if not largest < _HUGE:  # NaN compares false, too
        values = values[values.abs() < _HUGE]
        largest = _largest(values) if values.numel() else 0.0
    if largest > _TINY:
        exponent = max(exponent, math.frexp(largest)[1])
    counts = _count(values, math.ldexp(1.0, -exponent) * BINS)
    return counts, exponent, largest, num_values - values.numel()


def _count(values: Tensor, bins_per_unit: float) -> Tensor:
    """Counts of |values| in bins of width 1 / bins_per_unit; int64 [BINS] on the CPU.

    `bins_per_unit` is a power of two, so the product is exact and its truncation the true bin number. Counting
    small integers is several times faster than `torch.histc`, and it counts in int64, where histc's float32
    counts stop growing at 2 ** 24.
    """
    counts = torch.zeros(BINS, dtype=torch.int64, device=values.device)
    chunk = _CHUNK if values.device.type == "cpu" else max(values.numel(), 1)
    for part in values.split(chunk):
        counts += torch.bincount((part * bins_per_unit).to(torch.int16).abs_(), minlength=BINS)
    return counts.cpu()


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


def choose_scale(
    histogram: Histogram, method: str, grid: Grid = INT8, percentile: float = 99.99
) -> ScaleChoice:
    """Choose the scale of a grid for the values in the histogram.

    A histogram without any non-zero value gives scale 1: every value is representable then.

    Args:
        histogram: counts of magnitudes.
        method: `minmax`, `percentile`, `mse` or `entropy`.
        grid: the codes.
        percentile: for `percentile`, the share of values to represent, in percent.

    Raises:
        ValueError: unknown method, or `entropy` for an FP8 grid.
    """
    high = grid.high
    if grid.is_fp8 and method == "entropy":
        raise ValueError(NO_ENTROPY)
    if histogram.maximum <= _TINY:
        return ScaleChoice(float(high), 1.0, 0.0)
    if method == "minmax":
        amax = histogram.maximum
    elif method == "percentile":
        amax = _percentile(histogram, percentile)
    elif method == "mse":
        amax = _least_squared_error(histogram, grid)
    elif method == "entropy":
        amax = _least_divergence(histogram, high + 1)
    else:
        raise ValueError(f"unknown calibration method {method!r}: choose one of {', '.join(OBSERVERS)}")
    amax = min(amax, histogram.maximum)
    return ScaleChoice(amax, amax / high, _share_above(histogram, amax))


def _share_above(histogram: Histogram, amax: float) -> float:
    """Share of the values in bins that lie above amax as a whole."""
    if amax >= histogram.maximum:
        return 0.0
    width = float(histogram.centres[0]) * 2
    return float(histogram.counts[math.ceil(amax / width) :].sum() / histogram.counts.sum())


def _percentile(histogram: Histogram, percentile: float) -> float:
    cumulative = histogram.counts.cumsum(0)
    index = int(torch.searchsorted(cumulative, cumulative[-1] * (percentile / 100.0)))
    width = float(histogram.centres[0]) * 2
    return (min(index, BINS - 1) + 1) * width


def _least_squared_error(histogram: Histogram, grid: Grid) -> float:
    """Amax with the least sum of squared rounding and clipping errors over the histogram.

    Two searches: 96 candidates in equal ratios from 1/128 of the maximum (few bits and rare large values
    ask for hard clipping), then 64 between the neighbours of the best.
    """
    coarse = histogram.maximum * torch.logspace(-7, 0, 96, base=2, dtype=torch.float64)
    best = int(squared_errors(histogram, coarse / grid.high, grid).argmin())
    lower, upper = float(coarse[max(best - 1, 0)]), float(coarse[min(best + 1, 95)])
    fine = torch.linspace(lower, upper, 64, dtype=torch.float64)
    return float(fine[squared_errors(histogram, fine / grid.high, grid).argmin()])


def squared_errors(histogram: Histogram, scales: Tensor, grid: Grid) -> Tensor:
    """Sum of the squared rounding and clipping errors of all values in the histogram, for each of some scales.

    Args:
        histogram: counts of magnitudes; a bin's values are taken to lie at its centre.
        scales: [C], float64, positive.
        grid: the codes.

    Returns:
        [C], float64.
    """
    filled = histogram.counts > 0
    x, counts = histogram.centres[filled], histogram.counts[filled]
    return grid.round(x, scales[:, None]).sub_(x).square_() @ counts


def _least_divergence(histogram: Histogram, levels: int, num_candidates: int = 512) -> float:
    """Amax with the least Kullback-Leibler divergence between the clipped and the rounded distribution.

    The method of Migacz, "8-bit inference with TensorRT" (GTC 2017): the reference p keeps the first i bins and
    adds all outliers to the last; the approximation q spreads the count of each of `levels` equal parts evenly
    over the part's non-empty bins. Values in the lowest bin are zero on every grid: they count no more than those
    of the next bin, or a rectified tensor's zeros would hide the rest. i runs over 512 equally spaced ends, as far as
    they leave out one per cent of the values at most: a larger share is not an outlier, and a reference that is all
    outliers, in one bin, would be matched exactly.

    Within a part q is constant, so sum p log q needs only the parts' sums, which are differences of running sums.
    """
    counts = histogram.counts.clone()
    counts[0] = torch.minimum(counts[0], counts[1])
    top = int(torch.nonzero(counts).max()) + 1
    ends = torch.linspace(min(max(levels, 128), top), top, num_candidates).round().long().unique()  # [C]
    parts = torch.arange(levels + 1)
    edges = (parts[None, :] * ends[:, None] + levels - 1) // levels  # [C, levels + 1], first bin of each part
    mass = _running_sum(counts)[edges].diff()
    cells = _running_sum((counts > 0).double())[edges].diff()
    inside, total = mass.sum(1), counts.sum()
    log_q = (mass / cells.clamp(min=1.0) / inside.clamp(min=1e-300)[:, None]).clamp(min=1e-300).log()
    divergence = _running_sum(torch.xlogy(counts, counts / total))[ends] - (mass * log_q).sum(1)
    last = counts[ends - 1]  # this bin takes the outliers
    log_q_last = torch.where(last > 0, log_q[:, -1], math.log(1e-12))
    with_outliers = last + total - inside
    divergence += torch.xlogy(with_outliers, with_outliers / total) - torch.xlogy(last, last / total)
    divergence -= (total - inside) * log_q_last
    divergence[inside < 0.99 * total] = math.inf
    width = float(histogram.centres[0]) * 2
    return float(ends[int(divergence.argmin())]) * width


def _running_sum(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, 2, ... values; one longer than the values."""
    return torch.cat((values.new_zeros(1), values.cumsum(0)))


def choose_weight_scale(
    weight: Tensor, axis: int, method: str, grid: Grid, num_candidates: int = 128
) -> Tensor:
    """Choose one scale per output channel of a weight.

    Args:
        weight: weight tensor; `axis` counts its output channels.
        axis: axis of the output channels.
        method: `minmax` for the largest magnitude; every other method searches the least squared error.
        grid: the codes.
        num_candidates: clipping points tried per channel, from 0.4 (0.2 below 6 bits) of the largest magnitude. The
            grids that have the largest magnitude on a lower code, or on the one beyond the highest, are tried, too:
            weights that have been quantized before lie on one of them and lose nothing there. FP8 steps repeat with
            each factor of two, so that no other candidates are needed for it.

    Returns:
        Positive finite scales, float32 [channels]; 1 for a channel of zeros.
    """
    high = grid.high
    w = weight.detach().double().movedim(axis, 0).flatten(1)  # [C, N]
    amax = w.abs().amax(1)
    amax = torch.where(amax > _TINY, amax, torch.full_like(amax, float(high)))
    if method == "minmax":
        return (amax / high).float()
    unit = (w / amax[:, None]).float()  # every channel in [-1, 1]: the candidates are the same for all
    lowest = 0.4 if grid.bits >= 6 else 0.2
    fractions = torch.linspace(1.0, lowest, num_candidates, dtype=torch.float64, device=w.device)
    codes = [code for code in range(-(-high // 2), high + 2) if code != high and not grid.is_fp8]
    fractions = torch.cat((fractions, high / torch.tensor(codes, dtype=torch.float64, device=w.device)))
    at_once = max(1, _CHUNK // max(unit.numel(), 1))
    errors = [_rounding_errors(unit, part.float() / high, grid) for part in fractions.split(at_once)]
    return (amax * fractions[torch.cat(errors).argmin(0)] / high).float()


def _rounding_errors(unit: Tensor, steps: Tensor, grid: Grid) -> Tensor:
    """Squared errors [F, C] of rounding weights [C, N] to a grid with steps [F]."""
    return grid.round(unit, steps[:, None, None]).sub_(unit).square_().sum(2)
