"""Equalisation: even ranges, the same function, and nothing touched where that cannot be."""

import pytest
import torch
from torch import nn

from quant import equalize


class Chain(nn.Module):
    """Layers in a row with an activation between the first two, a depthwise one, and a branch at the end."""

    def __init__(self, activation):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.third, self.left, self.right = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)
        self.activation, self.relu = activation, nn.ReLU()
        with torch.no_grad():
            self.first.weight *= torch.logspace(-2, 2, 8)[:, None, None, None]

    def forward(self, x):
        x = self.relu(self.third(self.second(self.activation(self.first(x)))))
        return self.left(x) + self.right(x)


def ranges(made, read):
    return made.weight.flatten(1).abs().amax(1), read.flatten(1).abs().amax(1)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.1), nn.Identity()])
def test_the_function_stays_and_the_ranges_meet(activation):
    network = Chain(activation).double()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    result = equalize(network)
    assert result.pairs == (("first", "second"), ("second", "third"))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(result.network(x), network(x), rtol=1e-9, atol=1e-12)
    same = result.network
    for made, read in ((same.first, same.second.weight), (same.second, same.third.weight.transpose(0, 1))):
        left, right = ranges(made, read)
        torch.testing.assert_close(left, right, rtol=0.01, atol=0)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_float32_stays_within_rounding():
    network = Chain(nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    expected = network(x)
    error = (equalize(network).network(x) - expected).abs().max() / expected.abs().max()
    assert error.item() < 1e-5


def test_silu_and_branches_are_left_alone():
    network = Chain(nn.SiLU())
    result = equalize(network)
    assert result.pairs == (("second", "third"),)
    assert result.left_alone == (("first", "second"),)
    assert torch.equal(result.network.first.weight, network.first.weight)
    assert torch.equal(result.network.left.weight, network.left.weight)


def test_dead_channels_stay():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        network[0].weight[1] = 0
        network[2].weight[:, 2] = 0
    found = equalize(network).network
    assert torch.equal(found[0].weight[2], network[0].weight[2])
    assert torch.equal(found[2].weight[:, 1], network[2].weight[:, 1])
    assert all(bool(torch.isfinite(value).all()) for value in found.state_dict().values())
