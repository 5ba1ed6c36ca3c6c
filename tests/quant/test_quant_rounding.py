"""The arithmetic of fake quantization against float64 loops, at borders, in pieces and in every memory layout."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from core.grid import Grid
from quant import rounding
from quant.native.kernel import choose_kernel
from quant.rounding import channel_gradients, gradients, round_to_grid

GRIDS = [
    Grid(bits, signed, symmetric) for bits in (2, 5, 8) for signed, symmetric in ((True, False), (True, True))
]
GRIDS += [Grid(4, signed=False), Grid(8, signed=False)]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second column": lambda x: torch.stack([x, x], -1).flatten(3)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3),
}


@pytest.fixture(params=["torch", "native"], autouse=True)
def kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    choose_kernel(request.param)
    yield
    choose_kernel("auto")


def loop(x: Tensor, g: Tensor, scale: float, low: int, high: int) -> tuple[list[float], float]:
    """The equations of quant/rounding.py value by value, sums in full precision; codes as float32 chooses them."""
    inverse = torch.tensor(1.0) / torch.tensor(scale)
    grad_x, terms = [], []
    for value, code, along in zip(
        x.flatten().tolist(), torch.round(x * inverse).flatten().tolist(), g.flatten().tolist(), strict=True
    ):
        inside = low <= code <= high
        y = scale * min(max(code, low), high)
        grad_x.append(along if inside else 0.0)
        terms.append(along * (y - value if inside else y))
    return grad_x, math.fsum(terms)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("piece", [700, 1 << 18])
def test_gradients_are_those_of_a_float64_loop(
    layout: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "PIECE", piece)
    x = LAYOUTS[layout](torch.randn(2, 6, 20, 20) * 2)
    g, scale = torch.randn(x.shape), torch.tensor(0.0173)
    grad_x, grad_log_scale = gradients(g, x, scale, Grid(), learned=True)
    expected_x, expected = loop(x, g, float(scale), -128, 127)
    assert 0.0 in expected_x
    assert grad_x.flatten().tolist() == expected_x
    assert grad_log_scale is not None
    assert float(grad_log_scale) == pytest.approx(expected, rel=1e-5)
    assert grad_x.stride() == torch.empty_like(x).stride()
    assert gradients(g, x, scale, Grid(), learned=False)[1] is None


def test_a_scale_keeps_its_gradient_where_values_and_gradients_have_a_mean() -> None:
    """Here <g, y> and <m * g, x> are thousands of times as large as their difference."""
    torch.manual_seed(0)
    x, scale = torch.randn(4, 16, 40, 40) + 1, torch.tensor(0.0173)
    g = 1 + 0.1 * torch.randn(x.shape)
    _, found = gradients(g, x, scale, Grid(), learned=True)
    _, expected = loop(x, g, float(scale), -128, 127)
    assert found is not None
    assert float(found) == pytest.approx(expected, rel=1e-3)
    values = x.detach().requires_grad_()
    step, zero_point = scale.reshape(1).requires_grad_(), torch.zeros(1, requires_grad=True)
    y = torch._fake_quantize_learnable_per_tensor_affine(values, step, zero_point, -128, 127, 1.0)
    y.backward(g)
    assert step.grad is not None
    assert float(step.grad * scale) == pytest.approx(expected, rel=1e-3)
    apart = torch.dot(g.flatten(), y.detach().flatten()) - torch.dot(g.flatten(), x.flatten())
    assert float(apart) != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.1, 0.0173])
def test_the_gradient_passes_where_the_code_is_on_the_grid(grid: Grid, scale: float) -> None:
    step = torch.tensor(scale)
    borders = (torch.tensor([grid.low - 0.5, grid.high + 0.5]) * step).repeat_interleave(41)
    bits = borders.view(torch.int32) + torch.arange(-20, 21, dtype=torch.int32).repeat(2)
    x = bits.view(torch.float32)  # every float32 number near a border
    codes = torch.round(x * step.reciprocal())
    inside = (codes >= grid.low) & (codes <= grid.high)
    assert 0 < int(inside.sum()) < len(x)
    for grad_x, _ in (
        gradients(torch.ones(len(x)), x, step, grid, learned=True),
        channel_gradients(torch.ones(len(x)), x, step.reshape(1), grid, learned=True),
    ):
        assert torch.equal(grad_x.bool(), inside)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("piece", [700, 1 << 18])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_values_are_those_of_torch_in_the_layout_of_the_input(
    layout: str, piece: int, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "PIECE", piece)
    x = LAYOUTS[layout](torch.randn(2, 6, 20, 20))
    before = x.clone()
    y = round_to_grid(x, torch.tensor(0.031), grid)
    assert torch.equal(y, torch.fake_quantize_per_tensor_affine(x, 0.031, 0, grid.low, grid.high))
    assert y.stride() == torch.empty_like(x).stride()
    assert torch.equal(x, before)


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_are_those_of_torch_per_channel(axis: int) -> None:
    weight, scale = torch.randn(6, 6, 3, 3), torch.rand(6) * 0.02 + 0.01
    steps = scale.reshape((-1, 1, 1, 1) if axis == 0 else (1, -1, 1, 1))
    zero_point = torch.zeros(6, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(weight, scale, zero_point, axis, -127, 127)
    assert torch.equal(round_to_grid(weight, steps, Grid(symmetric=True)), expected)


def test_a_value_that_is_not_a_number_stays_one_and_infinities_take_the_ends() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf])
    y = round_to_grid(x, torch.tensor(0.5), Grid())
    assert math.isnan(y[0])
    assert y[1:].tolist() == [63.5, -64.0]
