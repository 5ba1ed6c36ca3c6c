"""Histograms against numpy, and every way to choose a scale against a slow search over the raw values."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core.choices import OBSERVERS
from core.grid import INT8_WEIGHTS, Grid
from quant.calibration.observers import BINS, Histogram, _flat, choose_scale, choose_weight_scale

FLOATS = st.floats(width=32, allow_nan=False, min_value=-(2.0**80), max_value=2.0**80)
BATCHES = st.lists(st.lists(FLOATS, max_size=12), min_size=1, max_size=6)
MODERATE = st.lists(
    st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=40), min_size=1, max_size=6
)


def histogram_of(*batches):
    histogram = Histogram()
    for batch in batches:
        histogram.update(torch.as_tensor(batch, dtype=torch.float32))
    return histogram


def content(histogram):
    return (
        histogram.exponent,
        histogram.maximum,
        histogram.num_values,
        histogram.num_ignored,
        histogram.counts.tolist(),
    )


def spread_values(name, count=60_000):
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(count, generator=generator)
    return {
        "normal": normal,
        "rectified": normal.relu(),
        "silu": torch.nn.functional.silu(3 * normal),
        "uniform": torch.rand(count, generator=generator) * 3,
        "laplace": normal.sign() * -torch.rand(count, generator=generator).clamp(min=1e-9).log(),
        "gaps": (16 * normal).round() / 16,
        "outliers": torch.cat((normal, torch.tensor([70.0, -100.0]))),
    }[name]


# -- the histogram


@settings(max_examples=100, deadline=None)
@given(MODERATE)
@example([[0.0], [1.0], [2.0]])
@example([[1e-30], [999.0]])
def test_counts_equal_numpy_over_all_values_at_once(batches):
    histogram = histogram_of(*batches)
    values = np.abs(np.concatenate([np.asarray(batch, dtype=np.float32) for batch in batches]))
    width = 2.0**histogram.exponent / BINS
    expected = np.bincount((values.astype(np.float64) / width).astype(np.int64), minlength=BINS)
    assert histogram.counts.tolist() == expected.tolist()
    assert histogram.num_values == values.size
    assert histogram.maximum == values.max()
    assert values.max() < 2.0**histogram.exponent


@settings(max_examples=100, deadline=None)
@given(BATCHES)
def test_growth_loses_no_counts(batches):
    histogram = Histogram()
    for seen, batch in enumerate(batches):
        histogram.update(torch.tensor(batch, dtype=torch.float32))
        assert float(histogram.counts.sum()) == sum(len(b) for b in batches[: seen + 1])
        assert histogram.num_values == float(histogram.counts.sum())
    assert histogram.num_ignored == 0


@pytest.mark.parametrize("shape", [(2, 8, 5, 7), (3, 4), (2, 3, 4, 5, 6), ()])
def test_counts_do_not_depend_on_the_memory_layout_and_need_no_copy(shape):
    values = torch.randn(shape)
    expected = content(histogram_of(values))
    layouts = [values.mT if values.ndim > 1 else values]
    if values.ndim == 4:
        layouts += [values.contiguous(memory_format=torch.channels_last), values.permute(1, 3, 0, 2)]
    for other in layouts:
        assert content(histogram_of(other)) == expected
        assert _flat(other).data_ptr() == other.data_ptr()
        assert _flat(other).is_contiguous()


@settings(max_examples=100, deadline=None)
@given(batches=BATCHES, seed=st.randoms(use_true_random=False))
def test_the_order_of_the_batches_does_not_matter(batches, seed):
    shuffled = list(batches)
    seed.shuffle(shuffled)
    assert content(histogram_of(*batches)) == content(histogram_of(*shuffled))


@settings(max_examples=100, deadline=None)
@given(batches=BATCHES, ranks=st.integers(1, 4))
def test_ranks_merged_equal_one_process(batches, ranks):
    merged = Histogram()
    for rank in range(ranks):
        merged.merge(histogram_of(*batches[rank::ranks]))
    assert content(merged) == content(histogram_of(*batches))


def test_merging_keeps_ignored_values_of_an_otherwise_empty_rank():
    first, second = histogram_of([1.0, math.nan]), histogram_of([math.inf, math.nan])
    second.merge(first)
    assert (second.num_values, second.num_ignored, second.maximum) == (1, 3, 1.0)
    third = histogram_of([math.nan])
    first.merge(third)
    assert (first.num_values, first.num_ignored) == (1, 2)


def test_more_values_than_float32_can_count_are_counted():
    count = 2**24 + 5
    histogram = Histogram()
    histogram.update(torch.zeros(count, dtype=torch.bfloat16))
    assert float(histogram.counts[0]) == count


def test_layout_and_type_of_the_values_do_not_matter():
    values = torch.randn(4, 6, 5, 3).bfloat16()
    strided = values.permute(0, 2, 3, 1)[:, ::2]
    assert not strided.is_contiguous()
    expected = content(histogram_of(strided.float().contiguous().flatten()))
    for values_of_type in (strided, strided.double()):
        histogram = Histogram()
        histogram.update(values_of_type)
        assert content(histogram) == expected


def test_the_tensor_is_only_read():
    values = torch.randn(100)
    before = values.clone()
    Histogram().update(values)
    assert torch.equal(values, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_counts_the_same():
    values = torch.randn(1_000_000)
    on_gpu = Histogram()
    on_gpu.update(values.cuda())
    assert content(on_gpu) == content(histogram_of(values))


# -- every method


@pytest.mark.parametrize("method", OBSERVERS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "values",
    [
        [],
        [0.0] * 5,
        [3.0] * 7,
        [-1e-3],
        [1e-40, -1e-42],
        [1e-20, 1.0],
        [1e25, -1e27, 1.0],
        [3e38, 1.0],
        [math.nan, 1.0, -2.0],
        [math.inf, -math.inf, 0.5],
        [math.nan, math.inf],
        [2.0**-60, 2.0**60],
    ],
    ids=str,
)
def test_scales_are_positive_and_finite(method, bits, values):
    choice = choose_scale(histogram_of(values), method, Grid(bits))
    assert 0 < choice.scale < math.inf
    assert float(torch.tensor(choice.scale)) > 0  # in float32, too
    assert 0 < choice.amax < math.inf
    assert 0 <= choice.clipped <= 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32), max_size=30),  # with NaN, infinities, subnormals
    st.sampled_from(OBSERVERS),
    st.integers(2, 8),
)
def test_scales_are_positive_and_finite_for_anything(values, method, bits):
    histogram = histogram_of(values)
    assert histogram.num_values + histogram.num_ignored == len(values)
    choice = choose_scale(histogram, method, Grid(bits))
    assert 0 < choice.scale < math.inf
    assert choice.scale == choice.amax / (2 ** (bits - 1) - 1)
    assert choice.amax <= histogram.maximum or histogram.maximum < 1e-15


def test_nan_and_infinite_values_leave_the_rest_as_it_is():
    clean, dirty = [0.5, -3.0, 2.0], [math.nan, 0.5, -3.0, math.inf, 2.0, -math.inf]
    with_dirt = histogram_of(dirty)
    assert with_dirt.num_ignored == 3
    assert content(with_dirt)[:3] == content(histogram_of(clean))[:3]
    assert torch.equal(with_dirt.counts, histogram_of(clean).counts)


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"'kl'.*minmax, percentile, mse, entropy"):
        choose_scale(histogram_of([1.0]), "kl")


@pytest.mark.parametrize("method", OBSERVERS)
def test_scales_move_with_the_unit(method):
    """Metres or kilometres: the same share of the range is clipped. A power of two keeps every bin."""
    values = spread_values("laplace")
    small, large = (choose_scale(histogram_of(values * unit), method) for unit in (1.0, 1024.0))
    assert large.scale == pytest.approx(1024 * small.scale, rel=1e-12)
    assert large.clipped == small.clipped


# -- one by one


@pytest.mark.parametrize("bits", range(2, 9))
def test_min_max_is_the_maximum_over_the_highest_code(bits):
    choice = choose_scale(histogram_of([0.1, -5.5], [2.0]), "minmax", Grid(bits))
    assert choice.scale == 5.5 / (2 ** (bits - 1) - 1)
    assert choice.clipped == 0.0


@pytest.mark.parametrize("name", ["normal", "silu", "uniform", "laplace", "outliers"])
@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 99.99, 100.0])
def test_percentile_equals_numpy_within_one_bin(name, percentile):
    values = spread_values(name)
    histogram = histogram_of(values)
    expected = np.percentile(values.abs().numpy(), percentile, method="inverted_cdf")
    width = 2.0**histogram.exponent / BINS
    choice = choose_scale(histogram, "percentile", percentile=percentile)
    assert abs(choice.amax - expected) <= width * 1.001
    assert choice.clipped <= 1 - percentile / 100 + 1e-9


def rounding_error(values, amax, high):
    step = amax / high
    return float(((values / step).round().clamp(-high - 1, high) * step - values).square().mean())


@pytest.mark.parametrize("name", ["normal", "rectified", "silu", "uniform", "laplace", "outliers"])
@pytest.mark.parametrize(("bits", "tolerance"), [(8, 1.01), (4, 1.02), (3, 1.04)])
def test_mse_is_as_good_as_the_best_of_a_search_over_the_values(name, bits, tolerance):
    """Within a few per cent; below 4 bits the extra lowest code, which a histogram of magnitudes ignores, shows."""
    values, high = spread_values(name).double(), 2 ** (bits - 1) - 1
    maximum = float(values.abs().max())
    best = min(rounding_error(values, amax, high) for amax in maximum * np.geomspace(0.01, 1.0, 150))
    choice = choose_scale(histogram_of(values), "mse", Grid(bits))
    assert rounding_error(values, choice.amax, high) <= best * tolerance


def divergence_of(counts, end, levels):
    """Migacz's inner loop, as his slides tell it, in Python over bins.

    The first `end` bins are the reference, with all that lies above added to the last of them. They are merged into
    `levels` parts, and each part's count is spread over the bins of the part that were not empty. What
    comes out is compared by the Kullback-Leibler divergence, after normalising both to sum 1.
    """
    reference = list(counts[:end])
    reference[-1] += sum(counts[end:])
    expanded = [0.0] * end
    for level in range(levels):
        part = [i for i in range(end) if i * levels // end == level]
        filled = [i for i in part if counts[i] > 0]
        for i in filled:
            expanded[i] = sum(counts[j] for j in part) / len(filled)
    total_p, total_q = sum(reference), sum(expanded)
    divergence = 0.0
    for p, q in zip(reference, expanded, strict=True):
        if p > 0:
            divergence += p / total_p * math.log(p / total_p / max(q / max(total_q, 1e-300), 1e-12))
    return divergence


@pytest.mark.parametrize("name", ["normal", "rectified", "silu", "laplace", "gaps", "outliers"])
def test_entropy_is_the_minimum_of_the_slow_loop(name):
    histogram = histogram_of(spread_values(name))
    counts = histogram.counts.tolist()
    counts[0] = min(counts[0], counts[1])  # zeros are exact on every grid
    width = 2.0**histogram.exponent / BINS
    choice = choose_scale(histogram, "entropy", Grid(4))  # 8 levels keep the loop short
    top = max(i for i, count in enumerate(counts) if count) + 1
    chosen_end = min(round(choice.amax / width), top) if choice.amax < histogram.maximum else top
    chosen = divergence_of(counts, chosen_end, 8)
    ends = [round(end) for end in np.linspace(128, top, 512)[11::25]]
    allowed = [end for end in ends if sum(counts[end:]) <= 0.01 * sum(counts)]
    others = [divergence_of(counts, end, 8) for end in allowed]
    assert chosen <= min(others) + 1e-3 * abs(min(others))
    assert max(others) > 1.2 * chosen


def test_entropy_takes_no_bulk_for_outliers():
    """A camera's 256 grey values, few of them dark: the empty bins between them made a lone dark value that is given
    all the others' counts look like a perfect match."""
    greys = (torch.randn(20_000) * 20 + 170).clamp(100, 254).round() / 255
    greys[0] = 127.5 / BINS  # bins reach to 1: alone in the 128th, where the search starts
    choice = choose_scale(histogram_of(greys), "entropy")
    assert choice.clipped <= 0.01
    assert choice.amax > 0.8


def test_entropy_keeps_a_plateau_and_drops_a_far_tail():
    assert choose_scale(histogram_of(spread_values("uniform")), "entropy").amax > 2.9
    assert choose_scale(histogram_of(spread_values("outliers")), "entropy").amax < 10


def test_entropy_is_not_blinded_by_the_zeros_of_a_rectified_tensor():
    """Nine zeros for each value, or none: the same choice, give or take a bin."""
    values = spread_values("normal").abs()
    dense = choose_scale(histogram_of(values), "entropy").amax
    sparse = choose_scale(histogram_of(values, torch.zeros(9 * len(values))), "entropy").amax
    assert sparse == pytest.approx(dense, rel=0.02)


# -- weights


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_min_max_weight_scales_are_each_channels_maximum(axis, bits):
    weight = torch.randn(5, 6, 3, 3)
    others = [d for d in range(4) if d != axis]
    scale = choose_weight_scale(weight, axis, "minmax", Grid(bits, symmetric=True))
    torch.testing.assert_close(scale, weight.abs().amax(others) / (2 ** (bits - 1) - 1))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_weight_scales_are_as_good_as_a_search_per_channel(bits):
    weight, high = torch.randn(6, 32, 3, 3) ** 3, 2 ** (bits - 1) - 1
    scale = choose_weight_scale(weight, 0, "mse", Grid(bits, symmetric=True))
    for row, got in zip(weight.flatten(1).double(), scale.tolist(), strict=True):
        errors = [
            float(((row / s).round().clamp(-high, high) * s - row).square().sum())
            for s in float(row.abs().max()) / high * np.linspace(0.1, 1.0, 900)
        ]
        error = float(((row / got).round().clamp(-high, high) * got - row).square().sum())
        assert error <= min(errors) * 1.05


@pytest.mark.parametrize("top", [127, 128, 101, 64])
def test_weights_quantized_before_lose_nothing(top):
    """Whatever code of their old grid the largest one was on: the full grid's ends, or one of 7 bits within 8."""
    codes = torch.randint(-top + 1, top, (4, 200), generator=torch.Generator().manual_seed(top))
    codes[:, 0] = -top
    step = torch.tensor([0.1, 0.003, 1.0, 7.7])[:, None]
    scale = choose_weight_scale(codes * step, 0, "mse", INT8_WEIGHTS)[:, None]
    high = min(top, 127)  # the code of -128 is not on a weight grid: that one value is clipped
    restored = (codes * step / scale).round().clamp(-high, high) * scale
    torch.testing.assert_close(restored, codes.clamp(-high, high) * step, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("fill", [0.0, 1e-30, 1e-12, 1e20, math.nan])
def test_weight_scales_are_positive_and_finite(method, fill):
    weight = torch.randn(4, 3, 1, 1)
    weight[2] = fill
    scale = choose_weight_scale(weight, 0, method, INT8_WEIGHTS)
    assert bool((scale > 0).all())
    assert bool(torch.isfinite(scale).all())
    if fill == 0.0:
        assert float(scale[2]) == 1.0
