"""The operating point of a detector: right and wrong detections above one threshold, and agreement with another model.

Everything is counted, nothing is interpolated, and all classes are pooled for the overall figures: each object and each
detection counts once, as users count them. Objects and detections are matched as for the best F1 (`precision_recall`),
which does not depend on the threshold: a detection that is right stays right when worse ones are left out.

Legend: M detections, G ground-truth boxes, R detections of the model that is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from core.operating_point import AGREEMENT_IOU, Agreement, OperatingPoint, PointFigures
from data.metrics.precision_recall import Boxes, Floats, assign, match

NUM_STEPS = 100  # of the confidence axis of the F1 curve


def operating_point(
    found: Boxes, truth: Boxes, names: Sequence[str], confidence: float, reference: Boxes | None = None
) -> OperatingPoint:
    """Precision, recall and F1 at a confidence threshold, and agreement with another model's detections.

    Args:
        found: M detections, also those below the threshold.
        truth: G objects and crowd regions.
        names: class names by index; a class is listed if it occurs in any of the three sets.
        confidence: scores must be greater, 0..1.
        reference: detections of the model to compare with, on the same images; None leaves agreement out.
    """
    correct, ignored = match(found, truth)
    counted, objects = ~ignored, truth.values == 0
    curve = _f1_curve(found.values[counted], correct[counted], int(objects.sum()))
    figures: dict[int | None, PointFigures] = {}
    for label in (None, *range(len(names))):
        mine = counted & (found.values > confidence) & _of(found, label)
        figures[label] = _figures(
            int((correct & mine).sum()), int(mine.sum()), int((objects & _of(truth, label)).sum())
        )
    if reference is not None:
        agreements = agreement(found, reference, len(names), confidence)
        figures = {label: replace(part, agreement=agreements[label]) for label, part in figures.items()}
    return OperatingPoint(
        confidence=confidence,
        overall=figures[None],
        classes={name: figures[label] for label, name in enumerate(names) if _occurs(figures[label])},
        f1_curve=tuple(round(float(value), 6) for value in curve),
        best_confidence=int(np.argmax(curve)) / NUM_STEPS,
    )


def agreement(
    found: Boxes, reference: Boxes, num_classes: int, confidence: float
) -> dict[int | None, Agreement]:
    """How many of another model's detections are found again, and what their scores have become.

    Args:
        found: M detections, also those below the threshold.
        reference: R detections of the other model on the same images.
        num_classes: K.
        confidence: scores of both must be greater, 0..1.

    Returns:
        Of all classes together under None, and by class index.
    """
    wanted = _select(reference, reference.values > confidence)
    objects = replace(wanted, values=np.zeros(len(wanted.labels)))  # none of them is a crowd region
    shown = found.values > confidence
    partners = assign(_select(found, shown), objects, AGREEMENT_IOU)[0]
    anywhere = assign(found, objects, AGREEMENT_IOU)[0]
    matched, known = np.zeros((2, len(wanted.labels)), bool)
    mine = partners >= 0
    matched[partners[mine]] = True
    known[anywhere[anywhere >= 0]] = True
    shifts = np.zeros(len(wanted.labels))
    shifts[partners[mine]] = found.values[shown][mine] - wanted.values[partners[mine]]
    results: dict[int | None, Agreement] = {}
    for label in (None, *range(num_classes)):
        rows = _of(wanted, label)
        total, again = int(rows.sum()), rows & matched
        results[label] = Agreement(
            reference=total,
            matched=float(again.sum() / total) if total else None,
            faded=float((rows & known & ~matched).sum() / total) if total else None,
            score_shift=float(shifts[again].mean()) if again.any() else None,
            score_change=float(np.abs(shifts[again]).mean()) if again.any() else None,
        )
    return results


def _occurs(figures: PointFigures) -> bool:
    reference = 0 if figures.agreement is None else figures.agreement.reference
    return bool(figures.objects or figures.detections or reference)


def _of(boxes: Boxes, label: int | None) -> NDArray[np.bool_]:
    """Boxes of a class, or all of them."""
    return np.ones(len(boxes.labels), bool) if label is None else boxes.labels == label


def _figures(right: int, detections: int, objects: int) -> PointFigures:
    return PointFigures(
        objects,
        detections,
        precision=right / detections if detections else None,
        recall=right / objects if objects else None,
        f1=2 * right / (detections + objects) if detections + objects else None,
    )


def _f1_curve(scores: Floats, correct: NDArray[np.bool_], objects: int) -> Floats:
    """F1 at the thresholds 0, 0.01, ... 1: [NUM_STEPS + 1]."""
    axis = np.arange(NUM_STEPS + 1) / NUM_STEPS
    all_scores, right_scores = np.sort(scores), np.sort(scores[correct])
    detections = len(all_scores) - np.searchsorted(all_scores, axis, side="right")
    right = len(right_scores) - np.searchsorted(right_scores, axis, side="right")
    return np.asarray(2 * right / np.maximum(detections + objects, 1), np.float64)


def _select(boxes: Boxes, rows: NDArray[np.bool_]) -> Boxes:
    return Boxes(boxes.boxes[rows], boxes.images[rows], boxes.labels[rows], boxes.values[rows])
