"""YOLO12 (arXiv:2502.12524): one function per size, with explicit numbers. Area attention in stages 4 and 5.

There is no pyramid pooling. The two largest sizes have a scaled residual around their attention stages and a narrower
feed-forward network in them.
"""

import re
from collections.abc import Sequence

from torch import nn

from models.area_attention import area_elan, bottleneck_elan
from models.blocks import ConvBlock
from models.blocks_csp import C3k2
from models.families.family import Family
from models.families.pyramid import STRIDES, Backbone, Neck, PyramidNetwork
from models.heads import HeadBuilder, UltralyticsHead

OFFICIAL_LAYERS = {
    "backbone.stem1": 0,
    "backbone.stem2": 1,
    "backbone.stage2": 2,
    "backbone.down3": 3,
    "backbone.stage3": 4,
    "backbone.down4": 5,
    "backbone.stage4": 6,
    "backbone.down5": 7,
    "backbone.stage5": 8,
    "neck.top_down4": 11,
    "neck.top_down3": 14,
    "neck.down4": 15,
    "neck.bottom_up4": 17,
    "neck.down5": 18,
    "neck.bottom_up5": 20,
    "head": 21,
}


def _build(
    widths: Sequence[int],
    repeats: int,
    wide: str,
    large: bool,
    num_classes: int,
    activation: str,
    head: HeadBuilder,
) -> PyramidNetwork:
    """Widths of the stem and of stages 2 to 5; repeats of all blocks, attention stages twice that often.

    `wide` is what the blocks on wide maps are made of; `large` sizes have residual attention stages.
    """
    act = activation
    w1, w2, w3, w4, w5 = widths
    mlp_ratio = 1.2 if large else 2.0
    backbone = Backbone(
        stem=(ConvBlock(3, w1, 3, 2, activation=act), ConvBlock(w1, w2, 3, 2, activation=act)),
        stage2=C3k2(w2, w3, repeats, wide, act, ratio=0.25),
        downs=(
            ConvBlock(w3, w3, 3, 2, activation=act),
            ConvBlock(w4, w4, 3, 2, activation=act),
            ConvBlock(w4, w5, 3, 2, activation=act),
        ),
        stages=(
            C3k2(w3, w4, repeats, wide, act, ratio=0.25),
            area_elan(w4, 2 * repeats, 4, mlp_ratio, act, residual=large),
            area_elan(w5, 2 * repeats, 1, mlp_ratio, act, residual=large),
        ),
    )
    neck = Neck(
        spp=nn.Identity(),
        top_down4=bottleneck_elan(w5 + w4, w4, repeats, act),
        top_down3=bottleneck_elan(w4 + w4, w3, repeats, act),
        down4=ConvBlock(w3, w3, 3, 2, activation=act),
        bottom_up4=bottleneck_elan(w3 + w4, w4, repeats, act),
        down5=ConvBlock(w4, w4, 3, 2, activation=act),
        bottom_up5=C3k2(w4 + w5, w5, repeats, "c3k", act),
    )
    return PyramidNetwork(backbone, neck, head((w3, w4, w5), num_classes, STRIDES, act), OFFICIAL_LAYERS)


def yolo12n(
    num_classes: int, activation: str = "silu", head: HeadBuilder = UltralyticsHead
) -> PyramidNetwork:
    """YOLO12-N: 2.6 M parameters at 80 classes."""
    return _build((16, 32, 64, 128, 256), 1, "bottleneck", False, num_classes, activation, head)


def yolo12s(
    num_classes: int, activation: str = "silu", head: HeadBuilder = UltralyticsHead
) -> PyramidNetwork:
    """YOLO12-S: 9.3 M parameters at 80 classes."""
    return _build((32, 64, 128, 256, 512), 1, "bottleneck", False, num_classes, activation, head)


def yolo12m(
    num_classes: int, activation: str = "silu", head: HeadBuilder = UltralyticsHead
) -> PyramidNetwork:
    """YOLO12-M: 20.2 M parameters at 80 classes."""
    return _build((64, 128, 256, 512, 512), 1, "c3k", False, num_classes, activation, head)


def yolo12l(
    num_classes: int, activation: str = "silu", head: HeadBuilder = UltralyticsHead
) -> PyramidNetwork:
    """YOLO12-L: 26.4 M parameters at 80 classes."""
    return _build((64, 128, 256, 512, 512), 2, "c3k", True, num_classes, activation, head)


def yolo12x(
    num_classes: int, activation: str = "silu", head: HeadBuilder = UltralyticsHead
) -> PyramidNetwork:
    """YOLO12-X: 59.1 M parameters at 80 classes."""
    return _build((96, 192, 384, 768, 768), 2, "c3k", True, num_classes, activation, head)


YOLO12 = Family(
    builders={
        "yolo12n": yolo12n,
        "yolo12s": yolo12s,
        "yolo12m": yolo12m,
        "yolo12l": yolo12l,
        "yolo12x": yolo12x,
    },
    strides=STRIDES,
    heads={"official": UltralyticsHead},
    segmentation_heads={},
    class_bias=re.compile(r"^model\.21\.cv3\.0\.2\.bias$"),
)
