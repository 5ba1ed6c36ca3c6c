"""Measured sharing: a scale stays shared where that costs nothing; every figure is that of the plain calibration."""

import pytest
import torch
from quant_networks import folded
from torch import nn

from models.blocks import ConvBlock
from quant import PlacementOptions, Rule, calibrate, insert, measure_sharing, place
from quant.finetuning.distillation import distillation_loss

LOUD = "cat_0"  # joins a quiet and a loud tensor
EVEN = "cat_1"  # joins two alike ones


class TwoConcats(nn.Module):
    """The first concat joins a tensor with one 200 times as large, and the quiet one has a reader of its own."""

    def __init__(self, gain=200.0):
        super().__init__()
        self.quiet, self.loud = ConvBlock(3, 16, 3), ConvBlock(3, 16, 3)
        self.joined, self.alone = ConvBlock(32, 16, 1), ConvBlock(16, 16, 3)
        self.last = ConvBlock(32, 16, 1)
        self.output = nn.Conv2d(16, 4, 1)
        self.gain = gain

    def forward(self, x):
        quiet = self.quiet(x)
        joined = self.joined(torch.cat((quiet, self.loud(x)), 1))
        return self.output(self.last(torch.cat((joined, self.alone(quiet)), 1)))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = folded(TwoConcats())
    with torch.no_grad():
        net.loud.conv.weight.mul_(net.gain)
        net.joined.conv.weight[:, 16:].div_(net.gain)
    return net


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(2, 3, 16, 16, generator=generator) for _ in range(3)]


def error_by_hand(network, images, rules):
    """Output error of the plan with these rules, by the ordinary calibration."""
    model = insert(network, place(network, rules=rules)).eval()
    calibrate(model, images)
    with torch.no_grad():
        return sum(float(distillation_loss(model(x), network(x))) for x in images) / len(images)


def test_a_concat_is_split_where_sharing_costs_and_only_there(network, images):
    result = measure_sharing(network, PlacementOptions(), (), images, images)
    found = {decision.concat: decision for decision in result.decisions}
    assert {name: decision.shared for name, decision in found.items()} == {LOUD: False, EVEN: True}
    assert found[LOUD].cost > 1  # the quiet tensor had a handful of codes
    assert result.placement == place(network, rules=(Rule(LOUD, share=False),))
    assert result.error_decided < result.error_all_shared / 2


def test_errors_are_those_of_the_ordinary_calibration(network, images):
    """Merged histograms of tensors give the scales that a calibration of each plan by itself gives."""
    result = measure_sharing(network, PlacementOptions(), (), images, images)
    found = {decision.concat: decision for decision in result.decisions}
    shared = error_by_hand(network, images, ())
    assert result.error_all_shared == pytest.approx(shared, rel=1e-6)
    split = error_by_hand(network, images, (Rule(LOUD, share=False),))
    assert found[LOUD].error_split == pytest.approx(split, rel=1e-6)
    assert result.error_decided == found[LOUD].error_split


def test_a_large_tolerance_keeps_every_scale_shared(network, images):
    result = measure_sharing(network, PlacementOptions(), (), images, images, tolerance=1e6)
    assert all(decision.shared for decision in result.decisions)
    assert result.placement == place(network)


@pytest.mark.parametrize("said", [True, False])
def test_concats_with_a_rule_are_not_measured(network, images, said):
    rules = (Rule(LOUD, share=said),)
    result = measure_sharing(network, PlacementOptions(), rules, images, images)
    assert [decision.concat for decision in result.decisions] == [EVEN]
    assert result.placement.concats[LOUD] is said


def test_plain_data_names_every_figure(network, images):
    content = measure_sharing(network, PlacementOptions(), (), images, images).as_dict()
    assert [entry["concat"] for entry in content["concats"]] == [LOUD, EVEN]
    assert set(content["concats"][0]) == {"concat", "shared", "error_shared", "error_split", "cost"}
