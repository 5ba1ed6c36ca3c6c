"""Autocast: what a quantized layer multiplies lies exactly on its grid, and the gradients are those of float32."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from quant_networks import small_images, small_quantized
from torch import Tensor, fx, nn

from quant import (
    FakeQuantize,
    Mode,
    PlacementOptions,
    Rule,
    activation_quantizers,
    calibrate,
    insert,
    place,
    quantized_layers,
)

HALVES = (torch.bfloat16, torch.float16)
Operands = list[tuple[Tensor, Tensor]]


@contextmanager
def consumed_operands(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> Iterator[Operands]:
    """Inputs and weights of every convolution, in the type in which autocast multiplies them."""
    seen: Operands = []
    convolve: Callable[..., Tensor] = torch.nn.functional.conv2d

    def spy(input: Tensor, weight: Tensor, *rest: object) -> Tensor:
        seen.append((input.detach().to(dtype).double(), weight.detach().to(dtype).double()))
        return convolve(input, weight, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "conv2d", spy)
        yield seen


def are_multiples(values: Tensor, codes: Tensor) -> bool:
    """Whether values = step * codes with one step, exactly; products of these numbers are exact in float64."""
    at = codes.abs().argmax()
    return bool(torch.equal(values * codes.flatten()[at], codes * values.flatten()[at]))


def one_conv(signed: bool = True, channels: int = 24) -> tuple[fx.GraphModule, Tensor]:
    """A quantized 3x3 convolution and calibrated inputs."""
    network = nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1)).eval()
    x = torch.randn(2, channels, 9, 9) if not signed else torch.randn(2, channels, 9, 9) * 3
    x = x if signed else x.abs().clamp(max=1)
    model = insert(network, place(network, PlacementOptions(quantize_outputs=True, unsigned=not signed)))
    calibrate(model, [x])
    for quantizer in activation_quantizers(model).values():
        quantizer.log_scale.requires_grad_()  # that of the input, too
    return model, x


@pytest.mark.parametrize("dtype", HALVES)
def test_a_quantizer_gives_exactly_scale_times_code(dtype: torch.dtype) -> None:
    quantizer = FakeQuantize()
    quantizer.mode = Mode.QUANTIZE
    quantizer.set_scale(0.0173)
    x = torch.randn(4000).to(dtype)
    with torch.autocast("cpu", dtype):
        found = quantizer(x.requires_grad_())
    scale = quantizer.scale
    codes = torch.round(x.detach().float() * (1 / scale)).clamp(-128, 127)
    assert torch.equal(found.detach().float(), codes * scale)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("signed", [True, False])
def test_a_convolution_multiplies_codes(
    dtype: torch.dtype, signed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = one_conv(signed)
    layer = next(iter(quantized_layers(model).values()))
    scale = next(iter(activation_quantizers(model).values())).scale
    with consumed_operands(monkeypatch, dtype) as seen, torch.autocast("cpu", dtype):
        model.train()(x)
    ((input, weight),) = seen
    low, high = (-128, 127) if signed else (0, 255)
    assert are_multiples(input, torch.round(x * (1 / scale)).clamp(low, high).double())
    for channel, step in enumerate(layer.weight_quantizer.scale):
        codes = torch.round(layer.weight[channel].detach() * (1 / step)).clamp(-127, 127)
        assert are_multiples(weight[channel], codes.double())


@pytest.mark.parametrize("dtype", HALVES)
def test_every_layer_of_a_network_multiplies_codes(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_quantized().train()
    entered: list[tuple[Tensor, Tensor]] = []
    for layer in quantized_layers(model).values():
        layer.register_forward_hook(
            lambda module, inputs, _output: entered.append(
                (module.input_grid[0].scale, inputs[0].detach().float())
            )
        )
    with consumed_operands(monkeypatch, dtype) as seen, torch.autocast("cpu", dtype):
        model(small_images(2))
    quantized = seen[: len(entered)]  # the last convolution stays float
    assert len(quantized) == len(seen) - 1 > 4
    for (input, _), (scale, values) in zip(quantized, entered, strict=True):
        assert are_multiples(input, torch.round(values / scale).double())


@pytest.mark.parametrize("dtype", HALVES)
def test_the_result_is_the_rounded_integer_sum_times_its_step(dtype: torch.dtype) -> None:
    model, x = one_conv()
    layer = next(iter(quantized_layers(model).values()))
    scale, steps = next(iter(activation_quantizers(model).values())).scale, layer.weight_quantizer.scale
    codes = torch.round(x * (1 / scale)).clamp(-128, 127).double()
    weight = torch.round(layer.weight.detach() * (1 / steps.reshape(-1, 1, 1, 1))).clamp(-127, 127).double()
    sums = nn.functional.conv2d(codes, weight, padding=1)  # integers, exact in float64
    with torch.autocast("cpu", dtype):
        found = model.train()(x).detach()
    shape = (1, -1, 1, 1)
    exact = sums * (scale * steps).double().reshape(shape) + layer.bias.detach().double().reshape(shape)
    one_rounding = torch.finfo(dtype).eps / 2 * sums.abs() * (scale * steps).double().reshape(shape)
    assert bool(((found.double() - exact).abs() <= one_rounding * 1.01 + 1e-6).all())


def test_float16_sums_do_not_overflow() -> None:
    model, x = one_conv(channels=64)
    with torch.no_grad():
        model.get_submodule("0").weight.fill_(1.0)  # the largest code in every place: sums up to 9e6
    calibrate(model, [x.fill_(2.0)], "minmax", "minmax")
    with torch.autocast("cpu", torch.float16):
        found = model.train()(x).detach().float()
    expected = 2.0 * 64 * 9
    assert float(found.max()) == pytest.approx(expected, rel=1e-3)


def gradients(model: fx.GraphModule, x: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Gradients of a weighted sum of squares, for every parameter and the input."""
    model = copy.deepcopy(model).train()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        output = model(x)
    (
        output.float().square() * torch.linspace(-1, 2, output[0].numel()).reshape(output[0].shape)
    ).mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"x": x.grad, **found}  # type: ignore[dict-item]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.01), (torch.float16, 0.002)])
def test_the_gradients_of_a_layer_are_those_of_float32(dtype: torch.dtype, tolerance: float) -> None:
    model, x = one_conv()
    wanted, found = gradients(model, x, None), gradients(model, x, dtype)
    assert len(wanted) == 5  # x, weight, bias, and both scales
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < tolerance, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.05)])
def test_the_gradients_of_a_network_are_those_of_float32(dtype: torch.dtype, tolerance: float) -> None:
    """Here a sum that was rounded before an activation may fall on another code behind it."""
    model, x = small_quantized(), small_images(2, size=32)
    wanted, found = gradients(model, x, None), gradients(model, x, dtype)
    weights = [name for name in wanted if name.endswith("weight")]
    assert len(weights) > 5
    for name in weights:
        assert float((found[name] - wanted[name]).norm() / wanted[name].norm()) < tolerance, name


def test_a_layer_that_reads_two_grids_works_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoLevels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.coarse = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
            self.head = nn.Conv2d(16, 16, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.head(torch.relu(self.fine(x))), self.head(torch.relu(self.coarse(x)) * 5)

    network = TwoLevels().eval()
    model = insert(network, place(network, PlacementOptions(quantize_outputs=True), (Rule("*", bits=4),)))
    x = torch.randn(2, 16, 6, 6)
    calibrate(model, [x])
    head = quantized_layers(model)["head"]
    assert head.input_grid == ()
    with consumed_operands(monkeypatch, torch.float64) as seen, torch.autocast("cpu", torch.bfloat16):
        model.train()(x)
    steps = head.weight_quantizer.scale.reshape(-1, 1, 1, 1)
    expected = (torch.round(head.weight.detach() / steps).clamp(-7, 7) * steps).double()
    heads = [weight for _, weight in seen if torch.equal(weight, expected)]
    assert len(heads) == 2
