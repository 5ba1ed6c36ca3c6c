"""SSDlite320-MobileNetV3 of torchvision as a network of your own: its layers, anchors and loss, as they are.

    python train_qat.py +experiment=demo model=custom model.factory=examples.ssdlite:build

What torchvision's model does in one `forward` is split in three, as docs/custom.md asks for: the layers up to the raw
head maps (traced and quantized), the decoding of anchors (float, part of the ONNX file), and the loss.

Shapes: B batch, K classes, D default boxes per cell, A default boxes of all levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_convert, box_iou

from pipeline import CustomDetector

Maps = tuple[
    tuple[Tensor, Tensor], ...
]  # per level: offsets [B, 4D, h, w], class logits [B, (1 + K) D, h, w]
FINEST_STRIDE = 16  # of the first of the six levels


class Network(nn.Module):
    """Images in 0..1 to the raw maps of the six levels; torchvision's modules under their own names."""

    def __init__(self, model: SSD) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.head = model.head

    def forward(self, images: Tensor) -> Maps:
        """[B, 3, H, W] to `Maps`."""
        features = self.backbone(images * 2.0 - 1.0).values()
        boxes = self.head.regression_head.module_list
        classes = self.head.classification_head.module_list
        return tuple((boxes[i](x), classes[i](x)) for i, x in enumerate(features))


class Decode(nn.Module):
    """Raw maps to [B, 4 + K, A]: offsets from the default boxes, softmax without the background."""

    def __init__(self, anchors: DefaultBoxGenerator, num_classes: int) -> None:
        super().__init__()
        self.anchors = anchors
        self.num_classes = num_classes

    def forward(self, maps: Maps) -> Tensor:
        """Cx, cy, w, h in input pixels, then class scores."""
        offsets_BA4, logits_BAC = flatten(maps, self.num_classes)
        centres_A2, sizes_A2 = default_boxes(self.anchors, maps).chunk(2, dim=1)
        centres = offsets_BA4[..., :2] / 10.0 * sizes_A2 + centres_A2
        sizes = (offsets_BA4[..., 2:] / 5.0).clamp(max=math.log(1000 / 16)).exp() * sizes_A2
        scores = logits_BAC.softmax(dim=-1)[..., 1:]
        return torch.cat([centres, sizes, scores], dim=-1).transpose(1, 2)


class Loss:
    """Matching and loss of torchvision's SSD (smooth L1, and cross-entropy with three negatives to a positive)."""

    def __init__(self, model: SSD, num_classes: int) -> None:
        self.model = model
        self.num_classes = num_classes

    def __call__(self, maps: Maps, targets: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """Maps and targets [T, 6] (image, class, x1, y1, x2, y2 in input pixels) to two terms."""
        offsets_BA4, logits_BAC = flatten(maps, self.num_classes)
        anchors = box_convert(default_boxes(self.model.anchor_generator, maps), "cxcywh", "xyxy")
        batch = len(offsets_BA4)
        truth, matches = [], []
        for image in range(batch):
            own = targets[targets[:, 0] == image]
            truth.append({"boxes": own[:, 2:], "labels": own[:, 1].long() + 1})  # 0 is the background
            if len(own):
                matches.append(self.model.proposal_matcher(box_iou(own[:, 2:], anchors)))
            else:
                matches.append(torch.full((len(anchors),), -1, device=targets.device))
        outputs = {"bbox_regression": offsets_BA4.float(), "cls_logits": logits_BAC.float()}
        return self.model.compute_loss(truth, outputs, [anchors] * batch, matches)


def flatten(maps: Maps, num_classes: int) -> tuple[Tensor, Tensor]:
    """Offsets [B, A, 4] and logits [B, A, 1 + K] of all levels, in the order of the default boxes."""
    offsets = [box.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)) for box, _ in maps]
    logits = [cls.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, num_classes + 1)) for _, cls in maps]
    return torch.cat(offsets, dim=1), torch.cat(logits, dim=1)


def default_boxes(anchors: DefaultBoxGenerator, maps: Maps) -> Tensor:
    """Default boxes [A, 4]: cx, cy, w, h in input pixels; constants of the ONNX graph."""
    grids = [[int(box.shape[2]), int(box.shape[3])] for box, _ in maps]
    height, width = (side * FINEST_STRIDE for side in grids[0])
    boxes = anchors._grid_default_boxes(grids, [height, width])
    return (boxes * torch.tensor([width, height, width, height])).to(maps[0][0].device)


def build(names: Sequence[str]) -> CustomDetector:
    """The detector with random weights, for the classes of the data."""
    num_classes = len(names)
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=num_classes + 1)
    return CustomDetector(
        network=Network(model),
        decode=Decode(model.anchor_generator, num_classes),
        loss=Loss(model, num_classes),
        strides=(16, 32),
    )
