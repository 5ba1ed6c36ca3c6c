"""The pictures of the report: validation images in which the float and the quantized model differ most."""

from __future__ import annotations

import io
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from core.choices import TORCH
from core.errors import OctetError
from core.rows import PTQ
from data import Sample, outlines_of
from data.samples import Dataset
from pipeline.evaluation.engine_outputs import match_detections
from pipeline.job import Job
from pipeline.networks import FLOAT_MODEL, QUANTIZED
from pipeline.prediction.predictors import Options, Predictor, Seen, open_float, open_run
from pipeline.run.progress import say
from report import DetectionPanel, DetectionView

LOOKED_AT = 48  # validation images, spread evenly
SHOWN = 6
LONGEST_SIDE = 640  # pixels
QUALITY = 80  # of the JPEG
GROUND_TRUTH = "ground truth"

Outlines = Sequence[Sequence[Sequence[float]]]


def detection_panels(job: Job) -> list[DetectionPanel]:
    """The images, the one with most differences first; none where the run has no float model."""
    if not job.run.path(FLOAT_MODEL).exists():
        return []
    models = open_models(job)
    if not models:
        return []
    dataset = job.splits.val
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(LOOKED_AT, len(dataset))).astype(int)).tolist()
    found = []
    try:
        for index in chosen:
            sample = dataset[index]
            seen = [model.detect(sample.image) for model in models]
            found.append((_difference(seen), index, seen))
    finally:
        for model in models:
            model.close()
    found.sort(key=lambda item: (-item[0][0], -item[0][1], item[1]))
    return [
        _panel(dataset[index], seen, models, title_of(dataset, index)) for _, index, seen in found[:SHOWN]
    ]


def open_models(job: Job) -> list[Predictor]:
    """The float model, and what is shipped: the engine where one runs here, else the quantized model in torch."""
    config = job.config.evaluate
    options = Options(
        config.operating_confidence,
        config.iou,
        config.max_detections,
        threads=job.config.threads or None,
        device=str(job.device),
        trust=True,  # this run's own code, which has run before
    )
    try:
        models = [open_float(job.run.directory, options)]
    except OctetError as error:
        say(f"pictures of the report: {error}")
        return []
    if not job.run.path(QUANTIZED[PTQ]).exists():
        return models
    for runtime in (None, TORCH):
        try:
            return [*models, open_run(job.run.directory, Options(**{**vars(options), "runtime": runtime}))]
        except OctetError as error:
            say(f"pictures of the report: {error}")
    return models


def title_of(dataset: Dataset, index: int) -> str:
    """The name of an image's file, or its number in a dataset that reads no files."""
    records = getattr(dataset, "records", None)
    return f"image {dataset.ids[index]}" if records is None else str(records[index].path.name)


def _difference(seen: Sequence[Seen]) -> tuple[int, float]:
    """Number of boxes without a partner, and the mean change of the scores of the others."""
    if len(seen) < 2:
        return len(seen[0].boxes), 0.0
    one, other = (view.boxes for view in seen)
    pairs = match_detections(one, other)
    changes = [abs(float(one[i, 4] - other[j, 4])) for i, j in pairs]
    return len(one) + len(other) - 2 * len(pairs), sum(changes) / len(changes) if changes else 0.0


def _panel(sample: Sample, seen: Sequence[Seen], models: Sequence[Predictor], title: str) -> DetectionPanel:
    height, width = sample.image.shape[:2]
    scale = min(1.0, LONGEST_SIDE / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    alone = _alone([view.boxes for view in seen])
    views = [_truth(sample, scale)]
    for view, model, flags in zip(seen, models, alone, strict=True):
        boxes = [
            [*(round(float(v) * scale, 1) for v in row[:4]), round(float(row[4]), 4), int(row[5])]
            for row in view.boxes
        ]
        outlines = [_outline(mask, scale) for mask in view.pixels]
        views.append(DetectionView(model.label, boxes, flags, outlines))
    lonely = sum(map(sum, alone))
    remark = f"{lonely} boxes that only one of the models has" if len(seen) > 1 else ""
    return DetectionPanel(title, _jpeg(sample.image, size), size, views, remark)


def _alone(boxes: Sequence[Tensor]) -> list[list[bool]]:
    if len(boxes) < 2:
        return [[False] * len(part) for part in boxes]
    pairs = match_detections(boxes[0], boxes[1])
    mine, theirs = {i for i, _ in pairs}, {j for _, j in pairs}
    return [[i not in mine for i in range(len(boxes[0]))], [j not in theirs for j in range(len(boxes[1]))]]


def _truth(sample: Sample, scale: float) -> DetectionView:
    crowd = np.zeros(len(sample.boxes), bool) if sample.crowd is None else sample.crowd
    kept = np.flatnonzero(~crowd).tolist()
    boxes = [
        [*(round(float(value) * scale, 1) for value in sample.boxes[i]), None, int(sample.labels[i])]
        for i in kept
    ]
    outlines: list[list[list[float]]] = []
    if sample.segments is not None:
        outlines = [
            [(part * scale).round(1).reshape(-1).tolist() for part in outlines_of(sample.segments[i])]
            for i in kept
        ]
    return DetectionView(GROUND_TRUTH, boxes, [], outlines)


def _outline(mask: NDArray[np.bool_], scale: float) -> list[list[float]]:
    """Polygons around a mask [H, W], in pixels of the scaled picture."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    simple = [cv2.approxPolyDP(contour, 1.0, True).reshape(-1, 2) for contour in contours]
    return [((part + 0.5) * scale).round(1).reshape(-1).tolist() for part in simple if len(part) > 2]


def _jpeg(image: NDArray[np.uint8], size: tuple[int, int]) -> bytes:
    picture = Image.fromarray(image)
    if picture.size != (size[1], size[0]):
        picture = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=QUALITY)
    return buffer.getvalue()
