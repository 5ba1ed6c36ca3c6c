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
    run = _run_hotcoco if engine == "hotcoco" else _run_pycocotools
    precision = run(truth, detections, image_ids, masks)
    return np.asarray(precision, np.float64)[..., -1]


def average(precision: NDArray[np.float64]) -> float | None:
    """Mean over all entries that have ground truth, None where there are none."""
    present = precision[precision > -1]
    return float(present.mean()) if present.size else None


def _run_hotcoco(
    truth: dict[str, Any],
    detections: NDArray[np.float64],
    image_ids: list[int],
    masks: Sequence[Rle] | None,
) -> Any:
    hotcoco: Any = importlib.import_module("hotcoco")
    coco = hotcoco.COCO(truth)
    if masks is None:
        evaluation = hotcoco.COCOeval(coco, coco.load_res(detections), "bbox")
    else:
        evaluation = hotcoco.COCOeval(coco, coco.load_res(_as_results(detections, masks)), "segm")
    evaluation.params.imgIds = image_ids
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"]


def _run_pycocotools(
    truth: dict[str, Any],
    detections: NDArray[np.float64],
    image_ids: list[int],
    masks: Sequence[Rle] | None,
) -> Any:
    coco_module, eval_module = _import_pycocotools()
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
        evaluation = eval_module.COCOeval(coco, found, "bbox" if masks is None else "segm")
        evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"]


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


def _import_pycocotools() -> tuple[ModuleType, ModuleType]:
    try:
        from pycocotools import coco, cocoeval
    except ImportError as error:
        raise ImportError(
            "pycocotools is needed for COCO metrics. Install it with: pip install pycocotools"
        ) from error
    return coco, cocoeval
