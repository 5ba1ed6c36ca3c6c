"""YOLOv5u: YOLOv5 with YOLOv8's anchor-free head; one function per size, with explicit numbers.

The neck's two entries from above are 1x1 convolutions; both their results go up and come back down.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from models.blocks import ConvBlock
from models.blocks_csp import C3, SPPF
from models.families.family import Family
from models.families.pyramid import STRIDES, Backbone, Neck, PyramidNetwork
from models.heads import HeadBuilder, UltralyticsLegacyHead

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
    "neck.spp.lateral": 10,
    "neck.top_down4.csp": 13,
    "neck.top_down4.lateral": 14,
    "neck.top_down3": 17,
    "neck.down4": 18,
    "neck.bottom_up4": 20,
    "neck.down5": 21,
    "neck.bottom_up5": 23,
    "head": 24,
}


def _build(
    widths: Sequence[int], repeats: Sequence[int], num_classes: int, activation: str, head: HeadBuilder
) -> PyramidNetwork:
    """Widths of the stem and of stages 2 to 5; repeats of stages 2 to 5, the neck's blocks repeat as stage 5."""
    act = activation
    w1, w2, w3, w4, w5 = widths
    n2, n3, n4, n5 = repeats
    backbone = Backbone(
        stem=(ConvBlock(3, w1, 6, 2, activation=act, padding=2), ConvBlock(w1, w2, 3, 2, activation=act)),
        stage2=C3(w2, w2, n2, True, act),
        downs=(
            ConvBlock(w2, w3, 3, 2, activation=act),
            ConvBlock(w3, w4, 3, 2, activation=act),
            ConvBlock(w4, w5, 3, 2, activation=act),
        ),
        stages=(C3(w3, w3, n3, True, act), C3(w4, w4, n4, True, act), C3(w5, w5, n5, True, act)),
    )
    neck = Neck(
        spp=nn.Sequential(
            OrderedDict(pooling=SPPF(w5, w5, act), lateral=ConvBlock(w5, w4, 1, activation=act))
        ),
        top_down4=nn.Sequential(
            OrderedDict(csp=C3(w4 + w4, w4, n5, False, act), lateral=ConvBlock(w4, w3, 1, activation=act))
        ),
        top_down3=C3(w3 + w3, w3, n5, False, act),
        down4=ConvBlock(w3, w3, 3, 2, activation=act),
        bottom_up4=C3(w3 + w3, w4, n5, False, act),
        down5=ConvBlock(w4, w4, 3, 2, activation=act),
        bottom_up5=C3(w4 + w4, w5, n5, False, act),
    )
    return PyramidNetwork(backbone, neck, head((w3, w4, w5), num_classes, STRIDES, act), OFFICIAL_LAYERS)


def yolov5nu(
    num_classes: int, activation: str = "silu", head: HeadBuilder = UltralyticsLegacyHead
) -> PyramidNetwork:
    """YOLOv5-nu: 2.6 M parameters at 80 classes."""
    return _build((16, 32, 64, 128, 256), (1, 2, 3, 1), num_classes, activation, head)


def yolov5su(
    num_classes: int, activation: str = "silu", head: HeadBuilder = UltralyticsLegacyHead
) -> PyramidNetwork:
    """YOLOv5-su: 9.1 M parameters at 80 classes."""
    return _build((32, 64, 128, 256, 512), (1, 2, 3, 1), num_classes, activation, head)


def yolov5mu(
    num_classes: int, activation: str = "silu", head: HeadBuilder = UltralyticsLegacyHead
) -> PyramidNetwork:
    """YOLOv5-mu: 25.1 M parameters at 80 classes."""
    return _build((48, 96, 192, 384, 768), (2, 4, 6, 2), num_classes, activation, head)


def yolov5lu(
    num_classes: int, activation: str = "silu", head: HeadBuilder = UltralyticsLegacyHead
) -> PyramidNetwork:
    """YOLOv5-lu: 53.2 M parameters at 80 classes."""
    return _build((64, 128, 256, 512, 1024), (3, 6, 9, 3), num_classes, activation, head)


def yolov5xu(
    num_classes: int, activation: str = "silu", head: HeadBuilder = UltralyticsLegacyHead
) -> PyramidNetwork:
    """YOLOv5-xu: 97.2 M parameters at 80 classes."""
    return _build((80, 160, 320, 640, 1280), (4, 8, 12, 4), num_classes, activation, head)


YOLOV5U = Family(
    builders={
        "yolov5nu": yolov5nu,
        "yolov5su": yolov5su,
        "yolov5mu": yolov5mu,
        "yolov5lu": yolov5lu,
        "yolov5xu": yolov5xu,
    },
    strides=STRIDES,
    heads={"official": UltralyticsLegacyHead},
    segmentation_heads={},
    class_bias=re.compile(r"^model\.24\.cv3\.0\.2\.bias$"),
)
