"""Which anchor points are trained on which object: the task-aligned assigner (TOOD, arXiv:2108.07755, section 3.2).

Shapes: B batch, M objects per image (padded), A anchor points, K classes. Boxes are "xyxy, input pixels".
"""

from typing import NamedTuple

import torch
from torch import Tensor

from models.boxes import complete_iou


class Assignment(NamedTuple):
    """What each anchor point should predict.

    Attributes:
        boxes_BA4: Target box; meaningful where `positive_BA`.
        scores_BAK: Soft class targets in [0, 1]; zero for background.
        positive_BA: True where the point is assigned to an object.
        objects_BA: Which of its image's objects (0 to M - 1); meaningful where `positive_BA`.
    """

    boxes_BA4: Tensor  # noqa: N815
    scores_BAK: Tensor  # noqa: N815
    positive_BA: Tensor  # noqa: N815
    objects_BA: Tensor  # noqa: N815


def pad_targets(targets_T6: Tensor, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Turn a flat list of objects into one padded table per image.

    Args:
        targets_T6: (batch index, class, x1, y1, x2, y2) per object, in any order.
        batch_size: B.

    Returns:
        labels_BM int64, boxes_BM4 and valid_BM (bool); M is the largest number of objects in an image.
    """
    index = targets_T6[:, 0].long()
    counts = torch.bincount(index, minlength=batch_size)
    most = int(counts.max()) if targets_T6.shape[0] else 0
    order = torch.argsort(index, stable=True)
    sorted_index = index[order]
    first = counts.cumsum(0) - counts
    slot = torch.arange(index.numel(), device=index.device) - first[sorted_index]
    labels_BM = index.new_zeros((batch_size, most))
    boxes_BM4 = targets_T6.new_zeros((batch_size, most, 4))
    valid_BM = torch.zeros((batch_size, most), dtype=torch.bool, device=index.device)
    labels_BM[sorted_index, slot] = targets_T6[order, 1].long()
    boxes_BM4[sorted_index, slot] = targets_T6[order, 2:]
    valid_BM[sorted_index, slot] = True
    return labels_BM, boxes_BM4, valid_BM


@torch.no_grad()
def assign(
    scores_BAK: Tensor,
    boxes_BA4: Tensor,
    points_A2: Tensor,
    labels_BM: Tensor,
    target_boxes_BM4: Tensor,
    valid_BM: Tensor,
    *,
    top_k: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
) -> Assignment:
    """Assign anchor points to objects by how well score and box agree on them.

    1. alignment = score^alpha * overlap^beta, for points inside the object's box (overlap: CIoU clipped at 0).
    2. Each object takes its `top_k` best points (those of zero alignment are left out).
    3. A point taken by several objects goes to the one it overlaps most.
    4. Class target of a point: its alignment, scaled so that each object's best equals the object's best overlap.

    Args:
        scores_BAK: Predicted class scores in [0, 1].
        boxes_BA4: Predicted boxes.
        points_A2: Anchor points, input pixels.
        labels_BM: Object classes.
        target_boxes_BM4: Object boxes.
        valid_BM: False for padding.
        top_k: Points per object.
        alpha: Exponent of the score.
        beta: Exponent of the overlap.
    """
    batch, num_objects = labels_BM.shape
    if num_objects == 0:
        positive = torch.zeros(boxes_BA4.shape[:2], dtype=torch.bool, device=boxes_BA4.device)
        nobody = torch.zeros_like(positive, dtype=torch.int64)
        return Assignment(torch.zeros_like(boxes_BA4), torch.zeros_like(scores_BAK), positive, nobody)
    inside_BMA = _inside(points_A2, target_boxes_BM4) & valid_BM[:, :, None]
    overlap_BMA = complete_iou(target_boxes_BM4[:, :, None], boxes_BA4[:, None]).clamp(min=0) * inside_BMA
    score_BMA = scores_BAK.transpose(1, 2).gather(
        1, labels_BM[:, :, None].expand(-1, -1, scores_BAK.shape[1])
    )
    alignment_BMA = score_BMA.pow(alpha) * overlap_BMA.pow(beta)
    best = alignment_BMA.topk(min(top_k, alignment_BMA.shape[-1]), dim=-1)
    taken_BMA = torch.zeros_like(inside_BMA).scatter_(-1, best.indices, best.values > 0)
    owner_BA = overlap_BMA.masked_fill(~taken_BMA, -1.0).argmax(dim=1)
    positive_BA = taken_BMA.any(dim=1)
    owned_BMA = torch.zeros_like(taken_BMA).scatter_(1, owner_BA[:, None], positive_BA[:, None])
    alignment_BMA = alignment_BMA * owned_BMA
    best_alignment = alignment_BMA.amax(dim=-1, keepdim=True)
    best_overlap = (overlap_BMA * owned_BMA).amax(dim=-1, keepdim=True)
    weight_BA = (alignment_BMA / best_alignment.clamp(min=1e-9) * best_overlap).amax(dim=1)
    rows = torch.arange(batch, device=owner_BA.device)[:, None]
    labels_BA1 = labels_BM[rows, owner_BA][..., None]
    target_scores = torch.zeros_like(scores_BAK).scatter_(-1, labels_BA1, weight_BA[..., None])
    return Assignment(target_boxes_BM4[rows, owner_BA], target_scores, positive_BA, owner_BA)


def _inside(points_A2: Tensor, boxes_BM4: Tensor) -> Tensor:
    """True where a point lies strictly inside a box: [B, M, A]."""
    left_top = points_A2 - boxes_BM4[:, :, None, :2]
    right_bottom = boxes_BM4[:, :, None, 2:] - points_A2
    return torch.minimum(left_top.amin(dim=-1), right_bottom.amin(dim=-1)) > 1e-9
