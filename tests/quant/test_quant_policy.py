"""Policy rules: the last match decides, a rule without effect is an error, and the values of a plan obey them."""

import inspect

import pytest
import torch
from fine_tuning import fine_tune
from quant_networks import NeckNet, SmallNet, folded, groups_of, small_images, small_net
from torch import nn

from core.errors import PolicyError, TraceError
from quant import (
    Rule,
    activation_quantizers,
    calibrate,
    insert,
    place,
    quantized_layers,
)


def neck_plan(*rules):
    return place(folded(NeckNet()), rules=rules)


def group_named(placement, name):
    return next(group for group in placement.groups if group.name == name)


# -- what rules do


def test_the_last_match_wins():
    placement = neck_plan(
        Rule("neck.*", bits=4),
        Rule("neck.spp.conv", bits=6),
        Rule("neck.down?.conv", bits=5),
        Rule("neck.down4.*", bits=8),
    )
    bits = {site.layer: site.grid.bits for site in placement.weights}
    assert bits["stage3.conv"] == 8
    assert bits["neck.top_down4.conv"] == 4
    assert bits["neck.spp.conv"] == 6
    assert bits["neck.down5.conv"] == 5
    assert bits["neck.down4.conv"] == 8


def test_a_rule_that_says_nothing_about_a_field_leaves_the_earlier_answer():
    placement = neck_plan(Rule("neck.*.act", bits=4), Rule("neck.*.act", observer="entropy"))
    group = group_named(placement, "neck.top_down3.act")
    assert (group.grid.bits, group.observer) == (4, "entropy")


def test_a_rule_on_any_member_holds_for_the_group():
    placement = neck_plan(Rule("neck.down4.act", bits=6, observer="percentile"))
    group = group_named(placement, "stage3.act")
    assert (group.grid.bits, group.observer) == (6, "percentile")
    assert all(group.grid.bits == 8 for group in placement.groups if group.name != "stage3.act")


def test_layers_are_kept_float_by_name():
    placement = neck_plan(Rule("head.*", keep_float=True), Rule("head.cls.*", keep_float=False))
    assert placement.kept_float["head.box.1.conv1.conv"] == "policy rule head.*"
    assert not any(name.startswith("head.cls") for name in placement.kept_float)
    assert "head.cls.1.output" in {site.layer for site in placement.weights}


def test_layers_are_kept_float_by_the_tensor_they_read():
    """Through concats and pooling, too; the tensor itself is then quantized for nobody."""
    placement = neck_plan(Rule("neck.spp.act", keep_float=True))
    assert {
        name for name, reason in placement.kept_float.items() if reason == "policy rule neck.spp.act"
    } == {
        "neck.top_down4.conv",
        "neck.bottom_up5.conv",
    }
    assert "neck.spp.act" not in {site.name for group in placement.groups for site in group.tensors}


def test_a_tensor_that_stays_float_is_not_quantized_for_a_sum_either():
    network = small_net()
    assert groups_of(place(network))["stem.act"][0]["stem.act"] == ("block_rep_conv", "add", "side_conv")
    placement = place(network, rules=(Rule("stem.act", keep_float=True),))
    assert "stem.act" not in groups_of(placement)
    assert {"block.rep.conv", "side.conv"} <= set(placement.kept_float)


def test_a_tensor_that_only_an_average_reads_can_be_named():
    """The average's input is a group without layers; a rule on it is no rule without effect."""
    network = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1)
    ).eval()
    placement = place(network, rules=(Rule("1", scale=0.25), Rule("2", observer="minmax")))
    assert group_named(placement, "1").scale == 0.25
    assert group_named(placement, "1").layers == ()
    assert group_named(placement, "2").observer == "minmax"
    kept = place(network, rules=(Rule("1", keep_float=True),))
    assert "1" not in groups_of(kept)


def test_fixed_scales_survive_calibration_and_training():
    network = small_net()
    rules = (Rule("input.x", scale=1 / 255), Rule("stem.act", bits=4))
    model = insert(network, place(network, rules=rules))
    result = calibrate(model, [small_images()])
    assert result.groups[0].method == "fixed"
    quantizer = activation_quantizers(model)["input.x"]
    other = activation_quantizers(model)["stem.act"]
    assert float(quantizer.scale) == pytest.approx(1 / 255)
    assert not quantizer.log_scale.requires_grad
    before = float(quantizer.scale), float(other.scale)
    batches = [(small_images(), torch.zeros(0))]

    def loss(raw, targets, size):
        return {"size": raw.square().mean()}

    fine_tune(model, None, lambda epoch, samples: batches, loss, epochs=1, scale_learning_rate=1e-2)
    assert float(quantizer.scale) == before[0]
    assert float(other.scale) != before[1]


def test_bits_reach_the_quantizers():
    network = small_net()
    model = insert(network, place(network, rules=(Rule("stem.act", bits=4), Rule("side.conv", bits=3))))
    assert (
        activation_quantizers(model)["stem.act"].grid.low,
        activation_quantizers(model)["stem.act"].grid.high,
    ) == (
        -8,
        7,
    )
    assert quantized_layers(model)["side.conv"].weight_quantizer.grid.high == 3
    assert quantized_layers(model)["last.conv"].weight_quantizer.grid.high == 127


def test_each_group_is_calibrated_by_its_own_observer():
    network = small_net()
    placement = place(network, rules=(Rule("stem.act", observer="minmax"),))
    result = calibrate(insert(network, placement), [small_images()], "percentile", percentile=90.0)
    methods = {group.name: group.method for group in result.groups}
    assert methods["stem.act"] == "minmax"
    assert {method for name, method in methods.items() if name != "stem.act"} == {"percentile"}
    stem = next(group for group in result.groups if group.name == "stem.act")
    assert stem.amax == stem.maximum


# -- rules without effect


def test_a_rule_that_matches_nothing_names_the_closest():
    with pytest.raises(PolicyError, match=r"'nekc.spp.conv' matched no .*closest: 'neck.spp.conv'"):
        neck_plan(Rule("nekc.spp.conv", bits=4))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            Rule("neck.spp.conv", scale=0.1),
            r"sets `scale`, which applies to activation tensors.*'neck.spp.conv'",
        ),
        (Rule("neck.spp.conv", observer="mse"), r"sets `observer`, which applies to activation tensors"),
        (
            Rule("neck.spp.act", share=False),
            r"sets `share`, which applies to concats.*closest of those: 'neck.cat",
        ),
        (
            Rule("neck.cat_0", keep_float=True),
            r"sets `keep_float`, which applies to layers and activation tensors",
        ),
        (Rule("neck.upsample4", bits=4), r"matched no layer, tensor or concat"),
    ],
    ids=[
        "scale of a layer",
        "observer of a layer",
        "share a tensor",
        "float concat",
        "bits of an upsampling",
    ],
)
def test_a_rule_whose_field_means_nothing_there_is_an_error(rule, message):
    with pytest.raises(PolicyError, match=message):
        neck_plan(rule)


def test_a_rule_that_a_later_one_overrules_is_no_error():
    placement = neck_plan(Rule("head.box.*.conv", bits=4), Rule("head.*", keep_float=True))
    assert not any(site.layer.startswith("head") for site in placement.weights)


# -- malformed rules


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"match": "*", "bits": 1}, r"1 bits; expected 2 to 8"),
        ({"match": "*", "bits": 16}, r"16 bits; expected 2 to 8, or `keep_float: true`"),
        ({"match": "*", "scale": 0.0}, r"scale 0.0; expected a positive"),
        ({"match": "*", "scale": float("inf")}, r"scale inf; expected a positive finite"),
        ({"match": "*", "scale": float("nan")}, r"scale nan; expected a positive finite"),
        ({"match": "*", "observer": "kl"}, r"'kl'; expected one of minmax, percentile, mse, entropy"),
    ],
)
def test_malformed_rules_are_refused(mapping, message):
    with pytest.raises(PolicyError, match=message):
        Rule(**mapping)


# -- networks that cannot be traced


class Branching(SmallNet):
    def forward(self, x):
        y = self.stem(x)
        if y.sum() > 0:
            return self.output(y)
        return y


class Counting(SmallNet):
    def forward(self, x):
        y = self.stem(x)
        for _ in range(y.shape[0]):
            y = self.block(y)
        return self.output(y)


@pytest.mark.parametrize(("network", "line"), [(Branching, 2), (Counting, 2)])
def test_a_network_that_cannot_be_traced_names_the_line(network, line):
    _, start = inspect.getsourcelines(network.forward)
    with pytest.raises(TraceError, match=network.__name__) as caught:
        place(network())
    assert f"test_quant_policy.py:{start + line} (forward)" in str(caught.value)
    assert "control flow" in str(caught.value)
