"""One evaluate function for torch models and for every engine.

It takes a function from images to detections, so that a row of the result table differs from another only in what
that function runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import DataError
from core.operating_point import Agreement, OperatingPoint
from data.dataset import ground_truth
from data.masks import Rle
from data.metrics.coco import average, choose_engine, coco_matches, coco_precision
from data.metrics.detections import Detections, Predict, collect
from data.metrics.operating_point import agreement, operating_point
from data.metrics.precision_recall import Boxes, best_f1
from data.metrics.resampling import draw_images, resample_ap
from data.samples import Batch, Dataset


@dataclass(frozen=True)
class DetectionMetrics:
    """Accuracy of a detector on one split. All figures are shares from 0 to 1.

    Attributes:
        ap: COCO AP, mean over IoU 0.50 to 0.95 and classes, at most 100 detections per image.
        ap50: at IoU 0.50.
        ap75: at IoU 0.75.
        ap_small: AP of objects below 32 x 32 pixels of the original image; None where the split has none.
        ap_medium: of objects between.
        ap_large: of objects above 96 x 96 pixels.
        precision: at `confidence` and IoU 0.5, mean over classes.
        recall: likewise.
        confidence: score threshold with the best F1.
        per_class_ap: AP by class name; classes without an object in the split are absent.
        images: number of images evaluated.
        engine: library that computed the APs.
        ap_mask: COCO AP of the masks (`segm`), mean over IoU 0.50 to 0.95 and classes; None for a detector without
            masks, as the three below.
        ap50_mask: at IoU 0.50.
        ap75_mask: at IoU 0.75.
        per_class_ap_mask: mask AP by class name; None without masks.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    precision: float
    recall: float
    confidence: float
    per_class_ap: dict[str, float]
    images: int
    engine: str = "pycocotools"
    ap_mask: float | None = None
    ap50_mask: float | None = None
    ap75_mask: float | None = None
    per_class_ap_mask: dict[str, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; figures of masks only where there are masks."""
        values = asdict(self)
        if self.ap_mask is None:
            values = {name: value for name, value in values.items() if not name.endswith("_mask")}
        return values


def evaluate(
    predict: Predict,
    batches: Iterable[Batch],
    dataset: Dataset | Mapping[str, Any],
    engine: str = "hotcoco",
    device: torch.device | str = "cpu",
) -> DetectionMetrics:
    """Measure a detector on all images of `batches`.

    Args:
        predict: takes images float32 [B, 3, H, W], RGB, 0 to 1, on `device`; returns for each image detections [N, 6]:
            x1 y1 x2 y2 in input pixels, score, class; or `Instances`, for all images alike, whose masks are measured
            too.
        batches: letterboxed batches of the dataset, as from `build_loader` without augmentation.
        dataset: the dataset, or the dictionary that `ground_truth` made of it.
        engine: `hotcoco`, or `pycocotools` for the reference implementation.
        device: where images are put.

    Returns:
        Metrics over the images that were seen; with a limited loader that is a part of the dataset.

    Raises:
        DataError: no batch, no object in the images seen, or an image that is not in the dataset.
    """
    found = collect(predict, batches, device)
    return compute_metrics(found.rows, found.image_ids, dataset, engine, found.masks)


def measure_operating_point(
    found: Detections, truth: Mapping[str, Any], confidence: float, reference: Detections | None = None
) -> OperatingPoint:
    """A detector at a confidence threshold, by boxes; see `core.operating_point`.

    Args:
        found: what it found.
        truth: the dictionary that `ground_truth` made of the dataset.
        confidence: scores must be greater, 0..1.
        reference: what the float model found in the same images; None leaves agreement out.

    Raises:
        DataError: the two did not look at the same images.
    """
    number_of = _numbers(found.image_ids)
    if reference is not None and set(reference.image_ids) != set(number_of):
        raise DataError(
            f"{len(number_of)} images are compared with {len(set(reference.image_ids))} other ones: measure both "
            "models on the same images."
        )
    annotations = _numbered(truth, number_of)["annotations"]
    names = [category["name"] for category in truth["categories"]]
    other = None if reference is None else reference.boxes(number_of)
    return operating_point(found.boxes(number_of), _truth(annotations), names, confidence, other)


def measure_agreement(
    found: Detections, reference: Detections, num_classes: int, confidence: float
) -> Agreement:
    """How many of a reference's detections above a confidence a model finds again in the same images."""
    number_of = _numbers(found.image_ids)
    return agreement(found.boxes(number_of), reference.boxes(number_of), num_classes, confidence)[None]


def compute_metrics(
    detections: Sequence[NDArray[np.float64]],
    image_ids: Sequence[int],
    dataset: Dataset | Mapping[str, Any],
    engine: str = "hotcoco",
    masks: Sequence[Rle] | None = None,
) -> DetectionMetrics:
    """Metrics of detections that are already there.

    Image ids are looked up here, and become numbers from 1: the metric's libraries keep them in float64 arrays.

    Args:
        detections: [N, 6] for each image: x1 y1 x2 y2 in pixels of the original image, score, class index.
        image_ids: of the images, in that order; also those without detections.
        dataset: the dataset, or the dictionary that `ground_truth` made of it.
        engine: as in `evaluate`.
        masks: one per detection, image by image, in pixels of the original image; None for boxes only.

    Raises:
        DataError: no image; see `evaluate`; or masks are to be measured and the dataset was opened without them.
    """
    if not image_ids:
        raise DataError("There was no batch to evaluate; the loader needs at least one image.")
    engine = choose_engine(engine)
    coco = _as_coco(detections, image_ids, dataset, masks)
    annotations, names = (
        coco.truth["annotations"],
        [category["name"] for category in coco.truth["categories"]],
    )
    precision = coco_precision(coco.truth, coco.rows, coco.ids, engine)
    point = best_f1(coco.boxes, _truth(annotations))
    per_class = {name: average(precision[:, :, index, 0]) for index, name in enumerate(names)}
    mask_figures: dict[str, Any] = {}
    if masks is not None:
        mask_figures = _mask_figures(coco_precision(coco.truth, coco.rows, coco.ids, engine, masks), names)
    return DetectionMetrics(
        ap=average(precision[..., 0]) or 0.0,
        ap50=average(precision[0, ..., 0]) or 0.0,
        ap75=average(precision[5, ..., 0]) or 0.0,
        ap_small=average(precision[..., 1]),
        ap_medium=average(precision[..., 2]),
        ap_large=average(precision[..., 3]),
        precision=point.precision,
        recall=point.recall,
        confidence=point.confidence,
        per_class_ap={name: value for name, value in per_class.items() if value is not None},
        images=len(coco.ids),
        engine=engine,
        **mask_figures,
    )


def resample_score(
    found: Detections, dataset: Dataset | Mapping[str, Any], engine: str = "hotcoco"
) -> tuple[float, ...]:
    """AP, or mask AP where there are masks, on `core.intervals.NUM_DRAWS` draws of the images with replacement.

    The draws depend only on the number of images: those of two detectors on the same images are paired. A draw
    without any object is NaN. Arguments and errors as for `compute_metrics`.
    """
    coco = _as_coco(found.rows, found.image_ids, dataset, found.masks)
    classes = coco_matches(coco.truth, coco.rows, coco.ids, choose_engine(engine), found.masks)
    draws = resample_ap(classes, draw_images(len(coco.ids)))
    return tuple(round(float(value), 6) for value in draws)


@dataclass(frozen=True)
class _Coco:
    """Detections and ground truth in the form of the metric's libraries."""

    truth: dict[str, Any]
    rows: NDArray[np.float64]
    ids: list[int]
    boxes: Boxes


def _as_coco(
    detections: Sequence[NDArray[np.float64]],
    image_ids: Sequence[int],
    dataset: Dataset | Mapping[str, Any],
    masks: Sequence[Rle] | None,
) -> _Coco:
    truth = dict(dataset) if isinstance(dataset, Mapping) else ground_truth(dataset)
    unknown = set(image_ids) - {image["id"] for image in truth["images"]}
    if unknown:
        raise DataError(
            f"Image ids {sorted(unknown)[:10]} were evaluated but are not in the dataset: wrong split?"
        )
    number_of = _numbers(image_ids)
    found = np.concatenate([np.zeros((0, 6)), *detections])
    if not np.isfinite(found).all():
        raise DataError("Some detections are NaN or infinite: the network diverged, or its engine is broken.")
    boxes = Detections(detections, image_ids).boxes(number_of)
    truth = _numbered(truth, number_of)
    annotations = truth["annotations"]
    if all(entry["iscrowd"] for entry in annotations):
        raise DataError(
            f"No object in the {len(number_of)} images evaluated: nothing to measure. Raise the limit."
        )
    sides = found[:, 2:4] - found[:, :2]
    rows = np.concatenate(
        [boxes.images[:, None], found[:, :2], sides, found[:, 4:5], found[:, 5:6] + 1], axis=1
    )
    if masks is not None and any("segmentation" not in entry for entry in annotations):
        raise DataError(
            "Masks were predicted, and the dataset has none to compare with: open it with segments=True, or give "
            "its samples `segments`."
        )
    return _Coco(truth, rows, list(number_of.values()), boxes)


def _mask_figures(precision: NDArray[np.float64], names: list[str]) -> dict[str, Any]:
    per_class = {name: average(precision[:, :, index, 0]) for index, name in enumerate(names)}
    return {
        "ap_mask": average(precision[..., 0]) or 0.0,
        "ap50_mask": average(precision[0, ..., 0]) or 0.0,
        "ap75_mask": average(precision[5, ..., 0]) or 0.0,
        "per_class_ap_mask": {name: value for name, value in per_class.items() if value is not None},
    }


def _numbers(image_ids: Sequence[int]) -> dict[int, int]:
    """Image ids -> numbers from 1, in their order."""
    return {image_id: number for number, image_id in enumerate(sorted(set(image_ids)), 1)}


def _numbered(truth: Mapping[str, Any], number_of: Mapping[int, int]) -> dict[str, Any]:
    """The images of a COCO dictionary that have a number, with their annotations, under numbers instead of ids."""
    images = [
        {**image, "id": number_of[image["id"]]} for image in truth["images"] if image["id"] in number_of
    ]
    chosen = [entry for entry in truth["annotations"] if entry["image_id"] in number_of]
    annotations = [
        {**entry, "id": number, "image_id": number_of[entry["image_id"]]}
        for number, entry in enumerate(chosen, 1)
    ]
    return {**truth, "images": images, "annotations": annotations}


def _truth(annotations: list[dict[str, Any]]) -> Boxes:
    boxes = np.array([entry["bbox"] for entry in annotations], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Boxes(
        boxes=boxes,
        images=np.array([entry["image_id"] for entry in annotations], np.int64),
        labels=np.array([entry["category_id"] - 1 for entry in annotations], np.int64),
        values=np.array([entry["iscrowd"] for entry in annotations], np.float64),
    )
