"""Evaluation: the same images, suppression and metric for torch and for every engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import EvaluateConfig
from data import Batch, Found, Predict, evaluate
from pipeline.evaluation.measuring import Metrics, measure_custom
from pipeline.evaluation.suppression import suppress_overlaps
from pipeline.run.progress import track
from pipeline.splits import Splits


class Evaluator:
    """Measures anything that turns images into detections on a validation split.

    Args:
        config: the section `evaluate`: thresholds, batch size, metric engine.
        metric: `package.module:function` of the user's own metric, or None for COCO figures.
        splits: the data.
        device: where images go.
    """

    def __init__(
        self, config: EvaluateConfig, metric: str | None, splits: Splits, device: torch.device
    ) -> None:
        self.config = config
        self.metric = metric
        self.splits = splits
        self.device = device

    def detections(self, decoded: Any, confidence: float | None = None) -> Sequence[Found]:
        """Suppress overlaps in decoded outputs, as every row of the table does.

        Args:
            decoded: what the decode returns: [B, 4 + K, A], or with coefficients and prototypes for segmentation.
            confidence: lowest score kept; the configured one when None.
        """
        config = self.config
        lowest = config.confidence if confidence is None else confidence
        return suppress_overlaps(decoded, lowest, config.iou, config.max_detections)

    def predictor(self, network: nn.Module, decode: nn.Module) -> Predict:
        """Images to detections through a torch network and its decode."""

        def predict(images: Tensor) -> Sequence[Found]:
            return self.detections(decode(network(images)))

        return predict

    def measure(
        self, predict: Predict, label: str | None, batch_size: int | None = None, limit: int | None = None
    ) -> Metrics:
        """COCO figures, or the user's metric, on the validation split; progress is shown under `label`."""
        loader = self.splits.val_batches(batch_size or self.config.batch_size, limit)
        return self.measure_batches(
            predict, loader if label is None else track(loader, f"evaluate {label}", len(loader))
        )

    def measure_batches(self, predict: Predict, batches: Iterable[Batch]) -> Metrics:
        """COCO figures, or the user's metric, over validation batches."""
        if self.metric is not None:
            return measure_custom(self.metric, predict, batches, self.device)
        return evaluate(predict, batches, self.splits.truth, self.config.engine, self.device)
