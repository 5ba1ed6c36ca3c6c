"""Try any engine on your own pictures: boxes, and masks where there are any, are drawn and written as COCO JSON.

    python -m pipeline.predict MODEL_OR_RUN IMAGE|FOLDER|VIDEO [--runtime NAME] [--compare float|MODEL] [--out DIR]

MODEL_OR_RUN is a run directory (its quantized engine, in torch where this machine cannot run it), an .onnx, .xml,
.engine or .plan file, or a float checkpoint. OUT holds the pictures (PNG, or one MP4 for a video) and detections.json.
Exit code 2: wrong arguments. 3: a model or picture that cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.command import reports_errors, size_argument
from core.errors import DataError
from core.files import write_json
from core.image_size import ImageSize
from core.names import listing
from core.runtimes import RUNTIMES
from data import class_positions
from pipeline.class_names import is_unnamed
from pipeline.evaluation.engine_outputs import match_detections
from pipeline.prediction.predictors import (
    FLOAT,
    TORCH,
    Options,
    Predictor,
    Seen,
    open_float,
    open_predictor,
)
from pipeline.prediction.sources import Picture, PictureWriter, Source, open_source
from pipeline.run.progress import say, track
from report import join_pictures, paint_detections

RESULT = "detections.json"


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parser().parse_args(arguments)
    opened: list[Predictor] = []
    try:
        source = open_source(options.source)
        if options.threads:
            torch.set_num_threads(options.threads)
        wanted = Options(
            confidence=options.confidence,
            iou=options.iou,
            runtime=options.runtime,
            size=options.size,
            threads=options.threads,
            device=options.device,
        )
        opened.append(open_predictor(options.model, wanted))
        if options.compare is not None:
            opened.append(_open_other(options, wanted))
        predict(opened[0], source, options.out, opened[1] if len(opened) > 1 else None, options.confidence)
    finally:
        for predictor in opened:
            predictor.close()
    return 0


def _open_other(options: argparse.Namespace, wanted: Options) -> Predictor:
    if options.compare == FLOAT:
        return open_float(options.model, wanted)
    return open_predictor(Path(options.compare), Options(**{**vars(wanted), "runtime": None}))


@dataclass
class Result:
    """What was found so far: COCO images and annotations, and how many boxes of a second model found a partner."""

    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    matched: int = 0
    theirs: int = 0
    order: Tensor | None = None  # class of the first model for each class of the second


def predict(
    model: Predictor, source: Source, folder: Path, other: Predictor | None, confidence: float
) -> dict[str, Any]:
    """Detect in every picture, draw and write; returns the content of detections.json.

    Args:
        model: what detects.
        source: the pictures.
        folder: where results go.
        other: a second model, drawn to the left; the number of boxes that match is counted.
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
        info |= {"compared_with": other.label, "matched": result.matched, "their_detections": result.theirs}
        say(
            f"{result.matched} of them match one of the {result.theirs} detections of {other.label} (IoU >= 0.5, same "
            "class)"
        )
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
    result.theirs += len(reference.boxes)
    return join_pictures([(other.label, paint(picture, reference, other.names)), (model.label, drawn)])


def partner_classes(model: Predictor, other: Predictor) -> Tensor | None:
    """The class of `model` for each class of `other`, by name; None where their order is the same, or one has no names.

    Raises:
        DataError: models of different classes.
    """
    if len(other.names) == len(model.names) and (is_unnamed(model.names) or is_unnamed(other.names)):
        return None
    positions = class_positions(other.names, model.names)
    if positions is None:
        raise DataError(
            f"{model.label} knows {len(model.names)} classes ({listing(model.names, 5)}), {other.label} "
            f"{len(other.names)} ({listing(other.names, 5)}); compare models of the same classes."
        )
    if positions == sorted(positions):
        return None
    say(f"classes of {other.label} are in another order: matched by name")
    return torch.tensor(positions)


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.predict", description="Draw what a model detects in your pictures."
    )
    parser.add_argument("model", type=Path, help="run directory, .onnx, .xml, .engine, or a float checkpoint")
    parser.add_argument("source", type=Path, help="image, folder of images, or video")
    parser.add_argument(
        "--runtime", choices=(TORCH, *RUNTIMES), help="default: the run's, or what the file was made for"
    )
    parser.add_argument(
        "--compare", metavar="float|MODEL", help="draw a second model beside it, count matching boxes"
    )
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder for results")
    parser.add_argument("--confidence", type=_share, default=0.25, help="lowest score drawn")
    parser.add_argument("--iou", type=_share, default=0.7, help="NMS threshold")
    parser.add_argument(
        "--size", type=_size, help="of the input, where the model leaves it open: PIXELS or HEIGHTxWIDTH"
    )
    parser.add_argument("--threads", type=_positive, help="CPU threads")
    parser.add_argument("--device", default="auto", help="where torch runs: auto, cpu, cuda")
    return parser


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not between 0 and 1")
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no positive number")
    return int(text)


def _size(text: str) -> ImageSize:
    size = size_argument(text)
    if any(side % 32 for side in size):
        raise argparse.ArgumentTypeError(f"'{text}' is no multiple of 32")
    return size


if __name__ == "__main__":
    sys.exit(main())
