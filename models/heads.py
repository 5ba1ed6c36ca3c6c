"""The detection head: per level one box branch (DFL logits) and one class branch (logits), nothing decoded.

Decoding is a separate module, `models.boxes.Decode`, because it stays in float while the network is quantized.

Shapes: B batch, K classes, R bins of a box side's distribution, h and w cells of a level.
"""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor, nn

from models.blocks import ConvBlock

Raw = tuple[tuple[Tensor, Tensor], ...]


REG_MAX = 16
BOX_GROUPS = 4
INITIAL_BOX_BIAS = 1.0
INITIAL_OBJECTS_PER_IMAGE = 5.0
INITIAL_IMAGE_SIZE = 640.0


class HeadBranch(nn.Module):
    """Two 3x3 convolutions and a final 1x1 convolution with bias and no activation. [B, C, h, w] -> [B, out, h, w]."""

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"0": "conv1", "1": "conv2", "2": "output"}

    def __init__(
        self, in_channels: int, hidden: int, out_channels: int, groups: int, activation: str
    ) -> None:
        super().__init__()
        self.conv1 = ConvBlock(in_channels, hidden, 3, activation=activation)
        self.conv2 = ConvBlock(hidden, hidden, 3, groups=groups, activation=activation)
        self.output = nn.Conv2d(hidden, out_channels, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, out, h, w]."""
        return self.output(self.conv2(self.conv1(x)))


class HeadBranches(nn.Module):
    """A box and a class branch for each level; what is done with them is up to the head.

    Args:
        in_channels: Channels of each level's feature map, fine to coarse.
        num_classes: K, at least 1.
        strides: Input pixels per cell, one per level; used for the initial class bias only.
        activation: `silu` or `relu`.
    """

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"cv2": "box", "cv3": "cls"}
    reg_max: ClassVar[int] = REG_MAX

    def __init__(
        self, in_channels: Sequence[int], num_classes: int, strides: Sequence[int], activation: str
    ) -> None:
        super().__init__()
        finest = in_channels[0]
        box_hidden = math.ceil(max(16, finest // 4, self.reg_max * 4) / BOX_GROUPS) * BOX_GROUPS
        self.box = nn.ModuleList(
            self.box_branch(channels, box_hidden, activation) for channels in in_channels
        )
        self.cls = nn.ModuleList(
            self.cls_branch(channels, finest, num_classes, activation) for channels in in_channels
        )
        self.initialise_biases(num_classes, strides)

    def box_branch(self, in_channels: int, hidden: int, activation: str) -> nn.Module:
        """The box branch of one level: its second and last convolution are in four groups, one for each side."""
        return HeadBranch(in_channels, hidden, 4 * self.reg_max, BOX_GROUPS, activation)

    def cls_branch(self, in_channels: int, finest: int, num_classes: int, activation: str) -> nn.Module:
        """The class branch of one level; `finest` is the finest level's number of channels."""
        return HeadBranch(in_channels, max(finest, min(2 * num_classes, 128)), num_classes, 1, activation)

    def official_layers(self, first: int) -> dict[str, int]:
        """Layer indices of the head's parts in an official checkpoint; `first` is the first after the neck."""
        return {"head": first}

    def initialise_biases(self, num_classes: int, strides: Sequence[int]) -> None:
        """Assume rare objects at the start: otherwise the class loss of the many empty cells dominates the first steps.

        The class bias is the log-odds (approximately the log) of about five objects in a 640 x 640 image spread over
        the level's cells and the classes: stride 8, K = 3 gives log(5 / 3 / 80^2) = -8.25.
        """
        for branch in self.box:
            nn.init.constant_(_output_bias(branch), INITIAL_BOX_BIAS)
        for branch, stride in zip(self.cls, strides, strict=True):
            cells = (INITIAL_IMAGE_SIZE / stride) ** 2
            nn.init.constant_(_output_bias(branch), math.log(INITIAL_OBJECTS_PER_IMAGE / num_classes / cells))


class UngroupedBoxBranches(HeadBranches):
    """Branches without groups in the box branch."""

    def box_branch(self, in_channels: int, hidden: int, activation: str) -> nn.Module:
        """The box branch of one level, without groups."""
        return HeadBranch(in_channels, hidden, 4 * self.reg_max, 1, activation)


class UltralyticsLegacyBranches(UngroupedBoxBranches):
    """Branches of YOLOv9 checkpoints from early Ultralytics releases: nothing is grouped, class width up to 100."""

    def cls_branch(self, in_channels: int, finest: int, num_classes: int, activation: str) -> nn.Module:
        """The class branch of one level."""
        return HeadBranch(in_channels, max(finest, min(num_classes, 100)), num_classes, 1, activation)


class SeparableConv(nn.Module):
    """A depthwise 3x3 block and a 1x1 block. [B, C, h, w] -> [B, C', h, w]."""

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"0": "depthwise", "1": "pointwise"}

    def __init__(self, in_channels: int, out_channels: int, activation: str) -> None:
        super().__init__()
        self.depthwise = ConvBlock(in_channels, in_channels, 3, groups=in_channels, activation=activation)
        self.pointwise = ConvBlock(in_channels, out_channels, 1, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C', h, w]."""
        return self.pointwise(self.depthwise(x))


class SeparableBranch(nn.Module):
    """Two depthwise-separable convolutions and a final 1x1 convolution. [B, C, h, w] -> [B, out, h, w]."""

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"0": "conv1", "1": "conv2", "2": "output"}

    def __init__(self, in_channels: int, hidden: int, out_channels: int, activation: str) -> None:
        super().__init__()
        self.conv1 = SeparableConv(in_channels, hidden, activation)
        self.conv2 = SeparableConv(hidden, hidden, activation)
        self.output = nn.Conv2d(hidden, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, out, h, w]."""
        return self.output(self.conv2(self.conv1(x)))


class UltralyticsBranches(UltralyticsLegacyBranches):
    """Branches of YOLOv9 checkpoints from later Ultralytics releases: a depthwise-separable class branch."""

    def cls_branch(self, in_channels: int, finest: int, num_classes: int, activation: str) -> nn.Module:
        """The class branch of one level."""
        return SeparableBranch(in_channels, max(finest, min(num_classes, 100)), num_classes, activation)


class DetectMixin:
    """The forward pass of a detection head."""

    box: nn.ModuleList
    cls: nn.ModuleList

    def forward(self, features: Sequence[Tensor]) -> Raw:
        """Feature maps [B, C, h, w], fine to coarse, to (box [B, 4R, h, w], cls [B, K, h, w]) logits for each."""
        return tuple((self.box[i](features[i]), self.cls[i](features[i])) for i in range(len(self.box)))


class DetectionHead(DetectMixin, HeadBranches):
    """The official detection head."""


class UltralyticsLegacyHead(DetectMixin, UltralyticsLegacyBranches):
    """The detection head of early Ultralytics releases."""


class UltralyticsHead(DetectMixin, UltralyticsBranches):
    """The detection head of later Ultralytics releases."""


HeadBuilder = Callable[[Sequence[int], int, Sequence[int], str], HeadBranches]

HEADS: dict[str, HeadBuilder] = {
    "official": DetectionHead,
    "ultralytics": UltralyticsHead,
    "ultralytics-legacy": UltralyticsLegacyHead,
}


def _output_bias(branch: nn.Module) -> Tensor:
    output = branch.get_submodule("output")
    assert isinstance(output, nn.Conv2d)
    assert output.bias is not None
    return output.bias
