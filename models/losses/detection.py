"""The detection loss of an anchor-point head: classification, box overlap and box distances, each normalised.

Every term is divided by the sum of the soft class targets (at least 1) and multiplied by its gain, so its size does
not depend on the batch, the image size or the number of objects, and terms can be compared in a log. Where several
processes share a batch, that is the sum over all of them, and their terms add up to those of the batch.

Shapes: B batch, A anchor points, K classes, R bins, T objects, P positive points.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.processes import sum_over_processes
from models.boxes import (
    boxes_to_distances,
    complete_iou,
    distances_to_boxes,
    expected_distances,
    make_anchor_points,
)
from models.heads import REG_MAX, Raw
from models.losses.assigner import Assignment, assign, pad_targets

DEFAULT_GAINS: Mapping[str, float] = {"box": 7.5, "cls": 0.5, "dfl": 1.5}
L1_GAIN = DEFAULT_GAINS["box"] * 5 / 2  # L1 to overlap as 5 to 2 (arXiv:2005.12872, section A.4)


class DetectionLoss(nn.Module):
    """Task-aligned detection loss on raw maps.

    - `cls`: binary cross-entropy of all points against the soft targets of the assigner (arXiv:2108.07755).
    - `box`: 1 - CIoU (arXiv:1911.08287) of positive points, weighted by their target score.
    - `dfl`: distribution focal loss (arXiv:2006.04388, eq. 6) of positive points, weighted likewise.
    - `l1`, instead of it if R is 1: the distances' errors as shares of the image's sides, summed over the four
      (arXiv:2005.12872, section 3.1).

    Args:
        num_classes: K.
        strides: Input pixels per cell for each level, fine to coarse.
        reg_max: R, bins per box side; with 1 the box maps are the distances themselves.
        gains: Factors of `box`, `cls` and `dfl` (or `l1`); defaults 7.5, 0.5 and 1.5 (18.75). A missing one keeps its
            default.
        top_k: Points per object in the assigner; 1 for a one-to-one head.
        alpha: The assigner's exponent of the score.
        beta: The assigner's exponent of the overlap.

    Raises:
        ValueError: For a gain of another name.
    """

    def __init__(
        self,
        num_classes: int,
        strides: Sequence[int],
        reg_max: int = REG_MAX,
        gains: Mapping[str, float] | None = None,
        top_k: int = 10,
        alpha: float = 0.5,
        beta: float = 6.0,
    ) -> None:
        super().__init__()
        defaults = dict(DEFAULT_GAINS)
        if reg_max == 1:
            del defaults["dfl"]
            defaults["l1"] = L1_GAIN
        unknown = set(gains or {}) - set(defaults)
        if unknown:
            raise ValueError(f"Unknown loss gains {sorted(unknown)}; expected some of {sorted(defaults)}")
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.reg_max = reg_max
        self.gains = {**defaults, **(gains or {})}
        self.top_k, self.alpha, self.beta = top_k, alpha, beta

    def forward(self, raw: Raw, targets: Tensor, image_size: tuple[int, int]) -> dict[str, Tensor]:
        """Compute the three terms in float32, for any autocast state; the total loss is their sum.

        Args:
            raw: Per level (box [B, 4R, h, w], cls [B, K, h, w]) logits.
            targets: [T, 6]: batch index, class, x1, y1, x2, y2 in input pixels; T may be 0.
            image_size: (h, w) of the input in pixels; must be the maps' sizes times the strides.

        Raises:
            ValueError: If maps, strides, classes and `image_size` disagree, or a target's class or image is out of
                range.
        """
        self._check(raw, targets, image_size)
        device = raw[0][0].device
        with torch.autocast(device.type, enabled=False):
            return self._terms(raw, targets.to(device=device, dtype=torch.float32))[0]

    def _terms(self, raw: Raw, targets_T6: Tensor) -> tuple[dict[str, Tensor], Assignment]:
        box_BAC = torch.cat([box.flatten(2) for box, _ in raw], dim=2).transpose(1, 2).float()
        logits_BAK = torch.cat([cls.flatten(2) for _, cls in raw], dim=2).transpose(1, 2).float()
        shapes = [(box.shape[2], box.shape[3]) for box, _ in raw]
        points_A2, stride_A1 = make_anchor_points(shapes, self.strides, box_BAC.device, torch.float32)
        distances_BA4 = box_BAC
        if self.reg_max > 1:
            projection = torch.arange(self.reg_max, device=box_BAC.device, dtype=torch.float32)
            distances_BA4 = expected_distances(box_BAC, projection)
        boxes_BA4 = distances_to_boxes(distances_BA4, points_A2) * stride_A1
        assignment = assign(
            logits_BAK.detach().sigmoid(),
            boxes_BA4.detach(),
            points_A2 * stride_A1,
            *pad_targets(targets_T6, box_BAC.shape[0]),
            top_k=self.top_k,
            alpha=self.alpha,
            beta=self.beta,
        )
        total = sum_over_processes(assignment.scores_BAK.sum()).clamp(min=1.0)
        cls = F.binary_cross_entropy_with_logits(logits_BAK, assignment.scores_BAK, reduction="sum") / total
        positive = assignment.positive_BA
        weight_P = assignment.scores_BAK.sum(dim=-1)[positive]
        iou_P = complete_iou(boxes_BA4[positive], assignment.boxes_BA4[positive])
        box = ((1 - iou_P) * weight_P).sum() / total
        wanted_BA4 = boxes_to_distances(assignment.boxes_BA4 / stride_A1, points_A2)
        if self.reg_max > 1:
            name, side_P = (
                "dfl",
                distribution_focal_loss(box_BAC[positive], wanted_BA4[positive], self.reg_max),
            )
        else:
            height, width = (size * self.strides[0] for size in shapes[0])
            share_A4 = stride_A1 / stride_A1.new_tensor([width, height, width, height])
            errors_BA4 = (distances_BA4 - wanted_BA4).abs() * share_A4
            name, side_P = "l1", errors_BA4[positive].sum(dim=-1)
        side = (side_P * weight_P).sum() / total
        terms = {
            "box": box * self.gains["box"],
            "cls": cls * self.gains["cls"],
            name: side * self.gains[name],
        }
        return terms, assignment

    def _check(self, raw: Raw, targets: Tensor, image_size: tuple[int, int]) -> None:
        if len(raw) != len(self.strides):
            raise ValueError(f"{len(raw)} levels of raw maps were given; expected {len(self.strides)}")
        for (box, cls), stride in zip(raw, self.strides, strict=True):
            expected = (image_size[0] // stride, image_size[1] // stride)
            if (
                tuple(box.shape[2:]) != expected
                or box.shape[1] != 4 * self.reg_max
                or cls.shape[1] != self.num_classes
            ):
                raise ValueError(
                    f"Raw maps at stride {stride} have shapes {tuple(box.shape)} and {tuple(cls.shape)}; expected "
                    f"{4 * self.reg_max} and {self.num_classes} channels of {expected} for an image of {image_size}"
                )
        if targets.ndim != 2 or targets.shape[1] != 6:
            raise ValueError(f"Targets have shape {tuple(targets.shape)}; expected [T, 6]")
        if targets.shape[0] == 0:
            return
        labels, images = targets[:, 1], targets[:, 0]
        if bool((labels < 0).any() | (labels >= self.num_classes).any()):
            raise ValueError(
                f"Target classes reach {int(labels.max())}; the network has {self.num_classes} classes"
            )
        if bool((images < 0).any() | (images >= raw[0][0].shape[0]).any()):
            raise ValueError(
                f"Targets name image {int(images.max())}; the batch has {raw[0][0].shape[0]} images"
            )


def distribution_focal_loss(logits_PC: Tensor, distances_P4: Tensor, reg_max: int) -> Tensor:
    """Cross-entropy to the two bins around each distance, weighted by nearness (arXiv:2006.04388, eq. 6).

    A distance of 2.25 cells has the target 0.75 for bin 2 and 0.25 for bin 3. Distances are clipped to [0, R - 1.01].

    Args:
        logits_PC: [P, 4R].
        distances_P4: Wanted distances in cells.
        reg_max: R.

    Returns:
        [P], the mean over the four sides.
    """
    wanted = distances_P4.clamp(0, reg_max - 1 - 0.01)
    lower = wanted.floor()
    upper_weight = wanted - lower
    log_probability = logits_PC.reshape(-1, 4, reg_max).log_softmax(dim=-1)
    at_lower = log_probability.gather(-1, lower.long()[..., None]).squeeze(-1)
    at_upper = log_probability.gather(-1, lower.long()[..., None] + 1).squeeze(-1)
    return -(at_lower * (1 - upper_weight) + at_upper * upper_weight).mean(dim=-1)
