"""YOLOv8: one function per size, with explicit numbers. Sizes differ in widths and in how often blocks repeat."""

import re
from collections.abc import Sequence

from models.blocks import ConvBlock
from models.blocks_csp import SPPF, C2f
from models.families.family import Family
from models.families.pyramid import OFFICIAL_LAYERS, STRIDES, Backbone, Neck, PyramidNetwork
from models.heads import HeadBuilder, UltralyticsLegacyHead
from models.segmentation import UltralyticsLegacySegmentationHead


def _build(
    widths: Sequence[int], repeats: Sequence[int], num_classes: int, activation: str, head: HeadBuilder
) -> PyramidNetwork:
    """Widths of the stem and of stages 2 to 5; repeats of stages 2 to 5, the neck's blocks repeat as stage 5."""
    act = activation
    w1, w2, w3, w4, w5 = widths
    n2, n3, n4, n5 = repeats
    backbone = Backbone(
        stem=(ConvBlock(3, w1, 3, 2, activation=act), ConvBlock(w1, w2, 3, 2, activation=act)),
        stage2=C2f(w2, w2, n2, True, act),
        downs=(
            ConvBlock(w2, w3, 3, 2, activation=act),
            ConvBlock(w3, w4, 3, 2, activation=act),
            ConvBlock(w4, w5, 3, 2, activation=act),
        ),
        stages=(C2f(w3, w3, n3, True, act), C2f(w4, w4, n4, True, act), C2f(w5, w5, n5, True, act)),
    )
    neck = Neck(
        spp=SPPF(w5, w5, act),
        top_down4=C2f(w5 + w4, w4, n5, False, act),
        top_down3=C2f(w4 + w3, w3, n5, False, act),
        down4=ConvBlock(w3, w3, 3, 2, activation=act),
        bottom_up4=C2f(w3 + w4, w4, n5, False, act),
        down5=ConvBlock(w4, w4, 3, 2, activation=act),
        bottom_up5=C2f(w4 + w5, w5, n5, False, act),
    )
    return PyramidNetwork(backbone, neck, head((w3, w4, w5), num_classes, STRIDES, act), OFFICIAL_LAYERS)


def yolov8n(
    num_classes: int, activation: str = "silu", head: HeadBuilder = UltralyticsLegacyHead
) -> PyramidNetwork:
    """YOLOv8-n: 3.2 M parameters at 80 classes."""
    return _build((16, 32, 64, 128, 256), (1, 2, 2, 1), num_classes, activation, head)


def yolov8s(
    num_classes: int, activation: str = "silu", head: HeadBuilder = UltralyticsLegacyHead
) -> PyramidNetwork:
    """YOLOv8-s: 11.2 M parameters at 80 classes."""
    return _build((32, 64, 128, 256, 512), (1, 2, 2, 1), num_classes, activation, head)


def yolov8m(
    num_classes: int, activation: str = "silu", head: HeadBuilder = UltralyticsLegacyHead
) -> PyramidNetwork:
    """YOLOv8-m: 25.9 M parameters at 80 classes."""
    return _build((48, 96, 192, 384, 576), (2, 4, 4, 2), num_classes, activation, head)


def yolov8l(
    num_classes: int, activation: str = "silu", head: HeadBuilder = UltralyticsLegacyHead
) -> PyramidNetwork:
    """YOLOv8-l: 43.7 M parameters at 80 classes."""
    return _build((64, 128, 256, 512, 512), (3, 6, 6, 3), num_classes, activation, head)


def yolov8x(
    num_classes: int, activation: str = "silu", head: HeadBuilder = UltralyticsLegacyHead
) -> PyramidNetwork:
    """YOLOv8-x: 68.2 M parameters at 80 classes."""
    return _build((80, 160, 320, 640, 640), (3, 6, 6, 3), num_classes, activation, head)


_SIZES = {"yolov8n": yolov8n, "yolov8s": yolov8s, "yolov8m": yolov8m, "yolov8l": yolov8l, "yolov8x": yolov8x}

YOLOV8 = Family(
    builders={**_SIZES, **{f"{name}-seg": builder for name, builder in _SIZES.items()}},
    strides=STRIDES,
    heads={"official": UltralyticsLegacyHead},
    segmentation_heads={"official": UltralyticsLegacySegmentationHead},
    class_bias=re.compile(r"^model\.22\.cv3\.0\.2\.bias$"),
)
