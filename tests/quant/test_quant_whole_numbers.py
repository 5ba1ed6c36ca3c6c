"""Evaluation multiplies codes: held against 64-bit integers, and against layouts that would round floats otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from quant import Mode, PlacementOptions, activation_quantizers, insert, place, quantized_layers, set_mode


class Wide(nn.Module):
    """Two convolutions with a chunk, a concat and a pool between them, so that codes go through transparent nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 32, 3, padding=1)
        self.act = nn.SiLU()
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.second = nn.Conv2d(32, 32, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.act(self.first(x)).chunk(2, 1)
        return self.second(torch.cat([self.pool(a), b], 1))


def quantized(network: nn.Module, inputs: Tensor) -> fx.GraphModule:
    options = PlacementOptions(quantize_outputs=True)
    model = insert(network.eval(), place(network, options), learn_scales=True)
    for quantizer in activation_quantizers(model).values():
        quantizer.set_scale(float(inputs.abs().max()) / 100)
    for layer in quantized_layers(model).values():
        layer.weight_quantizer.set_scale(layer.weight_quantizer.amax_scale(layer.weight), layer.weight)
    set_mode(model, Mode.QUANTIZE)
    return model.eval()


def integer_convolution(codes: np.ndarray, weight: np.ndarray, padding: int, groups: int) -> np.ndarray:
    """Convolution, stride 1, in 64-bit integers, tap by tap."""
    padded = np.pad(codes, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    outputs, per_group, height, width = weight.shape
    rows, columns = padded.shape[2] - height + 1, padded.shape[3] - width + 1
    sums = np.zeros((len(codes), outputs, rows, columns), np.int64)
    for output in range(outputs):
        first = output // (outputs // groups) * per_group
        for i in range(height):
            for j in range(width):
                window = padded[:, first : first + per_group, i : i + rows, j : j + columns]
                sums[:, output] += (window * weight[output, :, i, j][None, :, None, None]).sum(1)
    return sums


def test_a_layer_computes_what_integers_compute() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 16, 9, 9)
    model = quantized(Wide(), images)
    seen = []
    layer = quantized_layers(model)["second"]
    layer.register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[0].clone(), output.clone()))
    )
    with torch.inference_mode():
        model(images)
    values, found = seen[0]
    scale, steps = layer.input_grid[0].scale, layer.weight_quantizer.scale.detach()
    codes = torch.round(values / scale).numpy().astype(np.int64)
    weight = torch.round(layer.weight_quantizer(layer.weight).detach() / steps.reshape(-1, 1, 1, 1))
    sums = integer_convolution(codes, weight.numpy().astype(np.int64), padding=1, groups=2)
    steps_of_products = (scale * steps).numpy().reshape(1, -1, 1, 1)
    bias = layer.bias.detach().numpy().reshape(1, -1, 1, 1)
    expected = sums.astype(np.float32) * steps_of_products + bias
    assert found.numpy().tobytes() == expected.astype(np.float32).tobytes()


def test_the_order_of_the_channels_does_not_change_a_bit() -> None:
    torch.manual_seed(1)
    images = torch.randn(1, 256, 8, 8)
    network = nn.Sequential(nn.Conv2d(256, 16, 3))
    order = torch.randperm(256)
    shuffled = nn.Sequential(nn.Conv2d(256, 16, 3))
    with torch.no_grad():
        shuffled[0].weight.copy_(network[0].weight[:, order])
        shuffled[0].bias.copy_(network[0].bias)
    plain, other = quantized(network, images), quantized(shuffled, images)
    with torch.inference_mode():
        assert torch.equal(plain(images), other(images[:, order]))
    set_mode(plain, Mode.OFF)
    set_mode(other, Mode.OFF)
    with torch.inference_mode():  # the same sums over floats do depend on it, so the check above can fail
        assert not torch.equal(plain(images), other(images[:, order]))


@pytest.mark.parametrize("groups", [1, 2])
def test_every_kind_of_layer_agrees_with_its_float_form(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # rules leave transposed convolutions float; a placement that was edited by hand may have them
    monkeypatch.setattr("quant.placement.placer.unsupported_reason", lambda *_: None)
    torch.manual_seed(2)
    transposed = nn.Sequential(nn.ConvTranspose2d(32, 32, 2, stride=2, groups=groups))
    cases = [
        (transposed, torch.randn(2, 32, 5, 5)),
        (nn.Sequential(nn.Conv1d(32, 32, 3, groups=groups)), torch.randn(2, 32, 9)),
        (nn.Sequential(nn.Linear(32, 16)), torch.randn(4, 32)),
    ]
    for network, inputs in cases:
        model = quantized(network, inputs)
        layer = next(iter(quantized_layers(model).values()))
        assert layer.input_grid
        with torch.no_grad():
            whole = model(inputs)
        layer.input_grid = ()
        with torch.no_grad():
            floating = model(inputs)
        torch.testing.assert_close(whole, floating, rtol=1e-5, atol=1e-5)
        assert not torch.equal(whole, torch.zeros_like(whole))


class SharedHead(nn.Module):
    """One convolution over two levels, each with a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, stride=2)
        self.head = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(torch.relu(self.fine(x))), self.head(torch.relu(self.coarse(x)))


def test_a_layer_with_two_input_grids_works_on_floats() -> None:
    torch.manual_seed(3)
    images = torch.randn(1, 16, 9, 9)
    model = quantized(SharedHead(), images)
    layers = quantized_layers(model)
    targets = {layers["fine"].input_grid, layers["coarse"].input_grid}
    assert len(targets) == 1  # both read the image
    assert layers["head"].input_grid == ()
    with torch.inference_mode():
        assert all(bool(torch.isfinite(level).all()) for level in model(images))


def test_a_quantizer_that_is_off_leaves_its_reader_to_floats() -> None:
    torch.manual_seed(4)
    images = torch.randn(1, 16, 9, 9)
    model = quantized(Wide(), images)
    layer = quantized_layers(model)["second"]
    layer.input_grid[0].mode = Mode.OFF
    seen = []
    layer.register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[0].clone(), output.clone()))
    )
    with torch.inference_mode():
        model(images)
        values, found = seen[0]
        weight = layer.weight_quantizer(layer.weight)
        assert torch.equal(found, torch.nn.functional.conv2d(values, weight, layer.bias, padding=1, groups=2))
