"""Evaluation: the same images, suppression and metric for torch and for every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from configs.evaluate_schema import EvaluateConfig
from core.operating_point import OperatingPoint
from data import (
    Batch,
    DetectionMetrics,
    Detections,
    Found,
    Predict,
    collect,
    compute_metrics,
    evaluate,
    in_pictures,
    join_batches,
    join_shares,
    measure_operating_point,
    resample_score,
    to_input,
)
from pipeline.evaluation.measuring import Metrics, describe, measure_custom
from pipeline.evaluation.suppression import is_nms_free, suppress_overlaps
from pipeline.run.progress import track
from pipeline.splits import Splits
from training.team import ALONE, Team


@dataclass(frozen=True)
class Measured:
    """What is measured for a row.

    Attributes:
        metrics: COCO figures, or the user's metric.
        operating_point: at the user's confidence threshold; None under a metric of the user's own.
        detections: above that threshold, to compare other models with; None as before.
        draws: the deciding score on images drawn with replacement; empty under a metric of the user's own.
    """

    metrics: Metrics
    operating_point: OperatingPoint | None = None
    detections: Detections | None = None
    draws: tuple[float, ...] = ()

    def describe(self) -> str:
        """The figures in one line, for the log."""
        point = "" if self.operating_point is None else f"; {self.operating_point.describe()}"
        return describe(self.metrics) + point


class Evaluator:
    """Measures anything that turns images into detections on a validation split.

    Args:
        config: the section `evaluate`: thresholds, batch size, metric engine.
        metric: `package.module:function` of the user's own metric, or None for COCO figures.
        splits: the data.
        device: where images go.
        team: gives the processes that share the images at present; every one of them must then ask for the same
            figures, and gets them.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        metric: str | None,
        splits: Splits,
        device: torch.device,
        team: Callable[[], Team] = lambda: ALONE,
    ) -> None:
        self.config = config
        self.metric = metric
        self.splits = splits
        self.device = device
        self.team = team

    def detections(
        self, decoded: Any, confidence: float | None = None, nms_free: bool = False
    ) -> Sequence[Found]:
        """Choose detections from decoded outputs, as for every row of the table.

        Args:
            decoded: what the decode returns: [B, 4 + K, A], or with coefficients and prototypes for segmentation.
            confidence: lowest score kept; the configured one when None.
            nms_free: whether they are of a head that gives each object one box.
        """
        config = self.config
        lowest = config.confidence if confidence is None else confidence
        return suppress_overlaps(decoded, lowest, None if nms_free else config.iou, config.max_detections)

    def predictor(
        self,
        network: nn.Module,
        decode: nn.Module,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Predict:
        """Images to detections through a torch network, which gets them in a memory format, and its decode."""

        def predict(images: Tensor) -> Sequence[Found]:
            return self._decoded(network(images.contiguous(memory_format=memory_format)), decode)

        return predict

    def _decoded(self, raw: Any, decode: nn.Module) -> Sequence[Found]:
        contiguous = tree_map_only(Tensor, Tensor.contiguous, raw)  # a user's decode may rely on it
        return self.detections(decode(contiguous), nms_free=is_nms_free(decode))

    def measure_each(
        self,
        outputs: Callable[[Tensor], Iterable[Any]],
        count: int,
        decode: nn.Module,
        limit: int | None = None,
    ) -> list[Metrics]:
        """COCO figures of several networks that look at the same batches of the validation split.

        Args:
            outputs: images on the device to the raw maps of each network, one after the other.
            count: networks.
            decode: their decode.
            limit: images at most.
        """
        parts: list[list[Detections]] = [[] for _ in range(count)]
        for batch in self.splits.val_batches(self.config.batch_size, limit):
            with torch.inference_mode():
                for part, raw in zip(parts, outputs(to_input(batch.images, self.device)), strict=True):
                    part.append(in_pictures(self._decoded(raw, decode), batch))
        return [self._coco(join_batches(part)) for part in parts]

    def measure(
        self, predict: Predict, label: str | None, batch_size: int | None = None, limit: int | None = None
    ) -> Metrics:
        """COCO figures, or the user's metric, on the validation split; progress is shown under `label`.

        A metric of the user's own looks at all images in the first process of a team.
        """
        team = self.team()
        if self.metric is None:
            found = self.collect(predict, label, batch_size, limit)
            return team.from_first(lambda: self._coco(found))
        loader = self.splits.val_batches(batch_size or self.config.batch_size, limit)
        batches = loader if label is None else track(loader, f"evaluate {label}", len(loader))
        return team.from_first(lambda: self.measure_batches(predict, batches))

    def measure_row(
        self,
        predict: Predict,
        label: str,
        reference: Detections | None = None,
        batch_size: int | None = None,
        limit: int | None = None,
    ) -> Measured:
        """As `measure`, with the operating point, compared with the float model's detections if there are any."""
        if self.metric is not None:
            return Measured(self.measure(predict, label, batch_size, limit))
        confidence = self.config.operating_confidence
        found = self.collect(predict, label, batch_size, limit)

        def measured() -> Measured:
            truth = self.splits.truth
            point = measure_operating_point(found, truth, confidence, reference)
            return Measured(self._coco(found), point, draws=resample_score(found, truth, self.config.engine))

        return replace(self.team().from_first(measured), detections=found.above(confidence))

    def collect(
        self, predict: Predict, label: str | None, batch_size: int | None = None, limit: int | None = None
    ) -> Detections:
        """Detections on the validation split, in other processes than the first of a team those of their share.

        Progress is shown under `label`.
        """
        team, batch_size = self.team(), batch_size or self.config.batch_size
        loader = self.splits.val_batches(batch_size, limit, team)
        batches = loader if label is None else track(loader, f"evaluate {label}", len(loader))
        return join_shares(team.collect(collect(predict, batches, self.device)), batch_size)

    def _coco(self, found: Detections) -> DetectionMetrics:
        return compute_metrics(
            found.rows, found.image_ids, self.splits.truth, self.config.engine, found.masks
        )

    def measure_batches(self, predict: Predict, batches: Iterable[Batch]) -> Metrics:
        """COCO figures, or the user's metric, over validation batches."""
        if self.metric is not None:
            return measure_custom(self.metric, predict, batches, self.device)
        return evaluate(predict, batches, self.splits.truth, self.config.engine, self.device)
