"""Insertion: the network stays what it was, groups share one module, plans survive the file, wrong ones are named."""

import copy
import dataclasses

import pytest
import torch
from quant_networks import NeckNet, SmallNet, folded, small_images, small_net, small_quantized
from torch import nn

from core.errors import PlacementError
from quant import (
    FakeQuantize,
    Mode,
    Rule,
    activation_quantizers,
    calibrate,
    dump_placement,
    insert,
    load_placement,
    place,
    placement_of,
    quantized_layers,
    set_mode,
)


def neck_images():
    return torch.rand(1, 3, 64, 64)


@pytest.fixture
def plan_path(tmp_path):
    return tmp_path / "placement.yaml"


# -- the model


def test_names_of_modules_and_parameters_are_kept():
    network = folded(NeckNet())
    model = insert(network, place(network))
    before, after = network.state_dict(), model.state_dict()
    assert set(before) <= set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    added = set(after) - set(before)
    assert all(name.startswith("activation_quantizers.") or ".weight_quantizer." in name for name in added), (
        added
    )
    leaves = {name: type(m) for name, m in network.named_modules() if not list(m.children())}
    for name, kind in leaves.items():
        if kind is not nn.Identity:
            assert isinstance(model.get_submodule(name), kind)


def test_a_checkpoint_of_the_float_network_fits_the_model():
    network, other = small_net(0), small_net(5)
    model = insert(network, place(network))
    missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
    assert unexpected == []
    assert all("quantizer" in name for name in missing)
    assert torch.equal(model(small_images()), other(small_images()))


def test_members_of_a_group_share_one_module():
    network = folded(NeckNet())
    placement = place(network)
    model = insert(network, placement)
    calls = {}
    for node in model.graph.nodes:
        if node.op == "call_module" and str(node.target).startswith("activation_quantizers."):
            calls.setdefault(node.target, []).append(node.args[0].name)
    assert list(calls.values()) == [[site.node for site in group.tensors] for group in placement.groups]
    quantizers = activation_quantizers(model)
    assert list(quantizers) == [group.name for group in placement.groups]
    assert len({id(q) for q in quantizers.values()}) == len(placement.groups)
    assert sum(isinstance(m, FakeQuantize) for m in model.modules()) == len(placement.groups)


def test_one_quantizer_serves_all_readers_of_a_tensor():
    network = folded(NeckNet())
    model = insert(network, place(network))
    nodes = {node.name: node for node in model.graph.nodes}
    (quantized,) = nodes["stage4_act"].users
    assert {user.name for user in quantized.users} == {"stage5_conv", "cat"}


def test_the_network_is_not_touched():
    network = small_net()
    images = small_images()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modules = [(name, type(module)) for name, module in network.named_modules()]
    expected = network(images)
    model = insert(network, place(network))
    calibrate(model, [images])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert [(name, type(module)) for name, module in network.named_modules()] == modules
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert torch.equal(network(images), expected)


def test_the_training_flag_comes_along():
    network = small_net()
    assert not insert(network, place(network)).training
    network.train()
    assert insert(network, place(network)).training


def test_quantizing_changes_the_answer_a_little_and_only_when_on():
    model, network, images = small_quantized(), small_net(), small_images()
    with torch.no_grad():
        expected, on = network(images), model(images)
    assert not torch.equal(on, expected)
    assert float((on - expected).abs().max()) < 0.05 * float(expected.std())
    set_mode(model, Mode.OFF)
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_networks_with_operations_in_place_are_unchanged_while_off(name):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    network = getattr(models, name)().eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = network(images)
        model = insert(network, place(network)).eval()
        assert torch.equal(model(images), expected)
        calibrate(model, [images], "minmax", "minmax")
        on = model(images)
    assert not torch.equal(on, expected)
    error = (on - expected).square().mean() / expected.var()
    assert float(error) < 0.1


def test_the_quantized_graph_computes_what_the_plan_says():
    """The small network's forward pass written out with every rounding in its place."""
    model, images = small_quantized(), small_images()
    q, layers = activation_quantizers(model), quantized_layers(model)
    silu = torch.nn.functional.silu

    def conv(name, x):
        layer = layers[name]
        weight = layer.weight_quantizer(layer.weight)
        return torch.nn.functional.conv2d(x, weight, layer.bias, layer.stride, layer.padding)

    stem = q["stem.act"](silu(conv("stem.conv", q["input.x"](images))))
    rep = q["block.rep.act"](silu(conv("block.rep.conv", stem)))
    total = stem + silu(conv("block.conv.conv", rep))  # the branch goes in unrounded
    side = silu(conv("side.conv", stem))
    shared = q["block.add"]
    both = torch.cat((shared(total), shared(side)), dim=1)
    last = silu(conv("last.conv", both))
    expected = model.get_submodule("output")(last)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-6)


def test_a_copy_keeps_working():
    model, images = small_quantized(), small_images()
    duplicate = copy.deepcopy(model)
    assert placement_of(duplicate) == placement_of(model)
    assert torch.equal(duplicate(images), model(images))
    for name, quantizer in activation_quantizers(duplicate).items():
        original = activation_quantizers(model)[name]
        assert quantizer is not original
        assert torch.equal(quantizer.log_scale, original.log_scale)
    activation_quantizers(duplicate)["stem.act"].set_scale(1.0)
    set_mode(duplicate, Mode.OFF)
    assert float(activation_quantizers(model)["stem.act"].scale) != 1.0
    assert activation_quantizers(model)["stem.act"].mode is Mode.QUANTIZE
    calibrate(duplicate, [images])
    assert list(duplicate.state_dict()) != []


def test_a_copy_knows_its_groups_even_when_the_plan_was_reordered():
    network = small_net()
    placement = place(network)
    shuffled = dataclasses.replace(placement, groups=placement.groups[::-1])
    model = copy.deepcopy(insert(network, shuffled))
    calibrate(model, [small_images()])
    straight = insert(network, placement)
    calibrate(straight, [small_images()])
    expected = {name: float(q.scale) for name, q in activation_quantizers(straight).items()}
    assert {name: float(q.scale) for name, q in activation_quantizers(model).items()} == expected


def test_state_round_trip_into_a_fresh_model():
    model, images = small_quantized(), small_images()
    network = small_net(3)
    fresh = insert(network, placement_of(model)).eval()
    fresh.load_state_dict(model.state_dict())
    set_mode(fresh, Mode.QUANTIZE)
    assert torch.equal(fresh(images), model(images))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(16, 24, 3, padding=1, padding_mode="reflect"), (2, 16, 6, 6)),
        (lambda: nn.Conv1d(16, 24, 3), (8, 16, 9)),
        (lambda: nn.ConvTranspose2d(16, 24, 2, stride=2), (2, 16, 5, 5)),
        (lambda: nn.Linear(16, 24), (64, 16)),
    ],
    ids=["Conv2d", "Conv1d", "ConvTranspose2d", "Linear"],
)
def test_every_kind_of_weighted_layer(make, shape):
    """Channels of very different size: only one scale per output channel keeps the small ones."""
    torch.manual_seed(0)
    layer = make()
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    sizes = torch.logspace(-3, 0, 24).reshape([-1 if d == axis else 1 for d in range(layer.weight.ndim)])
    with torch.no_grad():
        layer.weight.mul_(sizes)
        layer.bias.zero_()
        network, x = nn.Sequential(layer, nn.Tanh()).eval(), torch.rand(shape)
        model = insert(network, place(network))
        expected = network(x)
        assert torch.equal(model(x), expected)
        calibrate(model, [x])
        channels = [d for d in range(x.ndim) if d != 1]
        error = (model(x) - expected).square().sum(channels) / expected.square().sum(channels)
    assert float(error.max()) < 1e-3


# -- plans in files


def test_a_plan_survives_the_file(plan_path):
    network = folded(NeckNet())
    placement = place(
        network,
        rules=(
            Rule("input.x", scale=1 / 255),
            Rule("neck.cat_0", share=False),
            Rule("*.act", observer="entropy"),
        ),
    )
    plan_path.write_text(dump_placement(placement))
    assert load_placement(plan_path) == placement


def test_every_scale_is_learned_but_that_of_the_input():
    network = small_net()
    quantizers = activation_quantizers(insert(network, place(network)))
    assert {name for name, quantizer in quantizers.items() if not quantizer.log_scale.requires_grad} == {
        "input.x"
    }
    assert len(quantizers) == 4


def test_an_edited_plan_is_obeyed(plan_path):
    network = small_net()
    text = dump_placement(place(network))
    assert text.count("bits: 8") == 4 + 5  # groups and layers
    edited = text.replace("bits: 8", "bits: 4", 1).replace("scale: null", "scale: 1e-3", 1)
    plan_path.write_text(edited)
    model = insert(network, load_placement(plan_path))
    first = activation_quantizers(model)["input.x"]
    assert (first.grid.bits, first.log_scale.requires_grad) == (4, False)
    assert float(first.scale) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "groups: [", r"is not YAML"),
        (lambda text: "", r"is not a placement"),
        (lambda text: "nothing: here", r"is not a placement.*groups"),
        (lambda text: text.replace("observer:", "observr:", 1), r"is not a placement.*observr"),
        (lambda text: text.replace("bits: 8", "bits: 16", 1), r"16 bits; expected 2 to 8"),
        (lambda text: text.replace("scale: null", "scale: -1.0", 1), r"scale -1.0; expected a positive"),
        (lambda text: text.replace("scale: null", "scale: small", 1), r"is not a placement.*small"),
        (lambda text: text.replace("observer: null", "observer: kl", 1), r"'kl'; expected one of"),
    ],
)
def test_a_plan_that_cannot_be_read(plan_path, change, message):
    plan_path.write_text(change(dump_placement(place(small_net()))))
    with pytest.raises(PlacementError, match=message):
        load_placement(plan_path)


def test_a_plan_that_is_not_there(tmp_path):
    with pytest.raises(PlacementError, match=r"missing.yaml cannot be read .*stage `place`"):
        load_placement(tmp_path / "missing.yaml")


# -- plans that do not fit


def with_first_site(placement, **changes):
    group = placement.groups[1]
    site = dataclasses.replace(group.tensors[0], **changes)
    changed = dataclasses.replace(group, tensors=(site, *group.tensors[1:]))
    return dataclasses.replace(placement, groups=(placement.groups[0], changed, *placement.groups[2:]))


def test_an_unknown_tensor_names_the_closest():
    placement = with_first_site(place(small_net()), node="stemm_act")
    with pytest.raises(PlacementError, match=r"node 'stemm_act'.*closest: 'stem_act'"):
        insert(small_net(), placement)


def test_an_unknown_reader_names_the_closest():
    placement = with_first_site(place(small_net()), users=("sidee_conv",))
    with pytest.raises(PlacementError, match=r"node 'sidee_conv'.*closest: 'side_conv'"):
        insert(small_net(), placement)


def test_a_reader_that_reads_something_else():
    placement = with_first_site(place(small_net()), users=("last_conv",))
    with pytest.raises(
        PlacementError, match=r"'last_conv' reads 'stem_act'.*expected one of: block_rep_conv, add"
    ):
        insert(small_net(), placement)


def test_an_unknown_layer_names_the_closest():
    placement = place(small_net())
    site = dataclasses.replace(placement.weights[0], layer="stem.conf")
    with pytest.raises(PlacementError, match=r"layer 'stem.conf'.*closest: 'stem.conv'"):
        insert(small_net(), dataclasses.replace(placement, weights=(site,)))


def test_a_layer_without_weights_to_quantize():
    placement = place(small_net())
    site = dataclasses.replace(placement.weights[0], layer="stem.act")
    with pytest.raises(PlacementError, match=r"'stem.act': SiLU has no quantized form; these have: Conv"):
        insert(small_net(), dataclasses.replace(placement, weights=(site,)))


def test_two_groups_of_one_name():
    placement = place(small_net())
    twice = dataclasses.replace(placement, groups=(*placement.groups, placement.groups[0]))
    with pytest.raises(PlacementError, match=r"two groups called 'input.x'"):
        insert(small_net(), twice)


def test_the_plan_of_another_network():
    with pytest.raises(PlacementError, match="which the network does not have; closest"):
        insert(folded(SmallNet()), place(folded(NeckNet())))
