"""Imported ranges: on the quantizers they belong to, the largest where several meet, and nothing lost in silence."""

import pytest
import torch
from quant_networks import small_images, small_net

from core.errors import RangeError
from quant import Mode, Rule, activation_quantizers, calibrate, insert, place, quantized_layers

STEM_READERS = ("block.rep.conv", "side.conv")


def inserted(rules=()):
    network = small_net(0)
    return insert(network, place(network, rules=tuple(rules)))


def complete(model):
    """A range of its own for the input and the weights of every quantized layer: 1, 2, 3, ... and channel maxima."""
    ranges = {}
    for number, (name, layer) in enumerate(quantized_layers(model).items(), start=1):
        ranges[f"{name}.input"] = torch.tensor(float(number))
        ranges[f"{name}.weight"] = layer.weight.detach().abs().amax((1, 2, 3)) * 0.75
    return ranges


def test_a_group_takes_the_largest_range_of_its_readers_and_weights_one_per_channel():
    model = inserted()
    ranges = complete(model)
    result = calibrate(model, [], ranges=ranges)  # nothing is left to look at
    assert result.num_images == 0
    groups = activation_quantizers(model)
    stem = max(float(ranges[f"{layer}.input"]) for layer in STEM_READERS)
    assert len({float(ranges[f"{layer}.input"]) for layer in STEM_READERS}) == 2
    assert float(groups["stem.act"].scale) == pytest.approx(stem / 127)
    assert float(groups["input.x"].scale) == pytest.approx(float(ranges["stem.conv.input"]) / 127)
    for name, layer in quantized_layers(model).items():
        expected = ranges[f"{name}.weight"] / 127
        assert layer.weight_quantizer.scale.tolist() == pytest.approx(expected.tolist())
        assert layer.weight_quantizer.mode is Mode.QUANTIZE
    assert result.imported is not None
    assert set(STEM_READERS) <= set(result.imported.joined["stem.act"])
    entry = next(group for group in result.groups if group.name == "stem.act")
    assert (entry.method, entry.amax, entry.maximum) == ("imported", stem, None)


def test_what_has_no_counterpart_is_listed_both_ways_and_calibrated():
    model, alone = inserted(), inserted()
    calibrate(alone, [small_images(2)], "minmax", "minmax")
    ranges = {
        "stem.conv.input": torch.tensor(2.0),
        "side.conv.weight": torch.tensor(3.0),  # one for all channels
        "output.input": torch.tensor(1.0),
        "nowhere.weight": torch.ones(4),
    }
    result = calibrate(model, [small_images(2)], "minmax", "minmax", ranges=ranges)
    assert result.imported is not None
    assert result.imported.unused == {
        "output.input": "float: its result leaves the network",
        "nowhere.weight": "no such layer",
    }
    assert result.imported.groups == {"input.x": 2.0}
    assert set(result.imported.groups_without) == set(activation_quantizers(model)) - {"input.x"}
    assert set(result.imported.weights_without) == set(quantized_layers(model)) - {"side.conv"}
    for name, quantizer in activation_quantizers(alone).items():
        expected = 2.0 / 127 if name == "input.x" else float(quantizer.scale)
        assert float(activation_quantizers(model)[name].scale) == pytest.approx(expected)
    for name, layer in quantized_layers(model).items():
        scale = layer.weight_quantizer.scale
        other = quantized_layers(alone)[name].weight_quantizer.scale
        assert torch.allclose(scale, torch.full_like(scale, 3.0 / 127) if name == "side.conv" else other)
    text = "\n".join(result.imported.describe())
    assert "nowhere.weight (no such layer)" in text
    assert "stem.act" in text


def test_a_rule_with_a_fixed_scale_wins():
    model = inserted([Rule("input.x", scale=1 / 127)])
    result = calibrate(model, [small_images(2)], ranges=complete(model))
    assert float(activation_quantizers(model)["input.x"].scale) == pytest.approx(1 / 127)
    assert result.imported is not None
    assert result.imported.unused == {"stem.conv.input": "the scale is fixed by a rule"}


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (
            {"side.conv.weight": torch.ones(5)},
            "side.conv.weight has 5 values and the layer 16 output channels",
        ),
        ({"side.conv.input": torch.tensor(float("nan"))}, r"side.conv.input is \[nan\]"),
        ({"side.conv.input": torch.tensor(0.0)}, "expected positive"),
    ],
)
def test_ranges_that_do_not_fit_are_refused(ranges, message):
    with pytest.raises(RangeError, match=message):
        calibrate(inserted(), [small_images(2)], ranges=ranges)
