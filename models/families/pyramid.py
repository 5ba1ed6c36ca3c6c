"""The layout that most YOLO families share: a backbone, a path aggregation neck, a head. Families fill in the blocks.

`OFFICIAL_LAYERS` gives, for each part, the layer index that it has in the checkpoints of the original trainers; a
family whose parts are numbered otherwise has a table of its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.heads import HeadBranches, Raw

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


class PyramidNetwork(nn.Module):
    """Images [B, 3, H, W] (RGB, [0, 1], H and W multiples of 32) to raw maps per level; fx-traceable.

    Args:
        backbone: Images to features at strides 8, 16 and 32.
        neck: Those to features that have seen each other.
        head: Those to raw maps.
        official_layers: Module path -> layer index in the checkpoints of the original trainer; `head` is the first
            layer after the neck.
    """

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
