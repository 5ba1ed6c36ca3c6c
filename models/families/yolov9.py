"""YOLOv9 t, s, m and c in their deployed, single-head form: one function per size, with its numbers in sight.

Each size is a backbone (features at strides 8, 16, 32), one neck layout for all sizes and a detection head. The
training form with its auxiliary branch computes the same function; `models.checkpoints.convert` drops the branch
when such a checkpoint is loaded.

`OFFICIAL_LAYERS` tables give, for each part, the layer index it has in the official single-head ("gelan")
checkpoints.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.blocks import AverageDown, ConvBlock, CSPElan, Elan, SplitDown, SPPElan
from models.heads import DetectionHead, HeadBranches, HeadBuilder, Raw

STRIDES = (8, 16, 32)


class Backbone(nn.Module):
    """Image [B, 3, H, W] to features at strides 8, 16 and 32: two stem convolutions and four stages."""

    def __init__(
        self,
        stem: Sequence[nn.Module],
        stage2: nn.Module,
        downs: Sequence[nn.Module],
        stages: Sequence[nn.Module],
    ) -> None:
        super().__init__()
        self.stem1, self.stem2 = stem
        self.stage2 = stage2
        self.down3, self.down4, self.down5 = downs
        self.stage3, self.stage4, self.stage5 = stages

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3, H, W] to features at strides 8, 16, 32."""
        stage2 = self.stage2(self.stem2(self.stem1(images)))
        stage3 = self.stage3(self.down3(stage2))
        stage4 = self.stage4(self.down4(stage3))
        stage5 = self.stage5(self.down5(stage4))
        return stage3, stage4, stage5


class Neck(nn.Module):
    """Path aggregation: pyramid pooling on stride 32, top-down to stride 8, back up to stride 32."""

    def __init__(
        self,
        spp: nn.Module,
        top_down4: nn.Module,
        top_down3: nn.Module,
        down4: nn.Module,
        bottom_up4: nn.Module,
        down5: nn.Module,
        bottom_up5: nn.Module,
    ) -> None:
        super().__init__()
        self.spp = spp
        self.upsample5 = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.top_down4 = top_down4
        self.upsample4 = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.top_down3 = top_down3
        self.down4 = down4
        self.bottom_up4 = bottom_up4
        self.down5 = down5
        self.bottom_up5 = bottom_up5

    def forward(self, stage3: Tensor, stage4: Tensor, stage5: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features at strides 8, 16, 32 to as many that have seen each other."""
        spp = self.spp(stage5)
        top_down4 = self.top_down4(torch.cat((self.upsample5(spp), stage4), dim=1))
        top_down3 = self.top_down3(torch.cat((self.upsample4(top_down4), stage3), dim=1))
        bottom_up4 = self.bottom_up4(torch.cat((self.down4(top_down3), top_down4), dim=1))
        bottom_up5 = self.bottom_up5(torch.cat((self.down5(bottom_up4), spp), dim=1))
        return top_down3, bottom_up4, bottom_up5


class YOLOv9Network(nn.Module):
    """Images [B, 3, H, W] (RGB, [0, 1], H and W multiples of 32) to raw maps per level; fx-traceable."""

    def __init__(
        self, backbone: nn.Module, neck: nn.Module, head: HeadBranches, official_layers: dict[str, int]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.head = head
        body = {name: layer for name, layer in official_layers.items() if name != "head"}
        self.official_layers = {**body, **head.official_layers(official_layers["head"])}

    def forward(self, images: Tensor) -> Raw:
        """[B, 3, H, W] to (box, cls) logits per level."""
        features = self.backbone(images)
        return self.head(self.neck(features[0], features[1], features[2]))


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
    "neck.spp": 9,
    "neck.top_down4": 12,
    "neck.top_down3": 15,
    "neck.down4": 16,
    "neck.bottom_up4": 18,
    "neck.down5": 19,
    "neck.bottom_up5": 21,
    "head": 22,
}


def yolov9t(num_classes: int, activation: str = "silu", head: HeadBuilder = DetectionHead) -> YOLOv9Network:
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
    return YOLOv9Network(backbone, neck, head((64, 96, 128), num_classes, STRIDES, act), OFFICIAL_LAYERS)


def yolov9s(num_classes: int, activation: str = "silu", head: HeadBuilder = DetectionHead) -> YOLOv9Network:
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
    return YOLOv9Network(backbone, neck, head((128, 192, 256), num_classes, STRIDES, act), OFFICIAL_LAYERS)


def yolov9m(num_classes: int, activation: str = "silu", head: HeadBuilder = DetectionHead) -> YOLOv9Network:
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
    return YOLOv9Network(backbone, neck, head((240, 360, 480), num_classes, STRIDES, act), OFFICIAL_LAYERS)


def yolov9c(num_classes: int, activation: str = "silu", head: HeadBuilder = DetectionHead) -> YOLOv9Network:
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
    return YOLOv9Network(backbone, neck, head((256, 512, 512), num_classes, STRIDES, act), OFFICIAL_LAYERS)
