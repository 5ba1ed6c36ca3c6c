"""Instance segmentation: heads with mask coefficients and prototypes, their decode, and masks from both.

A mask is a combination of P prototype maps, one set for the whole image, with P coefficients per box
(arXiv:1904.02689, eq. 1): sigmoid(prototypes * coefficients), cut to the box.

Shapes: B batch, A anchor points, K classes, P prototypes, N detections, h and w cells of a level.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.blocks import ConvBlock, CSPElan
from models.boxes import Decode, best_pairs, suppress
from models.heads import (
    HeadBranch,
    HeadBranches,
    HeadBuilder,
    Raw,
    UltralyticsBranches,
    UltralyticsLegacyBranches,
    UngroupedBoxBranches,
)

RawSegmentation = tuple[tuple[tuple[Tensor, Tensor, Tensor], ...], Tensor]

NUM_PROTOTYPES = 32


class Prototypes(nn.Module):
    """Prototype maps from the finest level: [B, C, h, w] -> [B, P, 2h, 2w].

    Its two inner convolutions keep C channels, as in all official networks.

    Args:
        in_channels: Channels of the finest level.
        learned_upsampling: A transposed convolution instead of nearest-neighbour upsampling.
        activation: `silu` or `relu`.
    """

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"cv1": "conv1", "cv2": "conv2", "cv3": "output"}

    def __init__(self, in_channels: int, learned_upsampling: bool, activation: str) -> None:
        super().__init__()
        self.conv1 = ConvBlock(in_channels, in_channels, 3, activation=activation)
        self.upsample: nn.Module = (
            nn.ConvTranspose2d(in_channels, in_channels, 2, 2)
            if learned_upsampling
            else nn.Upsample(scale_factor=2.0, mode="nearest")
        )
        self.conv2 = ConvBlock(in_channels, in_channels, 3, activation=activation)
        self.output = ConvBlock(in_channels, NUM_PROTOTYPES, 1, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, P, 2h, 2w]."""
        return self.output(self.conv2(self.upsample(self.conv1(x))))


class MaskBranches(HeadBranches):
    """What every segmentation head adds to a detection head: a coefficient branch per level, and prototypes."""

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {
        "cv2": "box",
        "cv3": "cls",
        "cv4": "mask",
        "proto": "prototypes",
    }
    learned_upsampling: ClassVar[bool] = False

    def __init__(
        self, in_channels: Sequence[int], num_classes: int, strides: Sequence[int], activation: str
    ) -> None:
        super().__init__(in_channels, num_classes, strides, activation)
        hidden = max(in_channels[0] // 4, NUM_PROTOTYPES)
        self.mask = nn.ModuleList(
            HeadBranch(channels, hidden, NUM_PROTOTYPES, 1, activation) for channels in in_channels
        )
        self.prototypes = self.make_prototypes(in_channels[0], activation)

    def make_prototypes(self, in_channels: int, activation: str) -> nn.Module:
        """The module that gives the prototypes."""
        return Prototypes(in_channels, self.learned_upsampling, activation)

    def prototype_maps(self, finest: Tensor) -> Tensor:
        """[B, C, h, w] of the finest level -> [B, P, 2h, 2w]."""
        return self.prototypes(finest)

    def forward(self, features: Sequence[Tensor]) -> RawSegmentation:
        """Feature maps, fine to coarse, to (box, cls, coefficient) maps for each, and the prototypes."""
        levels = tuple(
            (self.box[i](features[i]), self.cls[i](features[i]), self.mask[i](features[i]))
            for i in range(len(self.box))
        )
        return levels, self.prototype_maps(features[0])


class SegmentationHead(MaskBranches, UngroupedBoxBranches):
    """The head of `gelan-c-seg` and `yolov9-c-seg`: an ungrouped box branch and prototypes from the finest level."""


class BranchedSegmentationHead(MaskBranches):
    """The head of `gelan-c-dseg`: prototypes from a branch of its own on the finest level."""

    repeats: ClassVar[int] = 1

    def __init__(
        self, in_channels: Sequence[int], num_classes: int, strides: Sequence[int], activation: str
    ) -> None:
        super().__init__(in_channels, num_classes, strides, activation)
        finest = in_channels[0]
        self.prototype_elan = CSPElan(finest, finest, finest, self.repeats, activation)
        self.upsample = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.prototype_conv = ConvBlock(finest, finest, 3, activation=activation)

    def make_prototypes(self, in_channels: int, activation: str) -> nn.Module:
        """A 1x1 convolution after the branch."""
        return ConvBlock(in_channels, NUM_PROTOTYPES, 1, activation=activation)

    def prototype_maps(self, finest: Tensor) -> Tensor:
        """[B, C, h, w] of the finest level -> [B, P, 2h, 2w]."""
        return self.prototypes(self.prototype_conv(self.upsample(self.prototype_elan(finest))))

    def official_layers(self, first: int) -> dict[str, int]:
        """The branch is two layers of its own before the head, with an enlargement between them."""
        return {"head.prototype_elan": first, "head.prototype_conv": first + 2, "head": first + 3}


class DeeplyBranchedSegmentationHead(BranchedSegmentationHead):
    """The main head of `yolov9-c-dseg`: its branch has two residual blocks in a row."""

    repeats: ClassVar[int] = 2


class UltralyticsSegmentationHead(MaskBranches, UltralyticsBranches):
    """The segmentation head of later Ultralytics releases."""

    learned_upsampling: ClassVar[bool] = True


class UltralyticsLegacySegmentationHead(MaskBranches, UltralyticsLegacyBranches):
    """The segmentation head of early Ultralytics releases."""

    learned_upsampling: ClassVar[bool] = True


SEGMENTATION_HEADS: dict[str, HeadBuilder] = {
    "official": SegmentationHead,
    "branched": BranchedSegmentationHead,
    "deeply-branched": DeeplyBranchedSegmentationHead,
    "ultralytics": UltralyticsSegmentationHead,
    "ultralytics-legacy": UltralyticsLegacySegmentationHead,
}


class SegmentationDecode(Decode):
    """Raw maps to ([B, 4 + K + P, A], prototypes [B, P, H / 4, W / 4]): boxes, scores and coefficients, as deployed."""

    def forward(self, raw: RawSegmentation) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Coefficients and prototypes pass as they are; half precision is raised to float32."""
        raw = self.chosen(raw)
        levels, prototypes = raw
        detections = super().forward(detection_maps(raw))
        coefficients = torch.cat([level[2].flatten(2) for level in levels], dim=2).to(detections.dtype)
        return torch.cat((detections, coefficients), dim=1), prototypes.to(detections.dtype)


def detection_maps(raw: RawSegmentation) -> Raw:
    """The part of the raw maps that the detection loss takes."""
    return tuple((box, cls) for box, cls, _ in raw[0])


def suppress_segments(
    decoded: Tensor,
    confidence: float,
    iou: float,
    max_detections: int = 300,
    num_prototypes: int = NUM_PROTOTYPES,
) -> list[tuple[Tensor, Tensor]]:
    """Non-maximum suppression as `non_max_suppression` does it, with the coefficients of what is kept.

    Args:
        decoded: [B, 4 + K + P, A].
        confidence: Scores must be greater than this.
        iou: Overlap above which the lower score of a class is dropped.
        max_detections: Kept per image.
        num_prototypes: P.

    Returns:
        For each image detections [N, 6] (x1, y1, x2, y2 in input pixels, score, class) and coefficients [N, P].
    """
    found = suppress(decoded[:, :-num_prototypes], confidence, iou, max_detections)
    return _with_coefficients(decoded[:, -num_prototypes:], found)


def best_segments(
    decoded: Tensor, confidence: float, max_detections: int = 300, num_prototypes: int = NUM_PROTOTYPES
) -> list[tuple[Tensor, Tensor]]:
    """As `suppress_segments`, for a head that gives each object one box: the best (anchor, class) pairs."""
    found = best_pairs(decoded[:, :-num_prototypes], confidence, max_detections)
    return _with_coefficients(decoded[:, -num_prototypes:], found)


def _with_coefficients(
    coefficients_BPA: Tensor, found: Sequence[tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    return [
        (detections, image[:, anchors].t())
        for image, (detections, anchors) in zip(coefficients_BPA, found, strict=True)
    ]


def soft_masks(prototypes: Tensor, coefficients: Tensor) -> Tensor:
    """sigmoid(coefficients @ prototypes), arXiv:1904.02689 eq. 1, on the prototypes' grid and not cut to the boxes.

    Args:
        prototypes: [P, h, w], for the whole network input.
        coefficients: [N, P].

    Returns:
        [N, h, w] in 0..1.
    """
    return (coefficients @ prototypes.flatten(1)).sigmoid().unflatten(1, prototypes.shape[1:])
