"""Calibration: every scale set from what the float network shows, nothing else changed, and clear refusals."""

import math

import pytest
import torch
from quant_networks import SmallNet, folded, small_images, small_net
from torch import nn

from core.choices import OBSERVERS
from core.errors import CalibrationError
from models.blocks import ACTIVATIONS
from quant import (
    FakeQuantize,
    Mode,
    Rule,
    activation_quantizers,
    calibrate,
    insert,
    place,
    placement_of,
    quantized_layers,
    set_mode,
)
from quant.calibration.calibrate import apply_histograms, calibrate_weights, collect_histograms

BATCHES = 3


def images():
    return [small_images(2, seed) for seed in range(BATCHES)]


def inserted(seed=0, rules=()):
    network = small_net(seed)
    return insert(network, place(network, rules=tuple(rules)))


def scales_of(model):
    scales = {name: float(q.scale) for name, q in activation_quantizers(model).items()}
    return scales | {
        name: layer.weight_quantizer.scale.tolist() for name, layer in quantized_layers(model).items()
    }


def modes_of(model):
    from quant.insertion import quantizers

    return [quantizer.mode for quantizer in quantizers(model)]


def float_tensors(network):
    """Largest magnitudes of the float network's tensors over all images, by plain hooks on its modules."""
    largest = {}

    def keep(name):
        def hook(module, inputs, output):
            largest[name] = max(largest.get(name, 0.0), float(output.detach().abs().max()))

        return hook

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in network.named_modules()
        if isinstance(module, tuple(ACTIVATIONS.values())) or name == "block"
    ]
    for batch in images():
        network(batch)
    for handle in handles:
        handle.remove()
    return largest


def test_min_max_scales_are_the_float_networks_maxima():
    """A group takes the largest of its members: the sum and the side branch meet in one concat."""
    network = small_net()
    largest = float_tensors(network)
    model = inserted()
    calibrate(model, images(), "minmax", "minmax")
    scales = scales_of(model)
    assert scales["input.x"] == pytest.approx(float(torch.cat(images()).max()) / 127, rel=1e-6)
    assert scales["stem.act"] == pytest.approx(largest["stem.act"] / 127, rel=1e-6)
    assert scales["block.rep.act"] == pytest.approx(largest["block.rep.act"] / 127, rel=1e-6)
    assert scales["block.add"] == pytest.approx(max(largest["block"], largest["side.act"]) / 127, rel=1e-6)
    weight = network.get_submodule("side.conv").weight
    assert scales["side.conv"] == pytest.approx((weight.abs().amax((1, 2, 3)) / 127).tolist(), rel=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scales_fit_the_width_of_each_group(bits):
    largest = float_tensors(small_net())
    model = inserted(rules=(Rule("stem.act", bits=bits), Rule("side.conv", bits=bits)))
    result = calibrate(model, images(), "minmax", "minmax")
    scales, high = scales_of(model), 2 ** (bits - 1) - 1
    assert scales["stem.act"] == pytest.approx(largest["stem.act"] / high, rel=1e-6)
    assert scales["block.rep.act"] == pytest.approx(largest["block.rep.act"] / 127, rel=1e-6)
    weight = small_net().get_submodule("side.conv").weight
    assert scales["side.conv"] == pytest.approx((weight.abs().amax((1, 2, 3)) / high).tolist(), rel=1e-6)
    stem = next(group for group in result.groups if group.name == "stem.act")
    assert stem.amax == pytest.approx(largest["stem.act"])


@pytest.mark.parametrize("method", OBSERVERS)
def test_every_scale_is_set_and_every_quantizer_on(method):
    model = inserted()
    before = scales_of(model)
    result = calibrate(model, images(), method)
    after = scales_of(model)
    assert [group.name for group in result.groups] == [group.name for group in placement_of(model).groups]
    assert result.num_images == 2 * BATCHES
    assert set(modes_of(model)) == {Mode.QUANTIZE}
    for name, scale in after.items():
        assert scale != before[name]
    for group in result.groups:
        assert group.method == method
        assert group.scale == pytest.approx(after[group.name], rel=1e-6)
        assert 0 < group.amax <= group.maximum * (1 + 1e-12)
        assert group.amax == pytest.approx(group.scale * 127)
        assert 0 <= group.clipped < 0.2
        assert group.num_ignored == 0
    # the image group: 6 images of 3 x 16 x 16; the shared one: two tensors of 16 x 8 x 8
    counts = {group.name: group.num_values for group in result.groups}
    assert counts["input.x"] == 6 * 3 * 16 * 16
    assert counts["block.add"] == 2 * 6 * 16 * 8 * 8


def test_the_order_and_size_of_batches_do_not_matter():
    scales = []
    for batches in (images(), images()[::-1], [torch.cat(images())], list(torch.cat(images()).split(1))):
        model = inserted()
        calibrate(model, batches, "mse")
        scales.append(scales_of(model))
    for other in scales[1:]:  # convolutions over another batch size may differ in the last bit
        for name, scale in scales[0].items():
            assert other[name] == pytest.approx(scale, rel=1e-5)
    assert scales[0] == scales[1]


@pytest.mark.parametrize("method", OBSERVERS)
def test_the_memory_layout_changes_no_more_than_the_order_of_sums(method):
    """Convolutions add up in another order, so a value at the edge of a bin may fall into the next one."""
    last = [batch.contiguous(memory_format=torch.channels_last) for batch in images()]
    plain, _ = collect_histograms(inserted(), images())
    other, _ = collect_histograms(inserted(), last)
    for name, histogram in plain.items():
        assert other[name].num_values == histogram.num_values
        assert other[name].maximum == pytest.approx(histogram.maximum, rel=1e-6)
        assert (other[name].counts - histogram.counts).abs().sum() <= 1e-3 * histogram.num_values
    model, model_last = inserted(), inserted()
    calibrate(model, images(), method)
    calibrate(model_last, last, method)
    for name, scale in scales_of(model).items():
        assert scales_of(model_last)[name] == pytest.approx(scale, rel=1e-5)


def test_calibrating_again_changes_nothing():
    """The pass sees the float network, whatever the scales were."""
    model = inserted()
    calibrate(model, images())
    once = scales_of(model)
    calibrate(model, images())
    assert scales_of(model) == once


def test_one_pass_serves_every_method():
    model = inserted()
    histograms, num_images = collect_histograms(model, images())
    for method in OBSERVERS:
        apply_histograms(model, histograms, method, 99.99, num_images)
        other = inserted()
        calibrate(other, images(), method)
        assert {n: float(q.scale) for n, q in activation_quantizers(model).items()} == {
            n: float(q.scale) for n, q in activation_quantizers(other).items()
        }


def test_ranks_together_find_what_one_process_finds():
    whole, _ = collect_histograms(inserted(), images())
    parts = [collect_histograms(inserted(), images()[rank::2])[0] for rank in range(2)]
    for name, histogram in whole.items():
        merged = parts[0][name]
        merged.merge(parts[1][name])
        assert torch.equal(merged.counts, histogram.counts)
        assert merged.maximum == histogram.maximum


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", list(Mode))
def test_collecting_leaves_modes_and_training_flag_as_they_were(mode, training):
    model = inserted().train(training)
    set_mode(model, mode)
    first = next(iter(activation_quantizers(model).values()))
    first.mode = Mode.OFF
    before = modes_of(model)
    collect_histograms(model, images())
    assert modes_of(model) == before
    assert model.training is training
    assert all(quantizer.observer is None for quantizer in activation_quantizers(model).values())


def test_flags_come_back_after_an_error_in_the_data():
    model = inserted().train()
    before = modes_of(model)

    def broken():
        yield small_images()
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        collect_histograms(model, broken())
    assert modes_of(model) == before
    assert model.training
    assert all(quantizer.observer is None for quantizer in activation_quantizers(model).values())


def test_calibration_runs_in_evaluation_mode_and_changes_no_weight_or_statistic():
    """A network with batch norm and dropout, in training mode: neither may move or make noise."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(16, 16, 1),
        nn.Conv2d(16, 4, 1),
    ).train()
    model = insert(network, place(network))
    before = {name: value.clone() for name, value in model.state_dict().items() if "quantizer" not in name}
    calibrate(model, images())
    first = scales_of(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    calibrate(model, images())
    assert scales_of(model) == first


def test_weights_alone():
    model = inserted()
    calibrate_weights(model, "minmax")
    for layer in quantized_layers(model).values():
        torch.testing.assert_close(
            layer.weight_quantizer.scale, layer.weight.abs().amax((1, 2, 3)).detach() / 127
        )
    assert all(float(q.scale) == 1.0 for q in activation_quantizers(model).values())


def test_a_broken_pixel_ruins_min_max_and_not_the_percentile():
    network = small_net()
    hot = images()
    hot[0][0, 0, 0, 0] = 100.0
    errors = {}
    with torch.no_grad():
        for method in ("minmax", "percentile"):
            model = inserted()
            calibrate(model, hot, method, percentile=99.9)
            errors[method] = float((model(images()[1]) - network(images()[1])).square().mean())
    assert errors["percentile"] < 0.1 * errors["minmax"]


# -- refusals


def test_no_images():
    model = inserted()
    with pytest.raises(CalibrationError, match="got no image"):
        calibrate(model, [])
    with pytest.raises(CalibrationError, match="got no image"):
        calibrate(model, [small_images(0)])


@pytest.mark.parametrize("arguments", [("kl",), ("mse", "kl")])
def test_unknown_methods(arguments):
    with pytest.raises(CalibrationError, match=r"'kl': choose one of minmax, percentile, mse, entropy"):
        calibrate(inserted(), images(), *arguments)


def test_a_network_that_overflows_names_the_group():
    network = small_net()
    with torch.no_grad():
        network.get_submodule("stem.conv").bias.fill_(math.nan)
    model = insert(network, place(network))
    with pytest.raises(CalibrationError, match=r"group 'stem.act' saw \d+ values, none of them finite"):
        calibrate(model, images())


def test_a_broken_weight_names_the_layer():
    network = small_net()
    with torch.no_grad():
        network.get_submodule("side.conv").weight[3, 0] = math.nan
    model = insert(network, place(network))
    with pytest.raises(CalibrationError, match=r"layer 'side.conv' has NaN or infinite weights"):
        calibrate(model, images())


def test_a_few_broken_values_are_left_out_and_reported(caplog):
    model = inserted()
    batch = small_images()
    batch[0, 0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    result = calibrate(model, [batch], "minmax")
    assert result.groups[0].num_ignored == 3
    assert math.isfinite(result.groups[0].scale)
    assert "input.x: 3 NaN or infinite values left out" in caplog.text


def test_a_dead_network_gets_usable_scales():
    """All weights zero: every scale positive, the quantized network still computes zeros."""
    network = folded(SmallNet())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    model = insert(network, place(network))
    calibrate(model, [torch.zeros(1, 3, 16, 16)])
    assert all(
        isinstance(q, FakeQuantize) and float(q.scale) == 1.0 for q in activation_quantizers(model).values()
    )
    assert torch.equal(model(small_images()), network(small_images()))


def test_result_is_plain_data():
    import json

    content = calibrate(inserted(), images()).as_dict()
    assert json.loads(json.dumps(content)) == content
    assert content["num_images"] == 6


def test_groups_that_saw_zeros_only_are_listed(caplog):
    model = insert(small_net(), place(small_net())).eval()
    result = calibrate(model, [torch.zeros(2, 3, 16, 16)])  # black images
    dead = [group.name for group in result.groups if group.maximum == 0]
    assert dead
    assert f"{len(dead)} groups saw zeros only ({dead[0]}" in caplog.text
    assert all(group.scale > 0 for group in result.groups)
