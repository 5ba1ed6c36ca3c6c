"""What stays float, names and order, policy rules, and errors of placement."""

import pytest
import torch
from quant_networks import Between, NeckNet, folded, groups_of
from torch import nn

from models.blocks import ConvBlock
from quant import PlacementOptions, Rule, place

# -- what stays float


def test_output_layers_are_quantized_on_request():
    network = folded(Between(ConvBlock(16, 16, 3), 16, 16))
    placement = place(network, PlacementOptions(quantize_outputs=True))
    assert placement.kept_float == {}
    assert groups_of(placement)["after.act"] == ({"after.act": ("output",)}, ("output",))
    one = place(network, rules=(Rule("output", keep_float=False),))
    assert one == placement


def test_the_edges_of_the_network_keep_their_width():
    """Image, first layer and output layer at 8 bits (or what is asked), all else at 4; a rule has the last word."""
    network = folded(Between(ConvBlock(16, 16, 3), 16, 16))
    narrow = PlacementOptions(weight_bits=4, activation_bits=4, quantize_outputs=True)
    placement = place(network, narrow)
    assert {site.layer: site.grid.bits for site in placement.weights} == {
        "before.conv": 8,
        "block.conv": 4,
        "after.conv": 4,
        "output": 8,
    }
    assert [group.grid.bits for group in placement.groups] == [8, 4, 4, 4]
    plain = place(network, PlacementOptions(4, 4, edge_bits=2, quantize_outputs=True))
    assert {site.grid.bits for site in plain.weights} == {group.grid.bits for group in plain.groups} == {4}
    ruled = place(network, narrow, rules=(Rule("before.conv", bits=3),))
    assert ruled.weights[0].grid.bits == 3


@pytest.mark.parametrize(
    ("conv", "kept"),
    [
        (nn.Conv2d(8, 8, 3), True),  # at least one side of 16 is asked for
        (nn.Conv2d(16, 8, 1), False),
        (nn.Conv2d(16, 12, 1), False),
        (nn.Conv2d(20, 12, 1), True),  # neither side is a multiple of 8
        (nn.Conv2d(60, 60, 3), False),  # wide enough to be padded
        (nn.Conv2d(180, 90, 1), False),
        (nn.Conv2d(16, 16, 3, groups=16), False),  # depthwise
        (nn.Conv2d(16, 16, 1, groups=16), True),
        (nn.Conv2d(64, 64, 3, groups=4), False),
        (nn.Conv2d(12, 12, 3, groups=12), True),
    ],
    ids=lambda value: (
        f"{value.in_channels}-{value.out_channels}-g{value.groups}-k{value.kernel_size[0]}"
        if isinstance(value, nn.Conv2d)
        else None
    ),
)
def test_narrow_convolutions(conv, kept):
    network = folded(
        nn.Sequential(ConvBlock(3, conv.in_channels, 3), conv, nn.SiLU(), nn.Conv2d(conv.out_channels, 4, 1))
    )
    placement = place(network)
    assert ("1" in placement.kept_float) == kept
    assert all(reason.startswith(("narrow", "its result")) for reason in placement.kept_float.values())
    wanted = place(network, PlacementOptions(quantize_narrow=True))
    assert "1" not in wanted.kept_float


@pytest.mark.parametrize(
    ("layer", "grid", "reason"),
    [
        (nn.ConvTranspose2d(16, 16, 2, 2), "integer", "engines run transposed convolutions in float"),
        (nn.ConvTranspose2d(16, 16, 2, 2), "fp8", "engines run transposed convolutions in float"),
        (nn.Conv2d(16, 16, 7, groups=16), "fp8", "FP8 kernels have at most 32 elements, not 7x7"),
        (nn.Conv2d(16, 16, (3, 11)), "fp8", "FP8 kernels have at most 32 elements, not 3x11"),
        (nn.Conv2d(16, 16, 7, groups=16), "integer", None),
        (nn.Conv2d(16, 16, (4, 8)), "fp8", None),
        (nn.Conv2d(16, 16, 5, groups=16), "fp8", None),
    ],
)
def test_layers_that_no_engine_runs_in_these_codes_stay_float(layer, grid, reason):
    """As TensorRT for RTX builds them, see benchmarks/compile_convolutions.py."""
    network = folded(nn.Sequential(ConvBlock(3, 16, 3), layer, nn.SiLU(), nn.Conv2d(16, 16, 1)))
    rules = (Rule("input.*", grid=grid),)
    options = PlacementOptions(grid=grid, quantize_outputs=True)
    placement = place(network, options, rules)
    assert placement.kept_float == ({"1": reason} if reason else {})
    # a rule has the last word, also one that makes the layer's input INT8
    forced = place(network, options, (*rules, Rule("1", keep_float=False)))
    assert "1" in [site.layer for site in forced.weights]
    integer = place(network, options, (*rules, Rule("0.act", grid="integer")))
    assert ("1" in integer.kept_float) == isinstance(layer, nn.ConvTranspose2d)


class Ending(nn.Module):
    """A convolution, another one, and one operation between it and the output."""

    def __init__(self, ending):
        super().__init__()
        self.first, self.last, self.ending = ConvBlock(3, 16, 3), nn.Conv2d(16, 16, 1), ending

    def forward(self, x):
        return {"maps": [self.ending(self.last(self.first(x)))]}


@pytest.mark.parametrize(
    "ending",
    [nn.Sigmoid(), nn.ReLU(), nn.BatchNorm2d(16), nn.AvgPool2d(2), torch.sigmoid, lambda x: x.sigmoid()],
    ids=["sigmoid", "relu", "norm", "pool", "function", "method"],
)
def test_an_output_layer_is_one_whatever_follows_it_without_weights(ending):
    placement = place(folded(Ending(ending)))
    assert placement.kept_float == {"last": "its result leaves the network"}
    assert [site.layer for site in placement.weights] == ["first.conv"]


def test_the_first_convolution_may_be_narrow_on_the_image():
    """3 -> 8 channels reads the image: worth an INT8 kernel; 3 -> 12 fits none."""
    for channels, kept in ((8, False), (12, True)):
        network = folded(
            nn.Sequential(ConvBlock(3, channels, 3), ConvBlock(channels, 16, 3), nn.Conv2d(16, 4, 1))
        )
        assert ("0.conv" in place(network).kept_float) == kept


def test_a_tensor_that_leaves_the_network_leaves_it_unquantized():
    class TwoOutputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = ConvBlock(3, 16, 3), ConvBlock(16, 16, 3)
            self.last = nn.Conv2d(16, 4, 1)

        def forward(self, x):
            feature = self.first(x)
            return feature, self.last(self.second(feature))

    assert place(folded(TwoOutputs())).kept_float == {"last": "its result leaves the network"}

    assert groups_of(place(folded(TwoOutputs())))["first.act"] == (
        {"first.act": ("second_conv",)},
        ("second.conv",),
    )


def test_float_layers_ask_for_no_quantizer():
    placement = place(
        folded(Between(ConvBlock(16, 16, 3), 16, 16)),
        rules=(Rule("before.conv", keep_float=True), Rule("block.conv", keep_float=True)),
    )
    assert groups_of(placement) == {"block.act": ({"block.act": ("after_conv",)}, ("after.conv",))}
    assert [site.layer for site in placement.weights] == ["after.conv"]
    assert placement.kept_float["block.conv"] == "policy rule block.conv"


# -- several calls, several uses


class Reused(nn.Module):
    """One activation module called twice, and one convolution called on two tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.tower, self.act = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()
        self.output = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        fine = self.act(self.first(x))
        coarse = torch.nn.functional.max_pool2d(fine, 2)
        return tuple(self.output(self.act(self.tower(feature))) for feature in (fine, coarse))


def test_modules_that_are_called_several_times():
    placement = place(Reused().eval())
    assert groups_of(placement) == {
        "input.x": ({"input.x": ("first",)}, ("first",)),
        "act_0": ({"act_0": ("max_pool2d", "tower")}, ("tower",)),
    }
    assert [site.layer for site in placement.weights] == ["first", "tower"]
    assert placement.kept_float == {"output": "its result leaves the network"}


def test_names_are_unique_and_the_same_in_every_trace():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 1)
            self.next = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(3))

        def forward(self, x):
            y = self.conv(x)
            total = y
            for conv in self.next:
                total = torch.add(conv(total), y) + conv(y)
            return total.mean()

    names = [
        site.name
        for _ in range(2)
        for group in place(Sums(), PlacementOptions(quantize_outputs=True)).groups
        for site in group.tensors
    ]
    assert names[: len(names) // 2] == names[len(names) // 2 :]
    assert len(set(names)) == len(names) // 2


def test_groups_stand_in_graph_order():
    placement = place(folded(NeckNet()))
    first = [group.name for group in placement.groups]
    assert first == [
        "input.x",
        "stage3.act",
        "stage4.act",
        "stage5.act",
        "neck.top_down3.act",
        "neck.bottom_up4.act",
        "neck.bottom_up5.act",
        *(f"head.{branch}.{level}.conv1.act" for level in range(3) for branch in ("box", "cls")),
    ]
    assert [group.tensors[0].name for group in placement.groups] == first


def test_every_quantized_layer_knows_its_group():
    placement = place(folded(NeckNet()))
    readers = {layer: group.name for group in placement.groups for layer in group.layers}
    assert {site.layer: site.group for site in placement.weights} == readers


def test_the_network_is_only_read():
    network = folded(NeckNet())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modules = [(name, type(module)) for name, module in network.named_modules()]
    place(network)
    assert [(name, type(module)) for name, module in network.named_modules()] == modules
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_description_shows_groups_tensors_layers_and_float_layers():
    text = place(
        folded(NeckNet()), rules=(Rule("neck.cat_0", share=False), Rule("input.x", scale=1 / 255))
    ).describe()
    assert "input.x  (8 bits, scale 0.00392157, 1 tensors)" in text
    assert "  tensor neck.top_down4.act -> neck_upsample4, cat_2" in text
    assert "  layer  neck.top_down3.conv" in text
    assert "float: head.box.0.output (its result leaves the network)" in text
    assert "concat neck.cat_0: own scale" in text


def test_the_summary_counts_what_the_description_lists():
    placement = place(folded(NeckNet()), rules=(Rule("neck.cat_0", share=False), Rule("head.*", bits=4)))
    tree, summary = placement.describe().splitlines(), placement.summarize().splitlines()
    layers = [line for line in tree if line.startswith("  layer ")]
    narrow = [site for site in placement.weights if site.grid.bits == 4]
    tensors = [line for line in tree if line.startswith("  tensor ")]
    assert narrow
    parts = {f"{len(layers) - len(narrow)} layers with 8 bits", f"{len(narrow)} layers with 4 bits"}
    assert set(summary[0].split("; ")[0].removeprefix("quantized: ").split(", ")) == parts
    assert summary[0].endswith(f"; {len(tensors)} tensors with {len(placement.groups)} scales")
    floats = sum(int(line.split()[1]) for line in summary if line.startswith("float: "))
    assert floats == sum(line.startswith("float: ") for line in tree)
    own = sum(line.endswith(": own scale") for line in tree)
    concats = sum(line.startswith("concat ") for line in tree)
    assert summary[-1] == f"concats: {concats - own} of {concats} share one scale"
