"""The codes behind fake quantization, call by call."""

import pytest
import torch
from torch import nn

from quant import (
    activation_codes,
    activation_quantizers,
    insert,
    place,
    placement_of,
    quantized_layers,
    set_mode,
)
from quant.fake_quantize import Mode


class TwoBranches(nn.Module):
    """Two convolutions whose results meet in a concat: one quantizer, called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3)
        self.c, self.d = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x):
        x = torch.cat([self.a(x).relu(), self.b(x).tanh()], 1)
        return self.d(self.c(x).relu())


@pytest.fixture
def model():
    torch.manual_seed(0)
    network = TwoBranches().eval()
    quantized = insert(network, place(network))
    for index, quantizer in enumerate(activation_quantizers(quantized).values()):
        quantizer.set_scale(0.01 * (index + 1))
    for layer in quantized_layers(quantized).values():
        layer.weight_quantizer.set_scale(layer.weight_quantizer.amax_scale(layer.weight), layer.weight)
    set_mode(quantized, Mode.QUANTIZE)
    return quantized.eval()


def test_codes_are_named_as_the_tensors_of_the_placement(model):
    codes = activation_codes(model, torch.rand(1, 3, 8, 8))
    assert list(codes) == [site.name for group in placement_of(model).groups for site in group.tensors]
    assert list(codes) == ["input.x", "relu_0", "tanh"]


def test_codes_are_the_rounded_values(model):
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    codes = activation_codes(model, x)
    image = torch.clamp(torch.round(x / 0.01), -128, 127)
    assert torch.equal(codes["input.x"].float(), image)
    a = model.a(image * 0.01).relu()
    wanted = torch.clamp(torch.round(a.double() / 0.02), -128, 127)
    assert (codes["relu_0"].double() - wanted).abs().max() <= 1
    assert (codes["relu_0"].double() == wanted).double().mean() > 0.99
    assert codes["tanh"].min() < 0


def test_forced_codes_reach_the_next_layer_only(model):
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    free = activation_codes(model, x)
    image = free["input.x"]
    forced = activation_codes(model, x, {"input.x": image + 20})
    assert torch.equal(forced["input.x"], image)
    moved = model.a((image.float() + 20) * 0.01).relu()
    wanted = torch.clamp(torch.round(moved / 0.02), -128, 127)
    assert (forced["relu_0"].float() - wanted).abs().max() <= 1
    assert not torch.equal(forced["relu_0"], free["relu_0"])


def test_quantizers_that_are_off_have_no_codes(model):
    set_mode(model, Mode.OFF)
    with pytest.raises(ValueError, match="switch the quantizers on"):
        activation_codes(model, torch.rand(1, 3, 8, 8))
