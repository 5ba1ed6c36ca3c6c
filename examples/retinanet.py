"""A RetinaNet of torchvision's parts on a small residual backbone: a network of your own that learns within minutes.

    python train_qat.py +experiment=retinanet

Feature pyramid, head, anchors, matching and focal loss are torchvision's (arXiv:1708.02002); the backbone is a few of
its residual blocks, so that a CPU can train it. One head serves all levels: its convolutions run once for each.

Shapes: B batch, K classes, D anchors per cell, A anchors of all levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FeaturePyramidNetwork, box_convert

from pipeline import CustomDetector

Maps = tuple[tuple[Tensor, Tensor], ...]  # per level: offsets [B, 4D, h, w], class logits [B, KD, h, w]
STRIDES = (8, 16, 32)
SIDES = ((14, 20), (28, 40), (56, 80))  # of the square anchors of each level, input pixels
LARGEST_GROWTH = math.log(1000 / 16)  # of a side, as torchvision limits it


def block(inputs: int, outputs: int) -> BasicBlock:
    """Residual block that halves the resolution."""
    shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, 2, shortcut)


class Backbone(nn.Module):
    """Images to features of strides 8, 16 and 32, all with `out_channels` channels."""

    def __init__(self, out_channels: int = 48) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), block(16, 32)
        )
        self.fine, self.middle, self.coarse = block(32, 64), block(64, 128), block(128, 128)
        self.pyramid = FeaturePyramidNetwork([64, 128, 128], out_channels, norm_layer=nn.BatchNorm2d)

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] to three features."""
        fine = self.fine(self.stem(images * 2.0 - 1.0))
        middle = self.middle(fine)
        levels = {"fine": fine, "middle": middle, "coarse": self.coarse(middle)}
        return list(self.pyramid(levels).values())


class Network(nn.Module):
    """Images in 0..1 to the raw maps of the three levels; torchvision's modules under their own names."""

    def __init__(self, model: RetinaNet) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.head = model.head

    def forward(self, images: Tensor) -> Maps:
        """[B, 3, H, W] to `Maps`."""
        boxes, classes = self.head.regression_head, self.head.classification_head
        return tuple(
            (boxes.bbox_reg(boxes.conv(x)), classes.cls_logits(classes.conv(x)))
            for x in self.backbone(images)
        )


class Decode(nn.Module):
    """Raw maps to [B, 4 + K, A]: offsets from the anchors, and the sigmoid of the class logits."""

    def __init__(self, anchors: AnchorGenerator, num_classes: int) -> None:
        super().__init__()
        self.anchors = anchors
        self.num_classes = num_classes

    def forward(self, maps: Maps) -> Tensor:
        """Cx, cy, w, h in input pixels, then class scores."""
        offsets_BA4, logits_BAK = flatten(maps, self.num_classes)
        centres_A2, sides_A2 = box_convert(grid(self.anchors, maps), "xyxy", "cxcywh").chunk(2, dim=1)
        centres = offsets_BA4[..., :2] * sides_A2 + centres_A2
        sides = offsets_BA4[..., 2:].clamp(max=LARGEST_GROWTH).exp() * sides_A2
        return torch.cat([centres, sides, logits_BAK.sigmoid()], dim=-1).transpose(1, 2)


class Loss:
    """Matching and loss of torchvision's RetinaNet: focal loss for the classes, L1 for the boxes."""

    def __init__(self, model: RetinaNet, num_classes: int) -> None:
        self.model = model
        self.num_classes = num_classes

    def __call__(self, maps: Maps, targets: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """Maps and targets [T, 6] (image, class, x1, y1, x2, y2 in input pixels) to two terms."""
        offsets_BA4, logits_BAK = flatten(maps, self.num_classes)
        own = [targets[targets[:, 0] == image] for image in range(len(offsets_BA4))]
        truth = [{"boxes": rows[:, 2:], "labels": rows[:, 1].long()} for rows in own]
        outputs = {"bbox_regression": offsets_BA4.float(), "cls_logits": logits_BAK.float()}
        return self.model.compute_loss(truth, outputs, [grid(self.model.anchor_generator, maps)] * len(own))


def flatten(maps: Maps, num_classes: int) -> tuple[Tensor, Tensor]:
    """Offsets [B, A, 4] and logits [B, A, K] of all levels, in the order of the anchors."""
    offsets = [box.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)) for box, _ in maps]
    logits = [cls.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, num_classes)) for _, cls in maps]
    return torch.cat(offsets, dim=1), torch.cat(logits, dim=1)


def grid(anchors: AnchorGenerator, maps: Maps) -> Tensor:
    """Anchors [A, 4]: x1, y1, x2, y2 in input pixels; constants of the ONNX graph."""
    cells = [[int(box.shape[2]), int(box.shape[3])] for box, _ in maps]
    steps = [[torch.tensor(stride), torch.tensor(stride)] for stride in STRIDES]
    return torch.cat(anchors.grid_anchors(cells, steps)).to(maps[0][0].device)


def build(names: Sequence[str]) -> CustomDetector:
    """The detector with random weights, for the classes of the data."""
    backbone = Backbone()
    anchors = AnchorGenerator(SIDES, ((1.0,),) * len(SIDES))
    head = RetinaNetHead(backbone.out_channels, len(SIDES[0]), len(names), norm_layer=nn.BatchNorm2d)
    for branch in (head.classification_head, head.regression_head):
        branch.conv = branch.conv[:2]  # of four convolutions
    model = RetinaNet(backbone, len(names), anchor_generator=anchors, head=head)
    return CustomDetector(
        network=Network(model),
        decode=Decode(anchors, len(names)),
        loss=Loss(model, len(names)),
        strides=STRIDES,
    )
