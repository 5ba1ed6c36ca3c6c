"""Placement of every block of the family, written down by hand after facts on what INT8 engines fuse.

Each block stands between two convolutions and an output convolution, so that it has a neighbour on either side:

    x -> before -> block -> after -> output
"""

from quant_networks import Between, NeckNet, folded, groups_of
from torch import nn

from models import blocks
from models.blocks import ConvBlock
from models.families.yolov9e import Fuse, Route
from quant import PlacementOptions, Rule, place


def plan(block, in_channels, out_channels, options=None, rules=()):
    placement = place(folded(Between(block, in_channels, out_channels)), options, tuple(rules))
    assert placement.kept_float == {"output": "its result leaves the network"}
    return placement


IMAGE = {"input.x": ({"input.x": ("before_conv",)}, ("before.conv",))}


def test_convolutions_in_a_chain():
    assert groups_of(plan(ConvBlock(16, 16, 3), 16, 16)) == {
        **IMAGE,
        "before.act": ({"before.act": ("block_conv",)}, ("block.conv",)),
        "block.act": ({"block.act": ("after_conv",)}, ("after.conv",)),
    }


def test_residual_block_quantizes_the_skip_and_not_the_branch():
    """The skip shares the scale of the block's first convolution; the branch goes into the sum unquantized."""
    assert groups_of(plan(blocks.RepBottleneck(16, "silu"), 16, 16)) == {
        **IMAGE,
        "before.act": ({"before.act": ("block_rep_conv", "add")}, ("block.rep.conv",)),
        "block.rep.act": ({"block.rep.act": ("block_conv_conv",)}, ("block.conv.conv",)),
        "block.add": ({"block.add": ("after_conv",)}, ("after.conv",)),
    }


def test_residual_blocks_in_a_row():
    """A sum is the next block's skip: one quantizer for both of its readers."""
    row = nn.Sequential(blocks.RepBottleneck(16, "silu"), blocks.RepBottleneck(16, "silu"))
    assert groups_of(plan(row, 16, 16)) == {
        **IMAGE,
        "before.act": ({"before.act": ("block_0_rep_conv", "add")}, ("block.0.rep.conv",)),
        "block.0.rep.act": ({"block.0.rep.act": ("block_0_conv_conv",)}, ("block.0.conv.conv",)),
        "block.0.add": ({"block.0.add": ("block_1_rep_conv", "add_1")}, ("block.1.rep.conv",)),
        "block.1.rep.act": ({"block.1.rep.act": ("block_1_conv_conv",)}, ("block.1.conv.conv",)),
        "block.1.add": ({"block.1.add": ("after_conv",)}, ("after.conv",)),
    }


def test_cross_stage_block():
    """Both paths end in the concat before `exit`: one scale for the sum and the shortcut."""
    assert groups_of(plan(blocks.RepCSP(16, 32, 1, "silu"), 16, 32)) == {
        **IMAGE,
        "before.act": (
            {"before.act": ("block_entry_conv", "block_shortcut_conv")},
            ("block.entry.conv", "block.shortcut.conv"),
        ),
        "block.entry.act": (
            {"block.entry.act": ("block_bottlenecks_0_rep_conv", "add")},
            ("block.bottlenecks.0.rep.conv",),
        ),
        "block.bottlenecks.0.rep.act": (
            {"block.bottlenecks.0.rep.act": ("block_bottlenecks_0_conv_conv",)},
            ("block.bottlenecks.0.conv.conv",),
        ),
        "block.bottlenecks.0.add": (
            {"block.bottlenecks.0.add": ("cat",), "block.shortcut.act": ("cat",)},
            ("block.exit.conv",),
        ),
        "block.exit.act": ({"block.exit.act": ("after_conv",)}, ("after.conv",)),
    }


def test_elan():
    """One quantizer before the split; entry, both branches and exit share its scale."""
    assert groups_of(plan(blocks.Elan(16, 32, 32, "silu"), 16, 32)) == {
        **IMAGE,
        "before.act": ({"before.act": ("block_entry_conv",)}, ("block.entry.conv",)),
        "block.entry.act": (
            {
                "block.entry.act": ("chunk",),
                "block.branch1.act": ("block_branch2_conv", "cat"),
                "block.branch2.act": ("cat",),
            },
            ("block.branch1.conv", "block.branch2.conv", "block.exit.conv"),
        ),
        "block.exit.act": ({"block.exit.act": ("after_conv",)}, ("after.conv",)),
    }


def _csp_branch(name, add, cat):
    """The groups inside one branch of a `CSPElan`, whose input belongs to the outer group."""
    csp = f"block.{name}.csp"
    node = csp.replace(".", "_")
    return {
        f"{csp}.entry.act": (
            {f"{csp}.entry.act": (f"{node}_bottlenecks_0_rep_conv", add)},
            (f"{csp}.bottlenecks.0.rep.conv",),
        ),
        f"{csp}.bottlenecks.0.rep.act": (
            {f"{csp}.bottlenecks.0.rep.act": (f"{node}_bottlenecks_0_conv_conv",)},
            (f"{csp}.bottlenecks.0.conv.conv",),
        ),
        f"{csp}.bottlenecks.0.add": (
            {f"{csp}.bottlenecks.0.add": (cat,), f"{csp}.shortcut.act": (cat,)},
            (f"{csp}.exit.conv",),
        ),
        f"{csp}.exit.act": ({f"{csp}.exit.act": (f"block_{name}_conv_conv",)}, (f"block.{name}.conv.conv",)),
    }


def test_generalised_elan():
    assert groups_of(plan(blocks.CSPElan(16, 64, 32, 1, "silu"), 16, 32)) == {
        **IMAGE,
        "before.act": ({"before.act": ("block_entry_conv",)}, ("block.entry.conv",)),
        "block.entry.act": (
            {
                "block.entry.act": ("chunk",),
                "block.branch1.conv.act": (
                    "block_branch2_csp_entry_conv",
                    "block_branch2_csp_shortcut_conv",
                    "cat_2",
                ),
                "block.branch2.conv.act": ("cat_2",),
            },
            (
                "block.branch1.csp.entry.conv",
                "block.branch1.csp.shortcut.conv",
                "block.branch2.csp.entry.conv",
                "block.branch2.csp.shortcut.conv",
                "block.exit.conv",
            ),
        ),
        **_csp_branch("branch1", "add", "cat"),
        **_csp_branch("branch2", "add_1", "cat_1"),
        "block.exit.act": ({"block.exit.act": ("after_conv",)}, ("after.conv",)),
    }


def test_average_then_convolution():
    """The average does not commute with rounding: INT8 in, and a scale of its own for the result."""
    assert groups_of(plan(blocks.AverageDown(16, 32, "silu"), 16, 32)) == {
        **IMAGE,
        "before.act": ({"before.act": ("block_average",)}, ()),
        "block.average": ({"block.average": ("block_conv_conv",)}, ("block.conv.conv",)),
        "block.conv.act": ({"block.conv.act": ("after_conv",)}, ("after.conv",)),
    }


def test_average_then_split():
    """Split and max-pool lie inside the average's group; both results meet in the caller's concat."""
    assert groups_of(plan(blocks.SplitDown(32, 32, "silu"), 32, 32)) == {
        **IMAGE,
        "before.act": ({"before.act": ("block_average",)}, ()),
        "block.average": (
            {"block.average": ("chunk",)},
            ("block.conv.conv", "block.pooled_conv.conv"),
        ),
        "block.conv.act": (
            {"block.conv.act": ("cat",), "block.pooled_conv.act": ("cat",)},
            ("after.conv",),
        ),
    }


def test_pyramid_pooling():
    """Entry, three max-pools and exit: one scale, one quantizer."""
    assert groups_of(plan(blocks.SPPElan(16, 16, 32, "silu"), 16, 32)) == {
        **IMAGE,
        "before.act": ({"before.act": ("block_entry_conv",)}, ("block.entry.conv",)),
        "block.entry.act": ({"block.entry.act": ("block_pool1", "cat")}, ("block.exit.conv",)),
        "block.exit.act": ({"block.exit.act": ("after_conv",)}, ("after.conv",)),
    }


def _head(level):
    """Groups of one level of the head: both first convolutions read the feature's one scale."""
    return {
        f"head.{branch}.{level}.conv1.act": (
            {f"head.{branch}.{level}.conv1.act": (f"head_{branch}_{level}_conv2_conv",)},
            (f"head.{branch}.{level}.conv2.conv",),
        )
        for branch in ("box", "cls")
    }


def test_neck_and_head():
    """Upsampled, lateral and down-going features that meet in a concat share a scale with all their readers."""
    placement = place(folded(NeckNet()))
    assert groups_of(placement) == {
        "input.x": ({"input.x": ("stage3_conv",)}, ("stage3.conv",)),
        "stage3.act": (
            {
                "stage3.act": ("stage4_conv", "cat_1"),
                "neck.top_down4.act": ("neck_upsample4", "cat_2"),
                "neck.down4.act": ("cat_2",),
            },
            ("stage4.conv", "neck.top_down3.conv", "neck.bottom_up4.conv"),
        ),
        "stage4.act": (
            {
                "stage4.act": ("stage5_conv", "cat"),
                "neck.spp.act": ("neck_upsample5", "cat_3"),
                "neck.down5.act": ("cat_3",),
            },
            ("stage5.conv", "neck.top_down4.conv", "neck.bottom_up5.conv"),
        ),
        "stage5.act": ({"stage5.act": ("neck_spp_conv",)}, ("neck.spp.conv",)),
        "neck.top_down3.act": (
            {"neck.top_down3.act": ("neck_down4_conv", "head_box_0_conv1_conv", "head_cls_0_conv1_conv")},
            ("neck.down4.conv", "head.box.0.conv1.conv", "head.cls.0.conv1.conv"),
        ),
        "neck.bottom_up4.act": (
            {"neck.bottom_up4.act": ("neck_down5_conv", "head_box_1_conv1_conv", "head_cls_1_conv1_conv")},
            ("neck.down5.conv", "head.box.1.conv1.conv", "head.cls.1.conv1.conv"),
        ),
        "neck.bottom_up5.act": (
            {"neck.bottom_up5.act": ("head_box_2_conv1_conv", "head_cls_2_conv1_conv")},
            ("head.box.2.conv1.conv", "head.cls.2.conv1.conv"),
        ),
        **_head(0),
        **_head(1),
        **_head(2),
    }
    assert placement.concats == dict.fromkeys(("neck.cat_0", "neck.cat_1", "neck.cat_2", "neck.cat_3"), True)
    assert placement.kept_float == {
        f"head.{branch}.{level}.output": "its result leaves the network"
        for level in range(3)
        for branch in ("box", "cls")
    }


class Composite(nn.Module):
    """The two-backbone composition of YOLOv9-e at two levels."""

    def __init__(self):
        super().__init__()
        self.first, self.second = ConvBlock(3, 16, 3), ConvBlock(16, 32, 3, 2)
        self.route1, self.route2 = Route(16, [16]), Route(32, [16, 32])
        self.own1, self.own2 = ConvBlock(3, 16, 3), ConvBlock(16, 32, 3, 2)
        self.fuse1, self.fuse2 = Fuse(2), Fuse(1)
        self.after = ConvBlock(32, 16, 1)
        self.output = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        first = self.first(x)
        route1, route2 = self.route1(first), self.route2(self.second(first))
        total = self.fuse1(self.own1(x), (route1[0], route2[0]))
        return self.output(self.after(self.fuse2(self.own2(total), (route2[1],))))


def test_composed_backbones():
    """A route's convolution is quantized before its split, which takes all parts along. In the chain of sums the
    second backbone's own feature and the running total stay unquantized; only the last total is rounded."""
    assert groups_of(place(folded(Composite()))) == {
        "input.x": ({"input.x": ("first_conv", "own1_conv")}, ("first.conv", "own1.conv")),
        "first.act": ({"first.act": ("route1_conv", "second_conv")}, ("route1.conv", "second.conv")),
        "route1.conv": ({"route1.conv": ("split",)}, ()),
        "second.act": ({"second.act": ("route2_conv",)}, ("route2.conv",)),
        "route2.conv": ({"route2.conv": ("split_1",)}, ()),
        "fuse1.add_1": ({"fuse1.add_1": ("own2_conv",)}, ("own2.conv",)),
        "fuse2.add": ({"fuse2.add": ("after_conv",)}, ("after.conv",)),
    }


# -- sharing over concats


def test_concats_with_scales_of_their_own():
    """Sharing off: the inputs keep their scales for their own readers, and the concat's result gets one more."""
    placement = plan(blocks.Elan(16, 32, 32, "silu"), 16, 32, PlacementOptions(share_concat_scales=False))
    assert placement.concats == {"block.cat": False}
    assert groups_of(placement) == {
        **IMAGE,
        "before.act": ({"before.act": ("block_entry_conv",)}, ("block.entry.conv",)),
        "block.entry.act": ({"block.entry.act": ("chunk",)}, ("block.branch1.conv",)),
        "block.branch1.act": ({"block.branch1.act": ("block_branch2_conv",)}, ("block.branch2.conv",)),
        "block.cat": ({"block.cat": ("block_exit_conv",)}, ("block.exit.conv",)),
        "block.exit.act": ({"block.exit.act": ("after_conv",)}, ("after.conv",)),
    }


def test_one_concat_with_a_scale_of_its_own():
    placement = place(folded(NeckNet()), rules=(Rule("neck.cat_0", share=False),))
    assert placement.concats == {
        "neck.cat_0": False,
        "neck.cat_1": True,
        "neck.cat_2": True,
        "neck.cat_3": True,
    }
    groups = groups_of(placement)
    assert groups["neck.cat_0"] == ({"neck.cat_0": ("neck_top_down4_conv",)}, ("neck.top_down4.conv",))
    assert groups["stage4.act"] == ({"stage4.act": ("stage5_conv",)}, ("stage5.conv",))
    assert groups["neck.spp.act"] == (
        {"neck.spp.act": ("cat_3",), "neck.down5.act": ("cat_3",)},
        ("neck.bottom_up5.conv",),
    )


def test_one_shared_concat_among_separate_ones():
    options = PlacementOptions(share_concat_scales=False)
    placement = place(folded(NeckNet()), options, (Rule("neck.cat_2", share=True),))
    groups = groups_of(placement)
    assert set(groups["neck.top_down4.act"][0]) == {"neck.top_down4.act", "neck.down4.act"}
    assert "neck.cat_2" not in groups
    assert {"neck.cat_0", "neck.cat_1", "neck.cat_3"} <= set(groups)
