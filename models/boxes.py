"""Boxes: anchor points, the float decode of raw maps, overlap measures and non-maximum suppression.

Shapes: B batch, A anchor points (all levels, fine to coarse, row-major), K classes, R bins per box side, N
detections. Boxes are "xyxy, input pixels" unless a name says otherwise.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.choices import ONE2MANY, ONE2ONE
from models.heads import REG_MAX, Raw
from models.overlaps import suppress_by_class

MAX_CANDIDATES = 30_000


def make_anchor_points(
    shapes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cell centres of all levels.

    Args:
        shapes: (h, w) in cells for each level, fine to coarse.
        strides: Input pixels per cell for each level.
        device: Where the tensors are made.
        dtype: Floating type of the result.

    Returns:
        points_A2: (x, y) of each cell's centre, in cells of its own level (0.5, 1.5, ...).
        stride_A1: The stride of each point's level, in input pixels.

    Example:
        shapes ((1, 2),), strides (8,) -> points ((0.5, 0.5), (1.5, 0.5)), strides ((8,), (8,)).
    """
    points, point_strides = [], []
    for (h, w), stride in zip(shapes, strides, strict=True):
        x = torch.arange(w, device=device, dtype=dtype) + 0.5
        y = torch.arange(h, device=device, dtype=dtype) + 0.5
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        points.append(torch.stack((grid_x, grid_y), dim=-1).reshape(-1, 2))
        point_strides.append(torch.full((h * w, 1), float(stride), device=device, dtype=dtype))
    return torch.cat(points), torch.cat(point_strides)


def expected_distances(box_BA4R: Tensor, projection_R: Tensor) -> Tensor:
    """Expected value of each box side's discrete distribution (DFL, arXiv:2006.04388, eq. 3-4).

    Args:
        box_BA4R: Logits [..., 4R], the four sides (left, top, right, bottom) one after another.
        projection_R: Value of each bin, in cells.

    Returns:
        Distances [..., 4] from the anchor point, in cells.
    """
    bins = projection_R.numel()
    logits = box_BA4R.reshape(*box_BA4R.shape[:-1], 4, bins)
    return (logits.softmax(dim=-1) * projection_R).sum(dim=-1)


class Decode(nn.Module):
    """Raw maps to [B, 4 + K, A]: centre x, centre y, width, height in input pixels, then sigmoid class scores.

    Always a float computation: half-precision maps are raised to float32 first, since half steps are 0.5 px above
    512.

    Args:
        strides: Input pixels per cell for each level, fine to coarse.
        reg_max: R, the number of bins per box side; with 1 the maps are the distances themselves.
        head: Which head's maps are decoded, `one2many` or `one2one` (see `models.dual_heads`).
    """

    projection: Tensor

    def __init__(self, strides: Sequence[int], reg_max: int = REG_MAX, head: str = ONE2MANY) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.reg_max = reg_max
        self.head = head
        if reg_max > 1:
            self.register_buffer("projection", torch.arange(reg_max, dtype=torch.float32))

    @property
    def nms_free(self) -> bool:
        """Whether each object has one box, so that nothing is to be suppressed."""
        return self.head == ONE2ONE

    def chosen(self, raw: Any) -> Any:
        """The maps of `head`, of a network that gives those of both."""
        return raw[self.head] if isinstance(raw, dict) else raw

    def forward(self, raw: Raw | Mapping[str, Raw]) -> Tensor:
        """Per level (box [B, 4R, h, w], cls [B, K, h, w]) to [B, 4 + K, A]."""
        levels: Raw = self.chosen(raw)
        shapes = [(box.shape[2], box.shape[3]) for box, _ in levels]
        box = torch.cat([level_box.flatten(2) for level_box, _ in levels], dim=2)
        cls = torch.cat([level_cls.flatten(2) for _, level_cls in levels], dim=2)
        if box.dtype in (torch.float16, torch.bfloat16):
            box, cls = box.float(), cls.float()
        points_A2, stride_A1 = make_anchor_points(shapes, self.strides, box.device, box.dtype)
        distance_B4A = box if self.reg_max == 1 else self._expected(box)
        left_top, right_bottom = distance_B4A[:, :2], distance_B4A[:, 2:]
        points_2A, stride_1A = points_A2.t(), stride_A1.t()
        centre = points_2A + (right_bottom - left_top) / 2
        size = left_top + right_bottom
        return torch.cat((centre * stride_1A, size * stride_1A, cls.sigmoid()), dim=1)

    def _expected(self, box_BCA: Tensor) -> Tensor:
        """Box logits [B, 4R, A] to expected distances [B, 4, A], in cells."""
        logits_B4RA = box_BCA.reshape(box_BCA.shape[0], 4, self.reg_max, -1)
        weights = self.projection.to(box_BCA.dtype).reshape(1, 1, self.reg_max, 1)
        return (logits_B4RA.softmax(dim=2) * weights).sum(dim=2)


def distances_to_boxes(distances_BA4: Tensor, points_A2: Tensor) -> Tensor:
    """Left, top, right, bottom distances from the points to xyxy; [..., A, 4], all in the points' unit."""
    left_top, right_bottom = distances_BA4[..., :2], distances_BA4[..., 2:]
    return torch.cat((points_A2 - left_top, points_A2 + right_bottom), dim=-1)


def boxes_to_distances(boxes_BA4: Tensor, points_A2: Tensor) -> Tensor:
    """Inverse of `distances_to_boxes`: xyxy to left, top, right, bottom distances from the points."""
    return torch.cat((points_A2 - boxes_BA4[..., :2], boxes_BA4[..., 2:] - points_A2), dim=-1)


def centre_to_corners(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) to (x1, y1, x2, y2) in the same unit; boxes in the last dimension."""
    half = boxes[..., 2:] / 2
    return torch.cat((boxes[..., :2] - half, boxes[..., :2] + half), dim=-1)


def complete_iou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """Complete IoU of boxes paired by broadcasting (CIoU, arXiv:1911.08287, eq. 7-11).

    IoU, less the squared centre distance over the squared diagonal of the enclosing box, less alpha * v for the
    aspect ratio, with alpha = v / (1 - IoU + v) held constant in the gradient.

    Args:
        a: Boxes [..., 4], xyxy.
        b: Boxes [..., 4], xyxy, same unit.
        eps: Keeps divisions finite for empty boxes.

    Returns:
        [...] in about (-1.5, 1]; 1 for equal boxes.
    """
    a_size = (a[..., 2:] - a[..., :2]).clamp(min=0)
    b_size = (b[..., 2:] - b[..., :2]).clamp(min=0)
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    intersection = overlap.prod(dim=-1)
    iou = intersection / (a_size.prod(dim=-1) + b_size.prod(dim=-1) - intersection + eps)
    enclosing = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    diagonal = enclosing.square().sum(dim=-1) + eps
    centre_shift = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2
    distance = centre_shift.square().sum(dim=-1) / diagonal
    a_angle = torch.atan(a_size[..., 0] / (a_size[..., 1] + eps))
    b_angle = torch.atan(b_size[..., 0] / (b_size[..., 1] + eps))
    aspect = (4 / math.pi**2) * (b_angle - a_angle).square()
    with torch.no_grad():
        alpha = aspect / (1 - iou + aspect + eps)
    return iou - distance - alpha * aspect


def non_max_suppression(
    decoded: Tensor, confidence: float, iou: float, max_detections: int = 300
) -> list[Tensor]:
    """Class-wise suppression; a box may be reported once for each class that passes the confidence (multi-label).

    Args:
        decoded: [B, 4 + K, A]: cx, cy, w, h in input pixels, then class scores in [0, 1].
        confidence: Scores must be greater than this, in [0, 1).
        iou: Boxes of one class that overlap a better one by more than this are dropped, in (0, 1].
        max_detections: Kept per image, best scores first. At most 30,000 candidates per image enter the suppression.

    Returns:
        One tensor [N, 6] per image: x1, y1, x2, y2 in input pixels, score, class; in descending order of score.

    Raises:
        ValueError: If `decoded` has fewer than 5 rows or a threshold is out of range.
    """
    return [detections for detections, _ in suppress(decoded, confidence, iou, max_detections)]


def suppress(
    decoded: Tensor, confidence: float, iou: float, max_detections: int
) -> list[tuple[Tensor, Tensor]]:
    """As `non_max_suppression`, with the anchor index [N] of each detection."""
    _check_decoded(decoded, confidence)
    if not 0 < iou <= 1:
        raise ValueError(f"Threshold iou={iou}; expected 0 < iou <= 1")
    return [_suppress_image(image.t(), confidence, iou, max_detections) for image in decoded.detach()]


def _suppress_image(
    rows_A: Tensor, confidence: float, iou: float, max_detections: int
) -> tuple[Tensor, Tensor]:
    scores_AK = rows_A[:, 4:]
    anchor, label = (scores_AK > confidence).nonzero(as_tuple=True)
    scores = scores_AK[anchor, label]
    if scores.numel() > MAX_CANDIDATES:
        scores, best = scores.topk(MAX_CANDIDATES)
        anchor, label = anchor[best], label[best]
    boxes = centre_to_corners(rows_A[anchor, :4])
    kept = suppress_by_class(boxes.float(), scores.float(), label, iou)[:max_detections]
    detections = torch.cat((boxes[kept], scores[kept, None], label[kept, None].to(boxes.dtype)), dim=1)
    return detections, anchor[kept]


def best_pairs(decoded: Tensor, confidence: float, max_detections: int = 300) -> list[tuple[Tensor, Tensor]]:
    """The best (anchor, class) pairs of a head that gives each object one box; nothing is suppressed.

    Args:
        decoded: [B, 4 + K, A]: cx, cy, w, h in input pixels, then class scores in [0, 1].
        confidence: Scores must be greater than this, in [0, 1).
        max_detections: Kept per image, best scores first.

    Returns:
        For each image detections [N, 6] (x1, y1, x2, y2 in input pixels, score, class), by descending score, and the
        anchor index [N] of each.

    Raises:
        ValueError: If `decoded` has fewer than 5 rows or the threshold is out of range.
    """
    _check_decoded(decoded, confidence)
    scores_BKA = decoded.detach()[:, 4:]
    num_anchors = scores_BKA.shape[2]
    results = []
    for rows, scores_KA in zip(decoded.detach(), scores_BKA, strict=True):
        best = scores_KA.flatten().topk(min(max_detections, scores_KA.numel()))
        kept = best.values > confidence
        scores, index = best.values[kept], best.indices[kept]
        anchor, label = index % num_anchors, index // num_anchors
        boxes = centre_to_corners(rows[:4, anchor].t())
        results.append((torch.cat((boxes, scores[:, None], label[:, None].to(boxes.dtype)), dim=1), anchor))
    return results


def _check_decoded(decoded: Tensor, confidence: float) -> None:
    if decoded.ndim != 3 or decoded.shape[1] < 5:
        raise ValueError(
            f"Decoded output has shape {tuple(decoded.shape)}; expected [B, 4 + classes, anchors]"
        )
    if not 0 <= confidence < 1:
        raise ValueError(f"Threshold confidence={confidence}; expected 0 <= confidence < 1")
