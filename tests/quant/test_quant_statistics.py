"""The native statistics against numpy and float64 formulas, in every layout, and against torch's operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quant_networks import small_quantized
from test_quant_sensitivity import batched, task_loss
from torch import Tensor

from core.grid import FP8_E4M3, Grid
from core.machine import describe_machine
from quant import measure_fisher
from quant.calibration.observers import BINS, Histogram
from quant.native.kernel import choose_kernel
from quant.native.statistics import silu_gradient_and_changes, squared_changes, squared_weight_changes

GRID = Grid()


@pytest.fixture(autouse=True)
def auto() -> Iterator[None]:
    choose_kernel("native")  # these tests need a compiler
    threads = torch.get_num_threads()
    yield
    choose_kernel("auto")
    torch.set_num_threads(threads)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def channel_slice(x: Tensor) -> Tensor:
    """The same values as a part of a channels-last tensor with more channels."""
    wide = torch.zeros(x.shape[0], x.shape[1] + 5, *x.shape[2:]).contiguous(memory_format=torch.channels_last)
    wide[:, 2:-3] = x
    return wide[:, 2:-3]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.clone,
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "slice": channel_slice,
}


# ------------------------------------------------------------------------------------------------------- counting
def counted(parts: list[Tensor]) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.update(part)
    return histogram


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1e-25, 1e-3, 1.0, 1e20])
def test_counts_are_those_of_numpy(factor: float, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    parts = [(noise(2, 5, 70, 301, seed=seed) * factor * (seed + 1) ** 3).to(dtype) for seed in range(3)]
    parts[1][0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -(2.0**90)])
    found = counted(parts)
    magnitudes = np.abs(np.concatenate([part.double().numpy().ravel() for part in parts]))
    finite = magnitudes[magnitudes < 2.0**90]
    assert found.num_ignored == len(magnitudes) - len(finite) == 3
    assert (found.num_values, found.maximum) == (len(finite), finite.max())
    expected, _ = np.histogram(finite, BINS, (0, 2.0 ** max(int(np.frexp(finite.max())[1]), -59)))
    assert found.counts.tolist() == expected.tolist()


def test_counts_are_those_of_torch_at_the_ends_of_the_range() -> None:
    values = [
        0.0,
        2.0**-61,
        2.0**-60,
        2.0**-59,
        1.0,
        np.nextafter(1.0, 0, dtype=np.float32),
        2.0**89,
        2.0**90,
    ]
    for last in range(1, len(values) + 1):
        parts = [
            torch.tensor(values[last - 1 : last]),
            -torch.tensor(values[:last]),
            torch.tensor([torch.nan]),
        ]
        choose_kernel("native")
        found = counted(parts)
        choose_kernel("torch")
        expected = counted(parts)
        assert vars(found).keys() == vars(expected).keys()
        for name, value in vars(expected).items():
            assert torch.equal(torch.as_tensor(vars(found)[name]), torch.as_tensor(value)), name


# ------------------------------------------------------------------------------------------------------- activations
@pytest.mark.parametrize(
    "layouts", [("contiguous",) * 2, ("channels-last",) * 2, ("slice", "channels-last"), ("slice",) * 2]
)
def test_squared_changes_are_the_formula_in_float64(layouts: tuple[str, str]) -> None:
    scale = 0.0173
    x, g = noise(3, 19, 50, 41), noise(3, 19, 50, 41, seed=1)
    change = (x.double() / np.float32(scale)).round().clamp(-128, 127) * float(np.float32(scale)) - x.double()
    expected = (change * g.double()).square().flatten(1).sum(1)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = squared_changes(LAYOUTS[layouts[0]](x), LAYOUTS[layouts[1]](g), scale, GRID)
        assert found is not None
        assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
        results.append(found)
    assert torch.equal(*results)


def test_what_the_kernel_does_not_read_is_left_to_torch() -> None:
    x = noise(2, 8, 6, 6)
    last = LAYOUTS["channels-last"](x)
    assert squared_changes(x, last, 0.1, GRID) is None
    assert squared_changes(x.double(), x.double(), 0.1, GRID) is None
    assert squared_changes(x, x, 0.1, FP8_E4M3) is None


# ------------------------------------------------------------------------------------------------------- weights
def weight_changes(
    x: Tensor, g: Tensor, error: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> list[float]:
    """Sums of (dW * error)^2 of each image, dW by autograd in float64."""
    found = []
    for image, along in zip(x.double().split(1), g.double().split(1), strict=True):
        weight = torch.zeros_like(error, dtype=torch.float64).requires_grad_()
        output = F.conv2d(image, weight, None, stride, padding)
        (gradient,) = torch.autograd.grad(output, weight, along)
        found.append(float((gradient * error.double()).square().sum()))
    return found


def changes_of_kernel(
    x: Tensor, g: Tensor, error: Tensor, *convolution: tuple[int, int], **options: torch.dtype
) -> list[float]:
    """The kernel's sums, which are the same for one and two threads."""
    last, results = error.permute(0, 2, 3, 1).contiguous(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = squared_weight_changes(x, g, last, *convolution, **options)
        assert found is not None
        results.append(found)
    assert torch.equal(*results)
    return results[0].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "stride", "padding"),
    [
        (16, 16, (1, 1), (1, 1), (0, 0)),
        (24, 3, (1, 1), (2, 2), (0, 0)),
        (3, 16, (3, 3), (2, 2), (1, 1)),
        (48, 24, (3, 3), (1, 1), (1, 1)),
        (16, 8, (3, 3), (1, 1), (0, 0)),
        (5, 9, (5, 2), (2, 3), (0, 1)),
        (80, 11, (1, 3), (1, 1), (2, 0)),
    ],
)
def test_squared_weight_changes_are_those_of_each_image(
    inputs: int,
    outputs: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    layout: str,
) -> None:
    x, error = noise(3, inputs, 37, 45), noise(outputs, inputs, *kernel, seed=2)
    g = noise(3, *F.conv2d(x, error, None, stride, padding).shape[1:], seed=3)
    expected = weight_changes(x, g, error, stride, padding)
    found = changes_of_kernel(LAYOUTS[layout](x), LAYOUTS[layout](g), error, stride, padding)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "stride", "padding"),
    [
        (48, 24, (3, 3), (1, 1), (1, 1)),
        (9, 17, (3, 3), (1, 1), (0, 0)),
        (3, 50, (3, 3), (2, 2), (1, 1)),
        (5, 12, (5, 2), (2, 3), (0, 1)),
        (24, 75, (1, 1), (1, 1), (0, 0)),
        (24, 40, (1, 1), (1, 1), (0, 0)),  # too few products: float32
    ],
)
def test_products_in_bfloat16_are_those_of_rounded_values(
    inputs: int,
    outputs: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    layout: str,
) -> None:
    x, error = noise(2, inputs, 21, 18), noise(outputs, inputs, *kernel, seed=2)
    g = noise(2, *F.conv2d(x, error, None, stride, padding).shape[1:], seed=3)
    rounds = outputs * kernel[0] >= 48 and "avx512_bf16" in describe_machine()["instructions"]  # type: ignore[operator]
    a, b = (values.bfloat16() if rounds else values for values in (x, g))
    expected = weight_changes(a, b, error, stride, padding)
    found = changes_of_kernel(
        LAYOUTS[layout](x), LAYOUTS[layout](g), error, stride, padding, products=torch.bfloat16
    )
    assert found == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------------------- SiLU
@pytest.mark.parametrize("shape", [(3, 19, 50, 41), (2, 5, 7), (2, 3, 1, 1)])
@pytest.mark.parametrize("layouts", [("contiguous",) * 2, ("channels-last",) * 2, ("channels-last", "slice")])
def test_gradient_of_silu_and_changes_of_its_output_are_the_formulas_in_float64(
    layouts: tuple[str, str], shape: tuple[int, ...]
) -> None:
    if len(shape) < 4 and layouts != ("contiguous",) * 2:
        pytest.skip("needs four axes")
    scale = float(np.float32(0.0173))
    y, g = noise(*shape) * 4, noise(*shape, seed=1)
    y.view(-1)[:6] = torch.tensor([0.0, -0.0, 80.0, -80.0, 1e4, -1e4])
    wanted = y.double().requires_grad_()
    x = F.silu(wanted)
    (expected,) = torch.autograd.grad(x, wanted, g.double())
    change = (x.detach() / scale).round().clamp(-128, 127) * scale - x.detach()
    sums = (change * g.double()).square().flatten(1).sum(1)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        source = LAYOUTS[layouts[0]](y)
        found = silu_gradient_and_changes(source, LAYOUTS[layouts[1]](g), scale, GRID)
        assert found is not None
        assert found[0].stride() == source.stride()
        torch.testing.assert_close(found[0].double(), expected, rtol=2e-6, atol=1e-7)
        assert found[1].tolist() == pytest.approx(sums.tolist(), rel=1e-5)
        results.append(found)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_silu_of_nan_is_nan_and_what_the_kernel_does_not_read_is_left() -> None:
    y, g = noise(2, 4, 3, 3), noise(2, 4, 3, 3, seed=1)
    y[0, 0, 0, 0] = torch.nan
    found = silu_gradient_and_changes(y, g, 0.1, GRID)
    assert found is not None
    assert found[0].isnan().sum() == found[0][0, 0, 0, 0].isnan() == 1
    assert found[1].isnan().tolist() == [True, False]
    assert silu_gradient_and_changes(y.double(), g.double(), 0.1, GRID) is None
    assert silu_gradient_and_changes(channel_slice(y), g, 0.1, GRID) is None
    assert silu_gradient_and_changes(y, g, 0.1, FP8_E4M3) is None


def test_sensitivity_is_the_same_in_both_forms() -> None:
    scores: dict[str, Any] = {}
    for choice in ("torch", "native"):
        choose_kernel(choice)
        scores[choice] = {s.unit: s.parts for s in measure_fisher(small_quantized(), batched(4), task_loss)}
    for unit, parts in scores["torch"].items():
        assert scores["native"][unit] == pytest.approx(parts, rel=1e-5, abs=0)
