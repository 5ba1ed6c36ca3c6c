"""YOLO11: one function per size, with explicit numbers. Attention follows the pyramid pooling."""

import re
from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from models.attention import C2PSA
from models.blocks import ConvBlock
from models.blocks_csp import SPPF, C3k2
from models.families.family import Family
from models.families.pyramid import STRIDES, Backbone, Neck, PyramidNetwork
from models.heads import HeadBuilder, UltralyticsHead
from models.segmentation import UltralyticsSegmentationHead

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
    "neck.spp.pooling": 9,
    "neck.spp.attention": 10,
    "neck.top_down4": 13,
    "neck.top_down3": 16,
    "neck.down4": 17,
    "neck.bottom_up4": 19,
    "neck.down5": 20,
    "neck.bottom_up5": 22,
    "head": 23,
}


def _build(
    widths: Sequence[int],
    repeats: int,
    wide: str,
    num_classes: int,
    activation: str,
    head: HeadBuilder,
) -> PyramidNetwork:
    """Widths of the stem and of stages 2 to 5; repeats of all blocks; what the blocks on wide maps are made of."""
    act = activation
    w1, w2, w3, w4, w5 = widths
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
            C3k2(w4, w4, repeats, "c3k", act),
            C3k2(w5, w5, repeats, "c3k", act),
        ),
    )
    neck = Neck(
        spp=nn.Sequential(OrderedDict(pooling=SPPF(w5, w5, act), attention=C2PSA(w5, repeats, act))),
        top_down4=C3k2(w5 + w4, w4, repeats, wide, act),
        top_down3=C3k2(w4 + w4, w3, repeats, wide, act),
        down4=ConvBlock(w3, w3, 3, 2, activation=act),
        bottom_up4=C3k2(w3 + w4, w4, repeats, wide, act),
        down5=ConvBlock(w4, w4, 3, 2, activation=act),
        bottom_up5=C3k2(w4 + w5, w5, repeats, "c3k", act),
    )
    return PyramidNetwork(backbone, neck, head((w3, w4, w5), num_classes, STRIDES, act), OFFICIAL_LAYERS)


def yolo11n(
    num_classes: int, activation: str = "silu", head: HeadBuilder = UltralyticsHead
) -> PyramidNetwork:
    """YOLO11-n: 2.6 M parameters at 80 classes."""
    return _build((16, 32, 64, 128, 256), 1, "bottleneck", num_classes, activation, head)


def yolo11s(
    num_classes: int, activation: str = "silu", head: HeadBuilder = UltralyticsHead
) -> PyramidNetwork:
    """YOLO11-s: 9.4 M parameters at 80 classes."""
    return _build((32, 64, 128, 256, 512), 1, "bottleneck", num_classes, activation, head)


def yolo11m(
    num_classes: int, activation: str = "silu", head: HeadBuilder = UltralyticsHead
) -> PyramidNetwork:
    """YOLO11-m: 20.1 M parameters at 80 classes."""
    return _build((64, 128, 256, 512, 512), 1, "c3k", num_classes, activation, head)


def yolo11l(
    num_classes: int, activation: str = "silu", head: HeadBuilder = UltralyticsHead
) -> PyramidNetwork:
    """YOLO11-l: 25.3 M parameters at 80 classes."""
    return _build((64, 128, 256, 512, 512), 2, "c3k", num_classes, activation, head)


def yolo11x(
    num_classes: int, activation: str = "silu", head: HeadBuilder = UltralyticsHead
) -> PyramidNetwork:
    """YOLO11-x: 57.0 M parameters at 80 classes."""
    return _build((96, 192, 384, 768, 768), 2, "c3k", num_classes, activation, head)


_SIZES = {"yolo11n": yolo11n, "yolo11s": yolo11s, "yolo11m": yolo11m, "yolo11l": yolo11l, "yolo11x": yolo11x}

YOLO11 = Family(
    builders={**_SIZES, **{f"{name}-seg": builder for name, builder in _SIZES.items()}},
    strides=STRIDES,
    heads={"official": UltralyticsHead},
    segmentation_heads={"official": UltralyticsSegmentationHead},
    class_bias=re.compile(r"^model\.23\.cv3\.0\.2\.bias$"),
)
