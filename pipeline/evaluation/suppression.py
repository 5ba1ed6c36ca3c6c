"""From decoded outputs to what was found: the one NMS behind every row, every engine and every picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from data import Found, Instances
from models import non_max_suppression, soft_masks, suppress_segments


def suppress_overlaps(decoded: Any, confidence: float, iou: float, max_detections: int) -> Sequence[Found]:
    """Detections of each image of a batch.

    Args:
        decoded: [B, 4 + K, A]; for segmentation [B, 4 + K + P, A] and prototypes [B, P, h, w].
        confidence: scores must be greater, 0..1.
        iou: class-wise NMS threshold, 0..1.
        max_detections: kept in an image.
    """
    if isinstance(decoded, Tensor):
        return non_max_suppression(decoded, confidence, iou, max_detections)
    rows, prototypes = decoded
    found = suppress_segments(rows, confidence, iou, max_detections, num_prototypes=prototypes.shape[1])
    return [
        Instances(detections, soft_masks(maps, coefficients))
        for (detections, coefficients), maps in zip(found, prototypes, strict=True)
    ]
