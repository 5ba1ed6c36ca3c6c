"""Placement of the blocks of YOLOv5, YOLOv8, YOLOv10, YOLO11 and YOLO12, written down by hand like those of YOLOv9.

See `test_quant_placement.py` for the network around each block.
"""

import pytest
from quant_networks import Between, folded, groups_of
from torch import nn

from models.area_attention import AreaBlock, ResidualElan
from models.attention import C2PSA, PSA
from models.blocks import ConvBlock
from models.blocks_csp import C3, SPPF, C2f, C3k2
from models.blocks_v10 import C2fCIB, DecoupledDown
from models.heads import SeparableConv
from quant import PlacementOptions, Rule, place

OUTPUT = {"output": "its result leaves the network"}
IMAGE = {"input.x": ({"input.x": ("before_conv",)}, ("before.conv",))}
EXIT = {"block.exit.act": ({"block.exit.act": ("after_conv",)}, ("after.conv",))}


def plan(block, in_channels, out_channels, options=None, rules=()):
    return place(folded(Between(block, in_channels, out_channels)), options, tuple(rules))


def chain(name, *readers):
    """One activation that one convolution reads."""
    layer = readers[0].replace("_", ".")
    return {name: ({name: readers}, (layer,))}


def attention(name, block, sum_node):
    """The groups inside an attention block, whose input belongs to another group.

    Queries, keys and values share the scale of the convolution that makes them. The encoded values go into the sum
    from their convolution, so the mixed ones are the skip. The block's two sums are those of any residual block.
    """
    node, outer = name.replace(".", "_"), f"{block}.".lstrip(".")
    prefix = outer.replace(".", "_")
    return {
        f"{name}.qkv.conv": ({f"{name}.qkv.conv": ("reshape",)}, (f"{name}.position.conv",)),
        f"{name}.matmul_1": ({f"{name}.matmul_1": ("reshape_1",)}, ()),
        f"{name}.add": ({f"{name}.add": (f"{node}_projection_conv",)}, (f"{name}.projection.conv",)),
        f"{outer}add_0": (
            {f"{outer}add_0": (f"{prefix}feed_forward_0_conv", sum_node)},
            (f"{outer}feed_forward.0.conv",),
        ),
        f"{outer}feed_forward.0.act": (
            {f"{outer}feed_forward.0.act": (f"{prefix}feed_forward_1_conv",)},
            (f"{outer}feed_forward.1.conv",),
        ),
    }


def test_partial_self_attention():
    placement = plan(C2PSA(128, 1, "silu"), 128, 128)
    assert groups_of(placement) == {
        **IMAGE,
        **chain("before.act", "block_entry_conv"),
        "block.entry.act": (
            {"block.entry.act": ("chunk",), "block.blocks.0.add_1": ("cat",)},
            ("block.blocks.0.attention.qkv.conv", "block.exit.conv"),
        ),
        **attention("block.blocks.0.attention", "block.blocks.0", "add_2"),
        **EXIT,
    }
    products = (f"block.blocks.0.attention.matmul_{index}" for index in range(2))
    assert placement.kept_float == OUTPUT | dict.fromkeys(products, "a product of two tensors")
    assert placement.matmuls == ()


def test_partial_self_attention_of_yolov10():
    """The same with the parts of its one attention block as its own."""
    assert groups_of(plan(PSA(128, "silu"), 128, 128)) == {
        **IMAGE,
        **chain("before.act", "block_entry_conv"),
        "block.entry.act": (
            {"block.entry.act": ("chunk",), "block.add_1": ("cat",)},
            ("block.attention.qkv.conv", "block.exit.conv"),
        ),
        **attention("block.attention", "block", "add_2"),
        **EXIT,
    }


def test_products_are_quantized_where_asked_for():
    """The softmax gets a scale of its own; a product has none, but the one that a convolution reads."""
    asked = plan(C2PSA(128, 1, "silu"), 128, 128, PlacementOptions(attention="matmul"))
    name = "block.blocks.0.attention"
    softmax = {f"{name}.softmax": ({f"{name}.softmax": ("transpose_1",)}, ())}
    assert groups_of(asked) == groups_of(plan(C2PSA(128, 1, "silu"), 128, 128)) | softmax
    qkv = f"{name}.qkv.conv"
    assert [(site.name, site.node, site.groups) for site in asked.matmuls] == [
        (f"{name}.matmul_0", "matmul", (qkv, qkv)),
        (f"{name}.matmul_1", "matmul_1", (qkv, f"{name}.softmax")),
    ]
    assert asked.kept_float == OUTPUT


@pytest.mark.parametrize(
    ("options", "rule", "quantized"),
    [
        (PlacementOptions(), Rule("*.matmul_0", keep_float=False), ["matmul_0"]),
        (PlacementOptions(attention="matmul"), Rule("*.matmul_1", keep_float=True), ["matmul_0"]),
        (PlacementOptions(attention="matmul"), Rule("*.softmax", keep_float=True), ["matmul_0"]),
    ],
)
def test_rules_decide_for_single_products(options, rule, quantized):
    placement = plan(C2PSA(128, 1, "silu"), 128, 128, options, (rule,))
    assert [site.name.rpartition(".")[2] for site in placement.matmuls] == quantized
    assert not any(group.name.endswith("softmax") for group in placement.groups)


def test_c2f():
    """One scale from the split to the concat: both halves, every sum, the inputs of the bottlenecks."""
    assert groups_of(plan(C2f(32, 32, 2, True, "silu"), 32, 32)) == {
        **IMAGE,
        **chain("before.act", "block_entry_conv"),
        "block.entry.act": (
            {
                "block.entry.act": ("chunk",),
                "block.blocks.0.add": ("block_blocks_1_conv1_conv", "add_1", "cat"),
                "block.blocks.1.add": ("cat",),
            },
            ("block.blocks.0.conv1.conv", "block.blocks.1.conv1.conv", "block.exit.conv"),
        ),
        **chain("block.blocks.0.conv1.act", "block_blocks_0_conv2_conv"),
        **chain("block.blocks.1.conv1.act", "block_blocks_1_conv2_conv"),
        **EXIT,
    }


def test_c2f_without_shortcut():
    """The bottleneck's own result is in the concat, in the place of the sum."""
    assert groups_of(plan(C2f(32, 32, 1, False, "silu"), 32, 32)) == {
        **IMAGE,
        **chain("before.act", "block_entry_conv"),
        "block.entry.act": (
            {"block.entry.act": ("chunk",), "block.blocks.0.conv2.act": ("cat",)},
            ("block.blocks.0.conv1.conv", "block.exit.conv"),
        ),
        **chain("block.blocks.0.conv1.act", "block_blocks_0_conv2_conv"),
        **EXIT,
    }


def test_c3():
    assert groups_of(plan(C3(32, 32, 1, True, "silu"), 32, 32)) == {
        **IMAGE,
        "before.act": (
            {"before.act": ("block_entry_conv", "block_shortcut_conv")},
            ("block.entry.conv", "block.shortcut.conv"),
        ),
        "block.entry.act": (
            {"block.entry.act": ("block_bottlenecks_0_conv1_conv", "add")},
            ("block.bottlenecks.0.conv1.conv",),
        ),
        **chain("block.bottlenecks.0.conv1.act", "block_bottlenecks_0_conv2_conv"),
        "block.bottlenecks.0.add": (
            {"block.bottlenecks.0.add": ("cat",), "block.shortcut.act": ("cat",)},
            ("block.exit.conv",),
        ),
        **EXIT,
    }


def test_c3k2_with_cross_stage_blocks():
    """A C3k inside: its two paths read the outer group, its result is in the outer concat."""
    inner = "block.blocks.0"
    assert groups_of(plan(C3k2(32, 64, 1, "c3k", "silu"), 32, 64)) == {
        **IMAGE,
        **chain("before.act", "block_entry_conv"),
        "block.entry.act": (
            {"block.entry.act": ("chunk",), f"{inner}.exit.act": ("cat_1",)},
            (f"{inner}.entry.conv", f"{inner}.shortcut.conv", "block.exit.conv"),
        ),
        f"{inner}.entry.act": (
            {f"{inner}.entry.act": ("block_blocks_0_bottlenecks_0_conv1_conv", "add")},
            (f"{inner}.bottlenecks.0.conv1.conv",),
        ),
        **chain(f"{inner}.bottlenecks.0.conv1.act", "block_blocks_0_bottlenecks_0_conv2_conv"),
        f"{inner}.bottlenecks.0.add": (
            {f"{inner}.bottlenecks.0.add": ("block_blocks_0_bottlenecks_1_conv1_conv", "add_1")},
            (f"{inner}.bottlenecks.1.conv1.conv",),
        ),
        **chain(f"{inner}.bottlenecks.1.conv1.act", "block_blocks_0_bottlenecks_1_conv2_conv"),
        f"{inner}.bottlenecks.1.add": (
            {f"{inner}.bottlenecks.1.add": ("cat",), f"{inner}.shortcut.act": ("cat",)},
            (f"{inner}.exit.conv",),
        ),
        **EXIT,
    }


def test_c3k2_with_bottlenecks():
    assert groups_of(plan(C3k2(32, 64, 1, "bottleneck", "silu"), 32, 64)) == {
        **IMAGE,
        **chain("before.act", "block_entry_conv"),
        "block.entry.act": (
            {"block.entry.act": ("chunk",), "block.blocks.0.add": ("cat",)},
            ("block.blocks.0.conv1.conv", "block.exit.conv"),
        ),
        **chain("block.blocks.0.conv1.act", "block_blocks_0_conv2_conv"),
        **EXIT,
    }


def test_c3k2_with_attention():
    inner = "block.blocks.0"
    assert groups_of(plan(C3k2(32, 128, 1, "attention", "silu"), 32, 128)) == {
        **IMAGE,
        **chain("before.act", "block_entry_conv"),
        "block.entry.act": (
            {"block.entry.act": ("chunk",), f"{inner}.1.add_1": ("cat",)},
            (f"{inner}.0.conv1.conv", "block.exit.conv"),
        ),
        **chain(f"{inner}.0.conv1.act", "block_blocks_0_0_conv2_conv"),
        f"{inner}.0.add": (
            {f"{inner}.0.add": ("block_blocks_0_1_attention_qkv_conv", "add_2")},
            (f"{inner}.1.attention.qkv.conv",),
        ),
        **attention(f"{inner}.1.attention", f"{inner}.1", "add_3"),
        **EXIT,
    }


def test_pyramid_pooling():
    """The pools and the concat move codes: one scale for all four maps."""
    assert groups_of(plan(SPPF(32, 32, "silu"), 32, 32)) == {
        **IMAGE,
        **chain("before.act", "block_entry_conv"),
        "block.entry.act": ({"block.entry.act": ("block_pool1", "cat")}, ("block.exit.conv",)),
        **EXIT,
    }


def test_pyramid_pooling_with_shortcut():
    """Nothing is activated before the pools; the input is the skip of a sum."""
    assert groups_of(plan(SPPF(32, 32, "silu", shortcut=True), 32, 32)) == {
        **IMAGE,
        "before.act": ({"before.act": ("block_entry_conv", "add")}, ("block.entry.conv",)),
        "block.entry.conv": ({"block.entry.conv": ("block_pool1", "cat")}, ("block.exit.conv",)),
        "block.add": ({"block.add": ("after_conv",)}, ("after.conv",)),
    }


def test_depthwise_class_branch():
    """Depthwise convolutions are quantized like others."""
    assert groups_of(plan(SeparableConv(32, 32, "silu"), 32, 32)) == {
        **IMAGE,
        **chain("before.act", "block_depthwise_conv"),
        **chain("block.depthwise.act", "block_pointwise_conv"),
        **chain("block.pointwise.act", "after_conv"),
    }


def test_area_attention():
    """As other attention: the strips only move values."""
    placement = plan(AreaBlock(64, 4, 2.0, "silu"), 64, 64, PlacementOptions(attention="matmul"))
    name = "block.attention"
    assert groups_of(placement) == {
        **IMAGE,
        "before.act": (
            {"before.act": ("block_attention_qkv_conv", "add_1")},
            (f"{name}.qkv.conv",),
        ),
        f"{name}.qkv.conv": ({f"{name}.qkv.conv": ("view",)}, (f"{name}.position.conv",)),
        f"{name}.softmax": ({f"{name}.softmax": ("transpose_1",)}, ()),
        f"{name}.matmul_1": ({f"{name}.matmul_1": ("permute_1",)}, ()),
        f"{name}.add": ({f"{name}.add": ("block_attention_projection_conv",)}, (f"{name}.projection.conv",)),
        "block.add_0": (
            {"block.add_0": ("block_feed_forward_0_conv", "add_2")},
            ("block.feed_forward.0.conv",),
        ),
        "block.feed_forward.0.act": (
            {"block.feed_forward.0.act": ("block_feed_forward_1_conv",)},
            ("block.feed_forward.1.conv",),
        ),
        "block.add_1": ({"block.add_1": ("after_conv",)}, ("after.conv",)),
    }
    qkv = f"{name}.qkv.conv"
    assert [site.groups for site in placement.matmuls] == [(qkv, qkv), (qkv, f"{name}.softmax")]


def test_residual_elan():
    """Entry and each block's result are one group."""
    block = ResidualElan(64, 64, [ConvBlock(32, 32, 3), ConvBlock(32, 32, 3)], "silu")
    assert groups_of(plan(block, 64, 64)) == {
        **IMAGE,
        **chain("before.act", "block_entry_conv"),
        "block.entry.act": (
            {
                "block.entry.act": ("block_blocks_0_conv", "cat"),
                "block.blocks.0.act": ("block_blocks_1_conv", "cat"),
                "block.blocks.1.act": ("cat",),
            },
            ("block.blocks.0.conv", "block.blocks.1.conv", "block.exit.conv"),
        ),
        **EXIT,
    }


def test_decoupled_downsampling():
    """The depthwise convolution has no activation: its own result is quantized."""
    assert groups_of(plan(DecoupledDown(32, 64, "silu"), 32, 64)) == {
        **IMAGE,
        **chain("before.act", "block_pointwise_conv"),
        **chain("block.pointwise.act", "block_depthwise_conv"),
        **chain("block.depthwise.conv", "after_conv"),
    }


def test_compact_inverted_block():
    """Five convolutions in a chain, the sum and both halves in one group; the folded 7x7 convolution is one layer."""
    convs = "block.blocks.0.convs"
    assert groups_of(plan(C2fCIB(32, 64, 1, True, "silu"), 32, 64)) == {
        **IMAGE,
        **chain("before.act", "block_entry_conv"),
        "block.entry.act": (
            {"block.entry.act": ("chunk",), "block.blocks.0.add": ("cat",)},
            (f"{convs}.0.conv", "block.exit.conv"),
        ),
        **{
            name: reads
            for index in range(4)
            for name, reads in chain(f"{convs}.{index}.act", f"block_blocks_0_convs_{index + 1}_conv").items()
        },
        **EXIT,
    }


class TwoHeads(nn.Module):
    """A feature that one head reads as it is and the other detached, as heads for NMS-free detection do."""

    def __init__(self):
        super().__init__()
        self.stem = ConvBlock(3, 32, 3)
        self.many, self.one = ConvBlock(32, 16, 3), ConvBlock(32, 16, 3)
        self.outputs = nn.ModuleList(nn.Conv2d(16, 4, 1) for _ in range(2))

    def forward(self, x):
        feature = self.stem(x)
        return self.outputs[0](self.many(feature)), self.outputs[1](self.one(feature.detach()))


def test_a_detached_feature_has_the_scale_of_the_feature():
    groups = groups_of(place(folded(TwoHeads())))
    assert groups["stem.act"] == ({"stem.act": ("many_conv", "detach")}, ("many.conv", "one.conv"))
