"""A module for export: what the network computes, with one named submodule for each of its nodes."""

import torch
from quant_networks import small_images, small_quantized
from torch import nn

from quant import placement_of, with_named_nodes


class Mixed(nn.Module):
    """A module called twice, functions, a method and a parameter of the network's own."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 1), nn.ReLU()
        self.offset = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x):
        x = self.act(self.conv(x)) + self.offset
        return self.act(torch.cat([x, x.transpose(2, 3)], 1))


def test_results_and_parameters_are_those_of_the_network():
    network = Mixed().eval()
    module, names = with_named_nodes(network)
    images = small_images()
    assert torch.equal(module(images), network(images))
    assert list(names.values()) == ["conv", "act_0", "add", "transpose", "cat", "act_1"]
    assert len(set(names)) == len(names)
    for scope in names:
        module.get_submodule(scope)
    assert {id(p) for p in module.parameters()} == {id(p) for p in network.parameters()}
    assert not module.training


def test_quantizers_are_named_after_their_tensors():
    model = small_quantized()
    module, names = with_named_nodes(model)
    images = small_images()
    with torch.no_grad():
        assert torch.equal(module(images), model(images))
    tensors = [site.name for group in placement_of(model).groups for site in group.tensors]
    assert sorted(n for n in names.values() if n.endswith("/quantizer")) == sorted(
        f"{t}/quantizer" for t in tensors
    )
    layers = {site.layer for site in placement_of(model).weights}
    assert layers <= set(names.values())
