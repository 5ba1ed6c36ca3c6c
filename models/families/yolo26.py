"""YOLO26: one function per size, with explicit numbers. Two heads without box distributions; deployed without NMS.

The layout is YOLO11's, with a shortcut around the pyramid pooling, `C3k` blocks in the neck and attention in its last
block.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from torch import nn

from models.attention import C2PSA
from models.blocks import ConvBlock
from models.blocks_csp import SPPF, C3k2
from models.boxes import Decode
from models.dual_heads import (
    CLASS_BIAS,
    DirectDualHead,
    DirectDualSegmentationHead,
    dual_styles,
    find_dual_style,
)
from models.families.family import Family
from models.families.pyramid import STRIDES, Backbone, Neck, PyramidNetwork
from models.families.yolo11 import OFFICIAL_LAYERS
from models.heads import HeadBuilder
from models.segmentation import SegmentationDecode


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
    pooling = SPPF(w5, w5, act, shortcut=True)
    neck = Neck(
        spp=nn.Sequential(OrderedDict(pooling=pooling, attention=C2PSA(w5, repeats, act))),
        top_down4=C3k2(w5 + w4, w4, repeats, "c3k", act),
        top_down3=C3k2(w4 + w4, w3, repeats, "c3k", act),
        down4=ConvBlock(w3, w3, 3, 2, activation=act),
        bottom_up4=C3k2(w3 + w4, w4, repeats, "c3k", act),
        down5=ConvBlock(w4, w4, 3, 2, activation=act),
        bottom_up5=C3k2(w4 + w5, w5, 1, "attention", act),
    )
    return PyramidNetwork(backbone, neck, head((w3, w4, w5), num_classes, STRIDES, act), OFFICIAL_LAYERS)


def yolo26n(num_classes: int, activation: str = "silu", head: HeadBuilder = DirectDualHead) -> PyramidNetwork:
    """YOLO26-n: 2.4 M parameters at 80 classes as deployed."""
    return _build((16, 32, 64, 128, 256), 1, "bottleneck", num_classes, activation, head)


def yolo26s(num_classes: int, activation: str = "silu", head: HeadBuilder = DirectDualHead) -> PyramidNetwork:
    """YOLO26-s: 9.5 M parameters at 80 classes as deployed."""
    return _build((32, 64, 128, 256, 512), 1, "bottleneck", num_classes, activation, head)


def yolo26m(num_classes: int, activation: str = "silu", head: HeadBuilder = DirectDualHead) -> PyramidNetwork:
    """YOLO26-m: 20.4 M parameters at 80 classes as deployed."""
    return _build((64, 128, 256, 512, 512), 1, "c3k", num_classes, activation, head)


def yolo26l(num_classes: int, activation: str = "silu", head: HeadBuilder = DirectDualHead) -> PyramidNetwork:
    """YOLO26-l: 24.8 M parameters at 80 classes as deployed."""
    return _build((64, 128, 256, 512, 512), 2, "c3k", num_classes, activation, head)


def yolo26x(num_classes: int, activation: str = "silu", head: HeadBuilder = DirectDualHead) -> PyramidNetwork:
    """YOLO26-x: 55.7 M parameters at 80 classes as deployed."""
    return _build((96, 192, 384, 768, 768), 2, "c3k", num_classes, activation, head)


_SIZES = {"yolo26n": yolo26n, "yolo26s": yolo26s, "yolo26m": yolo26m, "yolo26l": yolo26l, "yolo26x": yolo26x}

YOLO26 = Family(
    builders={**_SIZES, **{f"{name}-seg": builder for name, builder in _SIZES.items()}},
    strides=STRIDES,
    heads=dual_styles(DirectDualHead),
    segmentation_heads=dual_styles(DirectDualSegmentationHead),
    class_bias=CLASS_BIAS,
    find_head_style=find_dual_style,
    training_only=re.compile(r"^model\.23\.proto\.semseg\."),
    decode=partial(Decode, reg_max=1),
    segmentation_decode=partial(SegmentationDecode, reg_max=1),
)
