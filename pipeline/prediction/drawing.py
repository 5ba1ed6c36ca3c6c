"""Detect in pictures, draw what was found, and count what two models agree on: what `pipeline.predict` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from core.files import write_json
from core.operating_point import AGREEMENT_IOU, Agreement
from data import Detections, measure_agreement
from pipeline.evaluation.engine_outputs import match_detections
from pipeline.prediction.predictors import Predictor, Seen, partner_classes
from pipeline.prediction.sources import Picture, PictureWriter, Source
from pipeline.run.progress import say, track
from report import join_pictures, paint_detections

RESULT = "detections.json"


@dataclass
class Result:
    """What was found so far: COCO images and annotations, and the detections of both models of a comparison."""

    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    matched: int = 0
    mine: list[Tensor] = field(default_factory=list)
    theirs: list[Tensor] = field(default_factory=list)
    order: Tensor | None = None  # class of the first model for each class of the second

    @property
    def num_theirs(self) -> int:
        """Detections of the second model."""
        return sum(map(len, self.theirs))

    def agreement(self, num_classes: int, confidence: float) -> Agreement:
        """How many of the second model's detections the first one finds again."""
        mine, theirs = (
            Detections([rows.numpy() for rows in side], range(len(side))) for side in (self.mine, self.theirs)
        )
        return measure_agreement(mine, theirs, num_classes, confidence)


def predict(
    model: Predictor, source: Source, folder: Path, other: Predictor | None, confidence: float
) -> dict[str, Any]:
    """Detect in every picture, draw and write; returns the content of detections.json.

    Args:
        model: what detects.
        source: the pictures.
        folder: where results go.
        other: a second model, drawn to the left; the share of its detections that are found again is printed.
        confidence: threshold both used, for the file.

    Raises:
        DataError: a picture cannot be read or written, or models of different classes.
    """
    result = Result() if other is None else Result(order=partner_classes(model, other))
    with PictureWriter(folder, source) as writer:
        for name, picture in track(source.pictures(), "detect", source.total):
            writer.write(name, look(model, other, name, picture, result))
    info: dict[str, Any] = {"model": model.label, "image_size": list(model.size), "confidence": confidence}
    say(f"{model.label}: {len(result.annotations)} detections in {len(result.images)} pictures")
    if other is not None:
        theirs, agreement = result.num_theirs, result.agreement(len(model.names), confidence)
        info |= {"compared_with": other.label, "matched": result.matched, "their_detections": theirs}
        info["agreement"] = agreement.as_dict()
        say(
            f"{result.matched} of them match one of the {theirs} detections of {other.label} (IoU >= 0.5, same class)"
        )
        say(f"IoU >= {AGREEMENT_IOU}: {agreement.describe(other.label)}")
    content = {
        "info": info,
        "images": result.images,
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(model.names)],
        "annotations": result.annotations,
    }
    write_json(folder / RESULT, content)
    say(f"written: {', '.join(map(str, writer.paths[:3]))}{' ...' if len(writer.paths) > 3 else ''}")
    print(folder / RESULT)
    return content


def look(model: Predictor, other: Predictor | None, name: str, picture: Picture, result: Result) -> Picture:
    """Detect in one picture and note it in `result`; returns what is shown of it."""
    found = model.detect(picture)
    number = len(result.images) + 1
    height, width = picture.shape[:2]
    result.images.append({"id": number, "file_name": name, "height": height, "width": width})
    result.annotations += coco_annotations(found, number, len(result.annotations))
    drawn = paint(picture, found, model.names)
    if other is None:
        return drawn
    reference = other.detect(picture)
    theirs = reference.boxes.clone()
    if result.order is not None:
        theirs[:, 5] = result.order[theirs[:, 5].long()].to(theirs.dtype)
    result.matched += len(match_detections(found.boxes, theirs))
    result.mine.append(found.boxes)
    result.theirs.append(theirs)
    return join_pictures([(other.label, paint(picture, reference, other.names)), (model.label, drawn)])


def paint(picture: Picture, seen: Seen, names: Sequence[str]) -> Picture:
    """The picture with boxes and masks."""
    return paint_detections(picture, seen.boxes.numpy(), names, seen.pixels)


def coco_annotations(found: Seen, image_id: int, before: int) -> list[dict[str, Any]]:
    """Detections of one image as COCO annotations with a score; category ids count from 1.

    With masks, `segmentation` is the compressed run-length code and `area` counts its pixels, as in COCO.

    Args:
        found: in the pixels of the image.
        image_id: of the image.
        before: annotations that have a number already.
    """
    annotations: list[dict[str, Any]] = [
        {
            "id": before + number,
            "image_id": image_id,
            "category_id": int(label) + 1,
            "bbox": [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)],
            "area": round((x2 - x1) * (y2 - y1), 2),
            "iscrowd": 0,
            "score": round(score, 5),
        }
        for number, (x1, y1, x2, y2, score, label) in enumerate(found.boxes.tolist(), 1)
    ]
    for annotation, code, mask in zip(annotations, found.masks or (), found.pixels, strict=False):
        annotation["segmentation"] = {"size": list(code.size), "counts": code.counts.decode()}
        annotation["area"] = int(mask.sum())
    return annotations
