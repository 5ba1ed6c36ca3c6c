"""From decoded outputs to what was found: the same selection for every row, engine and picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from data import Found, Instances
from models import best_pairs, best_segments, non_max_suppression, soft_masks, suppress_segments


def suppress_overlaps(
    decoded: Any, confidence: float, iou: float | None, max_detections: int
) -> Sequence[Found]:
    """Detections of each image of a batch.

    Args:
        decoded: [B, 4 + K, A]; for segmentation [B, 4 + K + P, A] and prototypes [B, P, h, w].
        confidence: scores must be greater, 0..1.
        iou: class-wise NMS threshold, 0..1; None for a head that gives each object one box: nothing is suppressed.
        max_detections: kept in an image.
    """
    if isinstance(decoded, Tensor):
        if iou is None:
            return [boxes for boxes, _ in best_pairs(decoded, confidence, max_detections)]
        return non_max_suppression(decoded, confidence, iou, max_detections)
    rows, prototypes = decoded
    number = prototypes.shape[1]
    if iou is None:
        found = best_segments(rows, confidence, max_detections, num_prototypes=number)
    else:
        found = suppress_segments(rows, confidence, iou, max_detections, num_prototypes=number)
    return [
        Instances(detections, soft_masks(maps, coefficients))
        for (detections, coefficients), maps in zip(found, prototypes, strict=True)
    ]


def is_nms_free(decode: Any) -> bool:
    """Whether a decode belongs to a head that gives each object one box."""
    return bool(getattr(decode, "nms_free", False))
