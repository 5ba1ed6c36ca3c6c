"""Which detections are right, image by image, under the COCO rules: what AP of other sets of the same images needs.

The metric libraries give these matches as Python objects, which takes minutes for a thousand images. The rules: in
each image and class the 100 detections with the highest scores are matched in turn, for each IoU threshold. A detection
takes the free object with the highest IoU that reaches the threshold. Without such an object it may lie in a crowd
region, which any number of detections share; it is then neither right nor wrong.

Legend: T IoU thresholds, M detections, G objects and crowd regions, I images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

THRESHOLDS = np.linspace(0.5, 0.95, 10)
MOST_DETECTIONS = 100  # of an image and class

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
Overlap = Callable[[Integers, Integers], Floats]


@dataclass(frozen=True)
class ClassMatches:
    """Detections and objects of one class, by falling score.

    Attributes:
        images: [M] index of the image, 0 to I - 1.
        hits: [T, M] whether a detection is right, at each IoU threshold.
        ignored: [T, M] whether it is neither right nor wrong, as in a crowd region.
        objects: [I] number of objects per image; crowd regions are not counted.
    """

    images: Integers
    hits: Flags
    ignored: Flags
    objects: Integers


@dataclass(frozen=True)
class Entries:
    """Where detections or objects are: `images` [N], 0 to I - 1 (others are left out), and their `classes` [N]."""

    images: Integers
    classes: Integers


def match_classes(
    found: Entries,
    scores: Floats,
    truth: Entries,
    crowd: Flags,
    classes: Sequence[int],
    num_images: int,
    overlap: Overlap,
) -> list[ClassMatches]:
    """Match all detections of a set.

    Args:
        found: M detections.
        scores: [M].
        truth: G objects and crowd regions.
        crowd: [G] which of them are crowd regions.
        classes: for which to give matches, in this order.
        num_images: I.
        overlap: indices of m detections and g objects of one image -> IoU [m, g], for crowd regions the share of the
            detection inside.
    """
    return [
        _match_class(
            _by_image(found, label, num_images), scores, _by_image(truth, label, num_images), crowd, overlap
        )
        for label in classes
    ]


def _by_image(entries: Entries, label: int, num_images: int) -> list[Integers]:
    """Indices of a class's entries, per image."""
    rows = np.flatnonzero((entries.classes == label) & (entries.images >= 0))
    rows = rows[np.argsort(entries.images[rows], kind="stable")]
    return np.split(rows, np.searchsorted(entries.images[rows], np.arange(1, num_images)))


def _match_class(
    found: Sequence[Integers], scores: Floats, truth: Sequence[Integers], crowd: Flags, overlap: Overlap
) -> ClassMatches:
    chosen = [rows[np.argsort(-scores[rows], kind="stable")][:MOST_DETECTIONS] for rows in found]
    sizes = [len(rows) for rows in chosen]
    hits, ignored = np.zeros((2, len(THRESHOLDS), sum(sizes)), bool)
    starts = np.cumsum([0, *sizes])
    for start, rows, objects in zip(starts, chosen, truth, strict=False):
        if len(rows) and len(objects):
            part = slice(start, start + len(rows))
            hits[:, part], ignored[:, part] = _match_image(overlap(rows, objects), crowd[objects])
    order = np.argsort(-scores[np.concatenate(chosen)], kind="stable")
    return ClassMatches(
        np.repeat(np.arange(len(sizes)), sizes)[order],
        hits[:, order],
        ignored[:, order],
        np.array([int((~crowd[objects]).sum()) for objects in truth], np.int64),
    )


def _match_image(overlaps: Floats, crowd: Flags) -> tuple[Flags, Flags]:
    """Hits and ignored detections [T, m] of one image and class; `overlaps` [m, g] by descending score."""
    overlaps = np.asarray(overlaps, np.float64).reshape(-1, len(crowd))
    hits, ignored = np.zeros((2, len(THRESHOLDS), len(overlaps)), bool)
    free = np.tile(~crowd, (len(THRESHOLDS), 1))
    limits = np.minimum(THRESHOLDS, 1 - 1e-10)
    every = np.arange(len(THRESHOLDS))
    last = len(crowd) - 1
    for index in np.flatnonzero(overlaps.max(axis=1) >= limits[0]):
        line = overlaps[index]
        open_to = np.where(free, line, -1.0)
        best = last - open_to[:, ::-1].argmax(axis=1)  # the last of equal ones, as pycocotools takes it
        right = open_to[every, best] >= limits
        hits[right, index] = True
        free[every[right], best[right]] = False
        if crowd.any():
            ignored[:, index] = ~right & (line[crowd].max() >= limits)
    return hits, ignored
