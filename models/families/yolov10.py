"""YOLOv10 (arXiv:2405.14458): one function per size, with explicit numbers. Two heads; deployed without NMS.

Which stages have compact inverted blocks, and which of these a 7x7 kernel, differs from size to size: the paper chooses
them by how much each stage's layers repeat each other (section 3.2).
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torch import nn

from models.attention import PSA
from models.blocks import ConvBlock
from models.blocks_csp import SPPF, C2f
from models.blocks_v10 import C2fCIB, DecoupledDown
from models.dual_heads import CLASS_BIAS, DualHead, dual_styles, find_dual_style
from models.families.family import Family
from models.families.pyramid import STRIDES, Backbone, Neck, PyramidNetwork
from models.families.yolo11 import OFFICIAL_LAYERS
from models.heads import HeadBuilder


def _build(
    widths: Sequence[int],
    repeats: Sequence[int],
    compact: Mapping[str, bool],
    num_classes: int,
    activation: str,
    head: HeadBuilder,
) -> PyramidNetwork:
    """Widths of the stem and of stages 2 to 5; repeats of stages 2 to 5, the neck's blocks repeat as stage 5.

    `compact` has the parts of compact inverted blocks, and whether their kernel is large.
    """
    act = activation
    w1, w2, w3, w4, w5 = widths
    n2, n3, n4, n5 = repeats

    def chain(part: str, inputs: int, outputs: int, count: int, shortcut: bool) -> nn.Module:
        if part in compact:
            return C2fCIB(inputs, outputs, count, compact[part], act)
        return C2f(inputs, outputs, count, shortcut, act)

    backbone = Backbone(
        stem=(ConvBlock(3, w1, 3, 2, activation=act), ConvBlock(w1, w2, 3, 2, activation=act)),
        stage2=C2f(w2, w2, n2, True, act),
        downs=(
            ConvBlock(w2, w3, 3, 2, activation=act),
            DecoupledDown(w3, w4, act),
            DecoupledDown(w4, w5, act),
        ),
        stages=(
            C2f(w3, w3, n3, True, act),
            chain("stage4", w4, w4, n4, True),
            chain("stage5", w5, w5, n5, True),
        ),
    )
    neck = Neck(
        spp=nn.Sequential(OrderedDict(pooling=SPPF(w5, w5, act), attention=PSA(w5, act))),
        top_down4=chain("top_down4", w5 + w4, w4, n5, False),
        top_down3=C2f(w4 + w3, w3, n5, False, act),
        down4=ConvBlock(w3, w3, 3, 2, activation=act),
        bottom_up4=chain("bottom_up4", w3 + w4, w4, n5, False),
        down5=DecoupledDown(w4, w4, act),
        bottom_up5=chain("bottom_up5", w4 + w5, w5, n5, False),
    )
    return PyramidNetwork(backbone, neck, head((w3, w4, w5), num_classes, STRIDES, act), OFFICIAL_LAYERS)


def yolov10n(num_classes: int, activation: str = "silu", head: HeadBuilder = DualHead) -> PyramidNetwork:
    """YOLOv10-N: 2.3 M parameters at 80 classes as deployed."""
    compact = {"bottom_up5": True}
    return _build((16, 32, 64, 128, 256), (1, 2, 2, 1), compact, num_classes, activation, head)


def yolov10s(num_classes: int, activation: str = "silu", head: HeadBuilder = DualHead) -> PyramidNetwork:
    """YOLOv10-S: 7.2 M parameters at 80 classes as deployed."""
    compact = {"stage5": True, "bottom_up5": True}
    return _build((32, 64, 128, 256, 512), (1, 2, 2, 1), compact, num_classes, activation, head)


def yolov10m(num_classes: int, activation: str = "silu", head: HeadBuilder = DualHead) -> PyramidNetwork:
    """YOLOv10-M: 15.4 M parameters at 80 classes as deployed."""
    compact = dict.fromkeys(("stage5", "bottom_up4", "bottom_up5"), False)
    return _build((48, 96, 192, 384, 576), (2, 4, 4, 2), compact, num_classes, activation, head)


def yolov10b(num_classes: int, activation: str = "silu", head: HeadBuilder = DualHead) -> PyramidNetwork:
    """YOLOv10-B: 19.1 M parameters at 80 classes as deployed."""
    compact = dict.fromkeys(("stage5", "top_down4", "bottom_up4", "bottom_up5"), False)
    return _build((64, 128, 256, 512, 512), (2, 4, 4, 2), compact, num_classes, activation, head)


def yolov10l(num_classes: int, activation: str = "silu", head: HeadBuilder = DualHead) -> PyramidNetwork:
    """YOLOv10-L: 24.4 M parameters at 80 classes as deployed."""
    compact = dict.fromkeys(("stage5", "top_down4", "bottom_up4", "bottom_up5"), False)
    return _build((64, 128, 256, 512, 512), (3, 6, 6, 3), compact, num_classes, activation, head)


def yolov10x(num_classes: int, activation: str = "silu", head: HeadBuilder = DualHead) -> PyramidNetwork:
    """YOLOv10-X: 29.5 M parameters at 80 classes as deployed."""
    compact = dict.fromkeys(("stage4", "stage5", "top_down4", "bottom_up4", "bottom_up5"), False)
    return _build((80, 160, 320, 640, 640), (3, 6, 6, 3), compact, num_classes, activation, head)


YOLOV10 = Family(
    builders={
        "yolov10n": yolov10n,
        "yolov10s": yolov10s,
        "yolov10m": yolov10m,
        "yolov10b": yolov10b,
        "yolov10l": yolov10l,
        "yolov10x": yolov10x,
    },
    strides=STRIDES,
    heads=dual_styles(DualHead),
    segmentation_heads={},
    class_bias=CLASS_BIAS,
    find_head_style=find_dual_style,
)
