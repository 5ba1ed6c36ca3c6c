"""Repairs of a calibrated model, against exhaustive search, plain means and the outputs of the network."""

import itertools

import pytest
import torch
from quant_networks import small_images, small_net
from torch import nn

from core.grid import Grid
from quant import (
    Mode,
    Rule,
    activation_quantizers,
    calibrate,
    insert,
    place,
    quantized_layers,
    reconstruct,
    set_mode,
)
from quant.finetuning.distillation import distillation_loss
from quant.repair.reconstruction import choose_codes, round_by_output

BITS = (Rule("*", bits=4),)


def calibrated(rules=BITS):
    network = small_net()
    model = insert(network, place(network, rules=rules)).eval()
    calibrate(model, [small_images(8)])
    return network, model


def row_error(codes, scale, x, y):
    return float((codes * scale @ x - y).square().sum())


def test_no_row_is_worse_than_nearest_and_most_reach_the_best_of_all_roundings():
    generator = torch.Generator().manual_seed(0)
    position = 6 * torch.rand(40, 7, generator=generator) - 3
    scale = 0.1 + torch.rand(40, 1, generator=generator)
    mixing = torch.randn(7, 7, generator=generator)
    x = mixing @ torch.randn(7, 50, generator=generator) + 1
    y = (position * scale) @ x
    codes = choose_codes(position, scale, x @ x.T, y @ x.T, Grid(3, symmetric=True))
    reached = 0
    for row in range(40):
        choices = itertools.product(*[{float(p.floor()), float(p.ceil())} for p in position[row]])
        best = min(row_error(torch.tensor(c), scale[row], x, y[row]) for c in choices)
        found = row_error(codes[row], scale[row], x, y[row])
        assert set((codes[row] - position[row]).abs().lt(1).tolist()) == {True}
        assert found <= row_error(position[row].round(), scale[row], x, y[row]) * (1 + 1e-5)
        assert found >= best * (1 - 1e-5)
        reached += found <= best * 1.05
    assert reached >= 20


@pytest.mark.parametrize("kind", ["convolution", "strided", "linear"])
def test_rounding_looks_at_the_layers_real_output(kind):
    """The two reported errors are those of running the layer, before and after."""
    torch.manual_seed(0)
    layers = {
        "convolution": nn.Conv2d(16, 16, 3, padding=1),
        "strided": nn.Conv2d(16, 16, 3, stride=2, dilation=2),
        "linear": nn.Linear(16, 16),
    }
    network = nn.Sequential(
        layers[kind], nn.ReLU(), type(layers[kind])(16, 4, *((1,) if kind != "linear" else ()))
    )
    x = torch.randn(4, 9, 16) if kind == "linear" else torch.randn(4, 16, 9, 9)
    model = insert(network, place(network, rules=BITS)).eval()
    calibrate(model, [x])
    layer = quantized_layers(model)["0"]
    with torch.no_grad():
        target = network[0](x)
        x = next(iter(activation_quantizers(model).values()))(x)  # layers read what is on the grid
        before = float((layer(x) - target).square().mean())
        nearest, rounded = round_by_output(layer, x, target)
        after = float((layer(x) - target).square().mean())
    assert (nearest, rounded) == (pytest.approx(before, rel=1e-4), pytest.approx(after, rel=1e-4))
    assert rounded < 0.9 * nearest


def test_bias_correction_leaves_no_mean_error_in_any_channel():
    network, model = calibrated()
    images = small_images(8)
    before = channel_means(network, model, images)
    reconstruct(model, images, rounding=False)
    after = channel_means(network, model, images)
    assert max(before.values()) > 1e-3
    assert max(after.values()) < 1e-5


def channel_means(network, model, images):
    """Largest difference of mean channel outputs, quantized against float, per quantized layer; by plain hooks."""
    found = [channel_outputs(source, images, quantized_layers(model)) for source in (network, model)]
    return {name: float((found[0][name] - found[1][name]).abs().max()) for name in found[0]}


def channel_outputs(source, images, names):
    outputs = {}

    def keep(name):
        return lambda module, inputs, output: outputs.__setitem__(name, output.mean((0, 2, 3)))

    handles = [source.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        source(images)
    for handle in handles:
        handle.remove()
    return outputs


def test_rounding_brings_the_networks_output_closer():
    network, model = calibrated((Rule("*conv", bits=3),))  # the weights: activations keep 8 bits
    images, fresh = small_images(8), small_images(8, seed=5)
    with torch.no_grad():
        before = float(distillation_loss(model(fresh), network(fresh)))
        repairs = reconstruct(model, images)
        after = float(distillation_loss(model(fresh), network(fresh)))
    assert {repair.layer for repair in repairs} == set(quantized_layers(model))
    assert all(repair.error_rounded <= repair.error_nearest * (1 + 1e-6) for repair in repairs)
    assert after < 0.8 * before


def test_rounded_weights_lie_on_their_grid():
    _, model = calibrated()
    reconstruct(model, small_images(8), correct_bias=False)
    for layer in quantized_layers(model).values():
        quantized = layer.weight_quantizer(layer.weight)
        torch.testing.assert_close(quantized, layer.weight, rtol=1e-5, atol=1e-7)


def test_scales_that_follow_the_weights_stay_on_the_new_grid():
    network = small_net()
    model = insert(network, place(network, rules=BITS), learn_scales=False).eval()
    calibrate(model, [small_images(8)])
    reconstruct(model, small_images(8))
    x = small_images(2, seed=9)
    with torch.no_grad():
        expected = model.eval()(x)
        torch.testing.assert_close(model.train()(x), expected, rtol=1e-4, atol=1e-5)


class Twice(nn.Module):
    """One layer with two inputs, and one without a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.shared = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)
        self.bare, self.output = nn.Conv2d(16, 16, 1, bias=False), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.output(self.bare(self.shared(self.shared(x).relu()).relu()).relu())


def test_layers_called_twice_and_missing_biases_are_left_alone():
    network = Twice().eval()
    model = insert(network, place(network, rules=BITS)).eval()
    calibrate(model, [small_images(4)])
    repairs = {repair.layer: repair for repair in reconstruct(model, small_images(4))}
    assert torch.equal(model.shared.weight, network.shared.weight)
    assert "shared" not in repairs
    assert repairs["bare"].shift is None
    assert repairs["bare"].error_rounded <= repairs["bare"].error_nearest
    set_mode(model, Mode.OFF)
    assert model(small_images(1)).shape == network(small_images(1)).shape
