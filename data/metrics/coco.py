"""Runs the COCO protocol with one of two libraries that give the same numbers.

pycocotools is the reference implementation. hotcoco (Rust) is about a hundred times as fast, and a test holds the
two equal. Only the precision array is taken from either: the averages are made here, once, by the same code.
"""

import contextlib
import importlib
import importlib.util
import io
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.masks import Rle
from data.metrics.matching import ClassMatches, Entries, match_classes

ENGINES = ("hotcoco", "pycocotools")

_log = logging.getLogger(__name__)


def choose_engine(engine: str) -> str:
    """The engine that will run: `engine`, or pycocotools with a warning where hotcoco is not installed.

    Raises:
        ValueError: not one of `ENGINES`.
    """
    if engine not in ENGINES:
        raise ValueError(f"Unknown metric engine {engine!r}: expected one of {', '.join(ENGINES)}.")
    if engine == "hotcoco" and importlib.util.find_spec("hotcoco") is None:
        _log.warning(
            "hotcoco is not installed: pycocotools computes the same figures, more slowly. "
            "Install it with: pip install hotcoco"
        )
        return "pycocotools"
    return engine


def coco_precision(
    truth: dict[str, Any],
    detections: NDArray[np.float64],
    image_ids: list[int],
    engine: str,
    masks: Sequence[Rle] | None = None,
) -> NDArray[np.float64]:
    """Interpolated precision of box detections, or of masks, under the standard COCO parameters.

    Args:
        truth: COCO dictionary, as from `ground_truth`.
        detections: [M, 7]: image id (below 2^53: the array is float64), x, y, width, height (pixels of the original
            image), score, category id.
        image_ids: images to evaluate; others are ignored.
        engine: one of `ENGINES`, as returned by `choose_engine`.
        masks: mask of each detection; the overlap is then that of the masks, and sizes are those of the masks. The
            annotations of `truth` need a `segmentation`.

    Returns:
        [10 IoU thresholds 0.50..0.95, 101 recalls, K categories, 4 area ranges (all, small, medium, large)] for at most
        100 detections per image and category; -1 where there is no ground truth.
    """
    evaluation = (_hotcoco if engine == "hotcoco" else _pycocotools)(truth, detections, masks)
    evaluation.params.imgIds = image_ids
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"], np.float64)[..., -1]


def coco_matches(
    truth: dict[str, Any],
    detections: NDArray[np.float64],
    image_ids: list[int],
    engine: str,
    masks: Sequence[Rle] | None = None,
) -> list[ClassMatches]:
    """Which detections are right at each IoU threshold, by category; arguments as for `coco_precision`."""
    library: Any = (
        importlib.import_module("hotcoco").mask if engine == "hotcoco" else _import_pycocotools()[2]
    )
    number_of = {image_id: number for number, image_id in enumerate(image_ids)}
    chosen = [entry for entry in truth["annotations"] if entry["image_id"] in number_of]
    shapes: Any = np.array([entry["bbox"] for entry in chosen], np.float64).reshape(-1, 4)
    found: Any = np.ascontiguousarray(detections[:, 1:5])
    if masks is not None:
        sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
        shapes = [_as_rle(library, entry["segmentation"], sizes[entry["image_id"]]) for entry in chosen]
        found = [mask["segmentation"] for mask in _as_results(detections, masks)]
    crowd = np.array([entry["iscrowd"] for entry in chosen], bool)

    def overlap(rows: NDArray[np.int64], objects: NDArray[np.int64]) -> Any:
        mine, theirs = (
            items[index] if masks is None else [items[i] for i in index]
            for items, index in ((found, rows), (shapes, objects))
        )
        return library.iou(mine, theirs, crowd[objects].astype(int).tolist())

    return match_classes(
        Entries(
            np.array([number_of.get(int(image), -1) for image in detections[:, 0]], np.int64),
            detections[:, 6].astype(np.int64),
        ),
        detections[:, 5],
        Entries(
            np.array([number_of[entry["image_id"]] for entry in chosen], np.int64),
            np.array([entry["category_id"] for entry in chosen], np.int64),
        ),
        crowd,
        [category["id"] for category in truth["categories"]],
        len(image_ids),
        overlap,
    )


def _as_rle(library: Any, segmentation: Any, size: tuple[int, int]) -> Any:
    """Polygons, or an uncompressed code, as a compressed run-length code."""
    if isinstance(segmentation, list):
        return library.merge(library.frPyObjects(segmentation, *size))
    return (
        library.frPyObjects(segmentation, *size) if isinstance(segmentation["counts"], list) else segmentation
    )


def average(precision: NDArray[np.float64]) -> float | None:
    """Mean over all entries that have ground truth, None where there are none."""
    present = precision[precision > -1]
    return float(present.mean()) if present.size else None


def _hotcoco(truth: dict[str, Any], detections: NDArray[np.float64], masks: Sequence[Rle] | None) -> Any:
    hotcoco: Any = importlib.import_module("hotcoco")
    coco = hotcoco.COCO(truth)
    if masks is None:
        return hotcoco.COCOeval(coco, coco.load_res(detections), "bbox")
    return hotcoco.COCOeval(coco, coco.load_res(_as_results(detections, masks)), "segm")


def _pycocotools(truth: dict[str, Any], detections: NDArray[np.float64], masks: Sequence[Rle] | None) -> Any:
    coco_module, eval_module, _ = _import_pycocotools()
    with contextlib.redirect_stdout(io.StringIO()):  # the library prints its progress
        coco = coco_module.COCO()
        coco.dataset = truth
        coco.createIndex()
        found = coco_module.COCO()
        if masks:
            found = coco.loadRes(_as_results(detections, masks))
        else:
            found.dataset = {**truth, "annotations": _as_annotations(detections)}
            found.createIndex()
        return eval_module.COCOeval(coco, found, "bbox" if masks is None else "segm")


def _as_annotations(detections: NDArray[np.float64]) -> list[dict[str, Any]]:
    return [
        {
            "id": number,
            "image_id": int(row[0]),
            "bbox": row[1:5],
            "area": row[3] * row[4],
            "score": row[5],
            "category_id": int(row[6]),
            "iscrowd": 0,
        }
        for number, row in enumerate(detections.tolist(), start=1)
    ]


def _as_results(detections: NDArray[np.float64], masks: Sequence[Rle]) -> list[dict[str, Any]]:
    """Results without boxes: both libraries then take the masks' areas for the size ranges."""
    return [
        {
            "image_id": int(row[0]),
            "category_id": int(row[6]),
            "score": row[5],
            "segmentation": {"size": list(mask.size), "counts": mask.counts.decode("ascii")},
        }
        for row, mask in zip(detections.tolist(), masks, strict=True)
    ]


def _import_pycocotools() -> tuple[ModuleType, ModuleType, ModuleType]:
    try:
        from pycocotools import coco, cocoeval, mask
    except ImportError as error:
        raise ImportError(
            "pycocotools is needed for COCO metrics. Install it with: pip install pycocotools"
        ) from error
    return coco, cocoeval, mask
