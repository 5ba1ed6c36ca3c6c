"""AP over several views of the same images, so that a difference of 0.001 can be seen on a hundred of them.

A view is every image moved by up to three pixels, with the boxes moved back: for a person the same picture, for a
quantized network other roundings everywhere. What two networks differ by on every view is theirs; what changes from
view to view is chance (see docs/quantization.md, "What a measured AP can resolve").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data import Instances, Predict
from pipeline.evaluation.measuring import value_of
from pipeline.job import Job

PAD = 114 / 255
SHIFTS = [
    (x, y) for reach in range(4) for x in range(-3, 4) for y in range(-3, 4) if max(abs(x), abs(y)) == reach
]


def move(images: Tensor, x: int, y: int) -> Tensor:
    """Images [B, 3, H, W] with their content moved right by x and down by y pixels; what comes in is padding."""
    moved = torch.full_like(images, PAD)
    height, width = images.shape[-2:]
    to_rows, to_columns = slice(max(y, 0), height + min(y, 0)), slice(max(x, 0), width + min(x, 0))
    rows, columns = slice(max(-y, 0), height + min(-y, 0)), slice(max(-x, 0), width + min(-x, 0))
    moved[..., to_rows, to_columns] = images[..., rows, columns]
    return moved


def ap_of_views(job: Job, predict: Predict, count: int) -> list[float]:
    """AP on the validation images as they are, then on `count` - 1 moved views of them; one image at a time."""
    return [ap_of_view(job, predict, *shift) for shift in SHIFTS[:count]]


def ap_of_view(job: Job, predict: Predict, x: int, y: int) -> float:
    """AP of boxes on the validation images moved by (x, y) pixels."""

    def moved(images: Tensor) -> list[Tensor]:
        back = torch.tensor([x, y, x, y, 0, 0], dtype=torch.float32)
        found = predict(move(images, x, y))
        return [boxes.detections - back if isinstance(boxes, Instances) else boxes - back for boxes in found]

    with torch.inference_mode():
        return value_of(
            job.evaluator.measure_batches(moved if (x, y) != (0, 0) else predict, job.splits.val_batches(1))
        )


def mean_difference(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """Mean of paired differences and its standard error (NaN for a single view)."""
    differences = np.subtract(values, reference)
    error = differences.std(ddof=1) / np.sqrt(len(differences)) if len(differences) > 1 else np.nan
    return float(differences.mean()), float(error)
