"""Detections as tests write them, one table with the image's id in front, for `compute_metrics`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data import DetectionMetrics
from data.masks import Rle
from data.metrics import detection


def compute_metrics(
    rows: np.ndarray,
    ids: Sequence[int],
    truth: Mapping[str, Any],
    engine: str = "hotcoco",
    masks: Sequence[Rle] | None = None,
) -> DetectionMetrics:
    """Metrics of rows [M, 7]: image id, x1, y1, x2, y2, score, class."""
    chosen = [np.flatnonzero(rows[:, 0] == image_id) for image_id in ids]
    ordered = None if masks is None else [masks[row] for rows_of in chosen for row in rows_of.tolist()]
    return detection.compute_metrics([rows[rows_of, 1:] for rows_of in chosen], ids, truth, engine, ordered)
