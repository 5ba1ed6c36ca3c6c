"""Heads for detection without NMS: a one-to-many and a one-to-one branch side by side (arXiv:2405.14458, section 3.1).

Training assigns many anchor points to an object in the one-to-many branch and a single one in the one-to-one branch.
Both have the same structure. The one-to-one branch reads detached features, so that the rest of the network learns
from the one-to-many branch alone. Deployment keeps one of them: the one-to-one branch needs no NMS.

Shapes: B batch, K classes, R bins of a box side, P prototypes, h and w cells of a level.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from core.choices import ONE2MANY, ONE2ONE
from models.blocks import ConvBlock
from models.heads import HeadBranches, HeadBuilder, UltralyticsBranches
from models.segmentation import NUM_PROTOTYPES, MaskBranches

PREFIXES: Mapping[str, str] = {ONE2MANY: "", ONE2ONE: "one2one_"}
BOTH = "official"  # the head style of a network that has both heads
CLASS_BIAS = re.compile(
    r"^(?:model\.\d+\.(?:one2one_)?cv3|network\.head\.(?:one2one_)?cls)\.0\.(?:2|output)\.bias$"
)
_ONE2ONE = re.compile(r"^(?:model\.\d+\.one2one_cv3|network\.head\.one2one_cls)\.0\.")
_ONE2MANY = re.compile(r"^(?:model\.\d+\.cv3|network\.head\.cls)\.0\.")


class DualHead(UltralyticsBranches):
    """Both detection branches; those of the one-to-one head have `one2one_` before their names and start as copies.

    Gives a dictionary of both heads' raw maps, or the maps of the one that `keep_head` has left.

    Attributes:
        detaches: Whether the one-to-one head reads detached features, where both are there.
    """

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {
        "cv2": "box",
        "cv3": "cls",
        "one2one_cv2": "one2one_box",
        "one2one_cv3": "one2one_cls",
    }
    parts: ClassVar[tuple[str, ...]] = ("box", "cls")

    def __init__(
        self, in_channels: Sequence[int], num_classes: int, strides: Sequence[int], activation: str
    ) -> None:
        super().__init__(in_channels, num_classes, strides, activation)
        self.detaches = True
        for part in self.parts:
            setattr(self, PREFIXES[ONE2ONE] + part, copy.deepcopy(self.get_submodule(part)))

    @property
    def heads(self) -> tuple[str, ...]:
        """Which heads are there."""
        return tuple(head for head, prefix in PREFIXES.items() if hasattr(self, prefix + self.parts[0]))

    def forward(self, features: Sequence[Tensor]) -> Any:
        """Feature maps [B, C, h, w], fine to coarse, to (box [B, 4R, h, w], cls [B, K, h, w]) for each level."""
        if len(self.heads) == 1:
            return self._maps(self.heads[0], features)
        detached = [feature.detach() for feature in features] if self.detaches else features
        return {ONE2MANY: self._maps(ONE2MANY, features), ONE2ONE: self._maps(ONE2ONE, detached)}

    def _maps(self, head: str, features: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
        branches = [getattr(self, PREFIXES[head] + part) for part in self.parts]
        return tuple(
            tuple(branch[level](feature) for branch in branches) for level, feature in enumerate(features)
        )


class DirectDualHead(DualHead):
    """Both detection branches with one value for each box side, its distance in cells, instead of a distribution."""

    reg_max: ClassVar[int] = 1


class FusedPrototypes(nn.Module):
    """Prototype maps from all levels: the coarser ones, narrowed and enlarged, are added to the finest (YOLO26).

    Args:
        in_channels: Channels of each level, fine to coarse.
        activation: `silu` or `relu`.
    """

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {
        "feat_refine": "narrow",
        "feat_fuse": "fuse",
        "cv1": "conv1",
        "cv2": "conv2",
        "cv3": "output",
    }

    def __init__(self, in_channels: Sequence[int], activation: str) -> None:
        super().__init__()
        width = in_channels[0]
        self.narrow = nn.ModuleList(
            ConvBlock(channels, width, 1, activation=activation) for channels in in_channels[1:]
        )
        self.enlarge = nn.ModuleList(
            nn.Upsample(scale_factor=2.0**level, mode="nearest") for level in range(1, len(in_channels))
        )
        self.fuse = ConvBlock(width, width, 3, activation=activation)
        self.conv1 = ConvBlock(width, width, 3, activation=activation)
        self.upsample = nn.ConvTranspose2d(width, width, 2, 2)
        self.conv2 = ConvBlock(width, width, 3, activation=activation)
        self.output = ConvBlock(width, NUM_PROTOTYPES, 1, activation=activation)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Feature maps [B, C, h, w], fine to coarse, to [B, P, 2h, 2w] of the finest level's h and w."""
        total = features[0]
        for feature, narrow, enlarge in zip(features[1:], self.narrow, self.enlarge, strict=True):
            total = total + enlarge(narrow(feature))
        return self.output(self.conv2(self.upsample(self.conv1(self.fuse(total)))))


class DirectDualSegmentationHead(DirectDualHead, MaskBranches):
    """Both detection branches with mask coefficients, and prototypes that both share."""

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {
        **DualHead.OFFICIAL_NAMES,
        "cv4": "mask",
        "one2one_cv4": "one2one_mask",
        "proto": "prototypes",
    }
    parts: ClassVar[tuple[str, ...]] = ("box", "cls", "mask")

    def __init__(
        self, in_channels: Sequence[int], num_classes: int, strides: Sequence[int], activation: str
    ) -> None:
        super().__init__(in_channels, num_classes, strides, activation)
        self.prototypes = FusedPrototypes(in_channels, activation)

    def forward(self, features: Sequence[Tensor]) -> Any:
        """(box, cls, coefficients [B, P, h, w]) of each level and the prototypes, or a dictionary of both heads'."""
        maps = DualHead.forward(self, features)
        prototypes = self.prototypes(features)
        if isinstance(maps, dict):
            return {head: (levels, prototypes) for head, levels in maps.items()}
        return maps, prototypes


def keep_head(branches: nn.Module, head: str) -> None:
    """Remove the branches of the other head, in place.

    Raises:
        ValueError: If it does not have this head.
    """
    assert isinstance(branches, DualHead)
    if head not in branches.heads:
        raise ValueError(f"Head {head!r} is not there; the network has {', '.join(branches.heads)}")
    for other in set(branches.heads) - {head}:
        for part in branches.parts:
            delattr(branches, PREFIXES[other] + part)


def find_dual_style(state: Mapping[str, Tensor]) -> str:
    """Head style of a normalised state dict: fusing, or `keep_head`, may have removed one of the heads."""
    if not any(_ONE2ONE.match(key) for key in state):
        return ONE2MANY
    return BOTH if any(_ONE2MANY.match(key) for key in state) else ONE2ONE


def dual_styles(build: type[DualHead]) -> dict[str, HeadBuilder]:
    """Head styles of a family with two heads: both, and one of them alone."""

    def alone(head: str) -> HeadBuilder:
        def build_one(
            in_channels: Sequence[int], num_classes: int, strides: Sequence[int], activation: str
        ) -> HeadBranches:
            branches = build(in_channels, num_classes, strides, activation)
            keep_head(branches, head)
            return branches

        return build_one

    return {BOTH: build, ONE2ONE: alone(ONE2ONE), ONE2MANY: alone(ONE2MANY)}
