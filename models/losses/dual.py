"""The loss of a network with a one-to-many and a one-to-one head: consistent dual assignment (arXiv:2405.14458, 3.1).

Both heads learn from the same objects with the same matching metric, score^alpha * overlap^beta within the object's
box: the one-to-many head from the ten best points of each object, the one-to-one head from the best one alone. With the
same alpha and beta in both, the point that the one-to-one head learns from is the one that the one-to-many head ranks
best, so that their supervision agrees.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from core.choices import ONE2MANY, ONE2ONE
from core.types import TaskLoss
from models.detector import Detector
from models.losses.detection import DetectionLoss
from models.losses.segmentation import SegmentationLoss

POINTS_PER_OBJECT: Mapping[str, int] = {ONE2MANY: 10, ONE2ONE: 1}


class DualLoss(nn.Module):
    """The terms of both heads; those of the one-to-one head have `one2one_` before their names.

    Args:
        losses: The loss of each head, by its name.
    """

    def __init__(self, losses: Mapping[str, DetectionLoss]) -> None:
        super().__init__()
        self.losses = nn.ModuleDict(losses)

    def forward(self, raw: Mapping[str, Any], targets: Any, image_size: tuple[int, int]) -> dict[str, Tensor]:
        """The terms by name, already weighted; the total loss is their sum.

        Args:
            raw: Raw maps of each head.
            targets: As each head's loss takes them.
            image_size: (h, w) of the input in pixels.

        Raises:
            ValueError: As each head's loss.
        """
        many = self.losses[ONE2MANY](raw[ONE2MANY], targets, image_size)
        one = self.losses[ONE2ONE](raw[ONE2ONE], targets, image_size)
        return {**many, **{f"one2one_{name}": term for name, term in one.items()}}


def detector_loss(detector: Detector) -> TaskLoss:
    """The task loss of a detector's network: of its one head, or of both."""
    build = SegmentationLoss if detector.task == "segment" else DetectionLoss
    losses = {
        head: build(detector.num_classes, detector.strides, detector.reg_max, top_k=POINTS_PER_OBJECT[head])
        for head in detector.heads
    }
    return DualLoss(losses) if len(losses) > 1 else next(iter(losses.values()))
