"""The codes behind fake quantization, call by call."""

import pytest
import torch
from torch import nn

from quant import (
    activation_codes,
    activation_quantizers,
    insert,
    place,
    quantized_layers,
    quantizer_calls,
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


def test_calls_are_named_in_the_order_of_the_graph(model):
    calls = quantizer_calls(model)
    assert list(calls) == [f"activation_quantizers.{name}" for name in ("0", "1", "1_1")]
    assert calls["activation_quantizers.0"].endswith("x")
    assert calls["activation_quantizers.1"].startswith("relu")
    assert calls["activation_quantizers.1_1"].startswith("tanh")


def test_codes_are_the_rounded_values(model):
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    codes = activation_codes(model, x)
    image = torch.clamp(torch.round(x / 0.01), -128, 127)
    assert torch.equal(codes["activation_quantizers.0"].float(), image)
    a = model.a(image * 0.01).relu()
    wanted = torch.clamp(torch.round(a.double() / 0.02), -128, 127)
    assert (codes["activation_quantizers.1"].double() - wanted).abs().max() <= 1
    assert (codes["activation_quantizers.1"].double() == wanted).double().mean() > 0.99
    assert codes["activation_quantizers.1_1"].min() < 0


def test_forced_codes_reach_the_next_layer_only(model):
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    free = activation_codes(model, x)
    image = free["activation_quantizers.0"]
    forced = activation_codes(model, x, {"activation_quantizers.0": image + 20})
    assert torch.equal(forced["activation_quantizers.0"], image)
    moved = model.a((image.float() + 20) * 0.01).relu()
    wanted = torch.clamp(torch.round(moved / 0.02), -128, 127)
    assert (forced["activation_quantizers.1"].float() - wanted).abs().max() <= 1
    assert not torch.equal(forced["activation_quantizers.1"], free["activation_quantizers.1"])


def test_quantizers_that_are_off_have_no_codes(model):
    set_mode(model, Mode.OFF)
    with pytest.raises(ValueError, match="switch the quantizers on"):
        activation_codes(model, torch.rand(1, 3, 8, 8))
