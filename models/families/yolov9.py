"""YOLOv9 t, s, m and c in their deployed, single-head form: one function per size, with explicit numbers.

The training form with its auxiliary branch computes the same function; `models.checkpoints.convert` drops the branch
when such a checkpoint is loaded. Layer indices are those of the official single-head ("gelan") checkpoints.
"""

from models.blocks import AverageDown, ConvBlock, CSPElan, Elan, SplitDown, SPPElan
from models.families.pyramid import OFFICIAL_LAYERS, STRIDES, Backbone, Neck, PyramidNetwork
from models.heads import DetectionHead, HeadBuilder


def yolov9t(num_classes: int, activation: str = "silu", head: HeadBuilder = DetectionHead) -> PyramidNetwork:
    """YOLOv9-t: 2.4 M parameters at 80 classes."""
    act = activation
    backbone = Backbone(
        stem=(ConvBlock(3, 16, 3, 2, activation=act), ConvBlock(16, 32, 3, 2, activation=act)),
        stage2=Elan(32, 32, 32, act),
        downs=(AverageDown(32, 64, act), AverageDown(64, 96, act), AverageDown(96, 128, act)),
        stages=(CSPElan(64, 64, 64, 3, act), CSPElan(96, 96, 96, 3, act), CSPElan(128, 128, 128, 3, act)),
    )
    neck = Neck(
        spp=SPPElan(128, 64, 128, act),
        top_down4=CSPElan(128 + 96, 96, 96, 3, act),
        top_down3=CSPElan(96 + 64, 64, 64, 3, act),
        down4=AverageDown(64, 48, act),
        bottom_up4=CSPElan(48 + 96, 96, 96, 3, act),
        down5=AverageDown(96, 64, act),
        bottom_up5=CSPElan(64 + 128, 128, 128, 3, act),
    )
    return PyramidNetwork(backbone, neck, head((64, 96, 128), num_classes, STRIDES, act), OFFICIAL_LAYERS)


def yolov9s(num_classes: int, activation: str = "silu", head: HeadBuilder = DetectionHead) -> PyramidNetwork:
    """YOLOv9-s: 7.2 M parameters at 80 classes; every width is twice YOLOv9-t's."""
    act = activation
    backbone = Backbone(
        stem=(ConvBlock(3, 32, 3, 2, activation=act), ConvBlock(32, 64, 3, 2, activation=act)),
        stage2=Elan(64, 64, 64, act),
        downs=(AverageDown(64, 128, act), AverageDown(128, 192, act), AverageDown(192, 256, act)),
        stages=(
            CSPElan(128, 128, 128, 3, act),
            CSPElan(192, 192, 192, 3, act),
            CSPElan(256, 256, 256, 3, act),
        ),
    )
    neck = Neck(
        spp=SPPElan(256, 128, 256, act),
        top_down4=CSPElan(256 + 192, 192, 192, 3, act),
        top_down3=CSPElan(192 + 128, 128, 128, 3, act),
        down4=AverageDown(128, 96, act),
        bottom_up4=CSPElan(96 + 192, 192, 192, 3, act),
        down5=AverageDown(192, 128, act),
        bottom_up5=CSPElan(128 + 256, 256, 256, 3, act),
    )
    return PyramidNetwork(backbone, neck, head((128, 192, 256), num_classes, STRIDES, act), OFFICIAL_LAYERS)


def yolov9m(num_classes: int, activation: str = "silu", head: HeadBuilder = DetectionHead) -> PyramidNetwork:
    """YOLOv9-m: 20 M parameters at 80 classes."""
    act = activation
    backbone = Backbone(
        stem=(ConvBlock(3, 32, 3, 2, activation=act), ConvBlock(32, 64, 3, 2, activation=act)),
        stage2=CSPElan(64, 128, 128, 1, act),
        downs=(AverageDown(128, 240, act), AverageDown(240, 360, act), AverageDown(360, 480, act)),
        stages=(
            CSPElan(240, 240, 240, 1, act),
            CSPElan(360, 360, 360, 1, act),
            CSPElan(480, 480, 480, 1, act),
        ),
    )
    neck = Neck(
        spp=SPPElan(480, 240, 480, act),
        top_down4=CSPElan(480 + 360, 360, 360, 1, act),
        top_down3=CSPElan(360 + 240, 240, 240, 1, act),
        down4=AverageDown(240, 184, act),
        bottom_up4=CSPElan(184 + 360, 360, 360, 1, act),
        down5=AverageDown(360, 240, act),
        bottom_up5=CSPElan(240 + 480, 480, 480, 1, act),
    )
    return PyramidNetwork(backbone, neck, head((240, 360, 480), num_classes, STRIDES, act), OFFICIAL_LAYERS)


def yolov9c(num_classes: int, activation: str = "silu", head: HeadBuilder = DetectionHead) -> PyramidNetwork:
    """YOLOv9-c: 25 M parameters at 80 classes."""
    act = activation
    backbone = Backbone(
        stem=(ConvBlock(3, 64, 3, 2, activation=act), ConvBlock(64, 128, 3, 2, activation=act)),
        stage2=CSPElan(128, 128, 256, 1, act),
        downs=(SplitDown(256, 256, act), SplitDown(512, 512, act), SplitDown(512, 512, act)),
        stages=(
            CSPElan(256, 256, 512, 1, act),
            CSPElan(512, 512, 512, 1, act),
            CSPElan(512, 512, 512, 1, act),
        ),
    )
    neck = Neck(
        spp=SPPElan(512, 256, 512, act),
        top_down4=CSPElan(512 + 512, 512, 512, 1, act),
        top_down3=CSPElan(512 + 512, 256, 256, 1, act),
        down4=SplitDown(256, 256, act),
        bottom_up4=CSPElan(256 + 512, 512, 512, 1, act),
        down5=SplitDown(512, 512, act),
        bottom_up5=CSPElan(512 + 512, 512, 512, 1, act),
    )
    return PyramidNetwork(backbone, neck, head((256, 512, 512), num_classes, STRIDES, act), OFFICIAL_LAYERS)
