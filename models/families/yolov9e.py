"""YOLOv9-e: a second backbone reads the image again and is fed the features of a first one at every level.

Each `Route` is a 1x1 convolution on a feature of the first backbone whose result is split, one part for each level
at or below its own; each `Fuse` enlarges the parts that belong to its level and adds them to the second backbone's
feature (CBNet's composition, arXiv:1909.03625).
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.blocks import ConvBlock, CSPElan, SplitDown, SPPElan
from models.families.pyramid import STRIDES, Backbone, Neck, PyramidNetwork
from models.heads import DetectionHead, HeadBuilder

ROUTE_CHANNELS = (64, 128, 256, 512, 1024)

OFFICIAL_LAYERS = {
    "backbone.primary.stem1": 1,
    "backbone.primary.stem2": 2,
    "backbone.primary.stage2": 3,
    "backbone.primary.down3": 4,
    "backbone.primary.stage3": 5,
    "backbone.primary.down4": 6,
    "backbone.primary.stage4": 7,
    "backbone.primary.down5": 8,
    "backbone.primary.stage5": 9,
    "backbone.route1": 10,
    "backbone.route2": 11,
    "backbone.route3": 12,
    "backbone.route4": 13,
    "backbone.route5": 14,
    "backbone.stem1": 15,
    "backbone.stem2": 17,
    "backbone.stage2": 19,
    "backbone.down3": 20,
    "backbone.stage3": 22,
    "backbone.down4": 23,
    "backbone.stage4": 25,
    "backbone.down5": 26,
    "backbone.stage5": 28,
    "neck.spp": 29,
    "neck.top_down4": 32,
    "neck.top_down3": 35,
    "neck.down4": 36,
    "neck.bottom_up4": 38,
    "neck.down5": 39,
    "neck.bottom_up5": 41,
    "head": 42,
}


class Route(nn.Module):
    """1x1 convolution with bias, split into parts of the given channels. [B, C, h, w] -> parts [B, c_i, h, w]."""

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"conv": "conv"}

    def __init__(self, in_channels: int, part_channels: Sequence[int]) -> None:
        super().__init__()
        self.part_channels = list(part_channels)
        self.conv = nn.Conv2d(in_channels, sum(part_channels), 1)

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        """[B, C, h, w] to one tensor [B, c_i, h, w] for each part."""
        return torch.split(self.conv(x), self.part_channels, dim=1)


class Fuse(nn.Module):
    """Add parts of coarser levels, enlarged to this level by nearest neighbour, to this level's own feature.

    Args:
        num_parts: How many parts are added; the first has this level's size, each next one is half as large.
    """

    def __init__(self, num_parts: int) -> None:
        super().__init__()
        enlarge = [
            nn.Identity(),
            *(nn.Upsample(scale_factor=float(2**i), mode="nearest") for i in range(1, num_parts)),
        ]
        self.enlarge = nn.ModuleList(enlarge)

    def forward(self, own: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Own feature [B, C, h, w] and parts [B, C, h / 2^i, w / 2^i] to their sum [B, C, h, w]."""
        total = own
        for i, enlarge in enumerate(self.enlarge):
            total = total + enlarge(parts[i])
        return total


class CompositeBackbone(Backbone):
    """Two backbones in a composition; features at strides 8, 16 and 32 are those of the second."""

    def __init__(
        self,
        primary: Backbone,
        routes: Sequence[nn.Module],
        stem: Sequence[nn.Module],
        stage2: nn.Module,
        downs: Sequence[nn.Module],
        stages: Sequence[nn.Module],
    ) -> None:
        super().__init__(stem, stage2, downs, stages)
        self.primary = primary
        self.route1, self.route2, self.route3, self.route4, self.route5 = routes
        self.fuse1, self.fuse2, self.fuse3, self.fuse4, self.fuse5 = (Fuse(5 - level) for level in range(5))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3, H, W] to features at strides 8, 16, 32."""
        first = self.primary
        first1 = first.stem1(images)
        first2 = first.stage2(first.stem2(first1))
        first3 = first.stage3(first.down3(first2))
        first4 = first.stage4(first.down4(first3))
        first5 = first.stage5(first.down5(first4))
        r1, r2, r3 = self.route1(first1), self.route2(first2), self.route3(first3)
        r4, r5 = self.route4(first4), self.route5(first5)

        stem1 = self.fuse1(self.stem1(images), (r1[0], r2[0], r3[0], r4[0], r5[0]))
        stem2 = self.fuse2(self.stem2(stem1), (r2[1], r3[1], r4[1], r5[1]))
        down3 = self.fuse3(self.down3(self.stage2(stem2)), (r3[2], r4[2], r5[2]))
        stage3 = self.stage3(down3)
        stage4 = self.stage4(self.fuse4(self.down4(stage3), (r4[3], r5[3])))
        stage5 = self.stage5(self.fuse5(self.down5(stage4), (r5[4],)))
        return stage3, stage4, stage5


def yolov9e(num_classes: int, activation: str = "silu", head: HeadBuilder = DetectionHead) -> PyramidNetwork:
    """YOLOv9-e: 58 M parameters at 80 classes."""
    act = activation
    backbone = CompositeBackbone(
        Backbone(*_backbone_parts(act)),
        [
            Route(channels, ROUTE_CHANNELS[: level + 1])
            for level, channels in enumerate((64, 256, 512, 1024, 1024))
        ],
        *_backbone_parts(act),
    )
    neck = Neck(
        spp=SPPElan(1024, 256, 512, act),
        top_down4=CSPElan(512 + 1024, 512, 512, 2, act),
        top_down3=CSPElan(512 + 512, 256, 256, 2, act),
        down4=SplitDown(256, 256, act),
        bottom_up4=CSPElan(256 + 512, 512, 512, 2, act),
        down5=SplitDown(512, 512, act),
        bottom_up5=CSPElan(512 + 512, 1024, 512, 2, act),
    )
    return PyramidNetwork(backbone, neck, head((256, 512, 512), num_classes, STRIDES, act), OFFICIAL_LAYERS)


def _backbone_parts(
    act: str,
) -> tuple[Sequence[nn.Module], nn.Module, Sequence[nn.Module], Sequence[nn.Module]]:
    stem = (ConvBlock(3, 64, 3, 2, activation=act), ConvBlock(64, 128, 3, 2, activation=act))
    stage2 = CSPElan(128, 128, 256, 2, act)
    downs = (SplitDown(256, 256, act), SplitDown(512, 512, act), SplitDown(1024, 1024, act))
    stages = (
        CSPElan(256, 256, 512, 2, act),
        CSPElan(512, 512, 1024, 2, act),
        CSPElan(1024, 512, 1024, 2, act),
    )
    return stem, stage2, downs, stages
