"""AP on images drawn with replacement (bootstrap), from matches that are made once.

Detections are matched with objects within one image, so a draw that holds an image twice holds its matches twice.
A draw is therefore a weight per image, and its precision and recall are weighted sums: exactly the COCO figures of the
drawn set, without matching again.

Legend: D draws, I images, M detections of a class, H of them right at one IoU threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from core.intervals import NUM_DRAWS
from data.metrics.matching import ClassMatches

SEED = 0  # the same draws for every row of a run, so that differences are paired
NUM_RECALLS = 101  # of the COCO protocol: 0, 0.01, ... 1
_MOST_CELLS = 8_000_000  # of a matrix [detections, draws]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def draw_images(num_images: int, num_draws: int = NUM_DRAWS, seed: int = SEED) -> Integers:
    """How often each image occurs in each draw: [D, I], rows sum to I."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_images, np.full(num_images, 1 / num_images), num_draws)


def resample_ap(classes: Sequence[ClassMatches], weights: Integers) -> Floats:
    """AP over all IoU thresholds and classes for each draw.

    Args:
        classes: matches by class.
        weights: [D, I], as from `draw_images`.

    Returns:
        [D], 0..1. As in the COCO protocol a class without an object in a draw does not count there; NaN for a draw
        without any object.
    """
    by_image = np.ascontiguousarray(
        weights.T.astype(np.int32)
    )  # [I, D]: all draws of an image lie side by side
    sums, counts = np.zeros((2, len(weights)))
    for matches in classes:
        num_objects = matches.objects @ by_image
        present = num_objects > 0
        for part in _parts(len(weights), len(matches.images)):
            sums[part] += np.where(present[part], _class_ap(matches, by_image[:, part], num_objects[part]), 0)
        counts += present
    with np.errstate(invalid="ignore"):
        return np.asarray(sums / counts, np.float64)


def _parts(num_draws: int, num_detections: int) -> Iterator[slice]:
    step = max(1, _MOST_CELLS // max(num_detections, 1))
    return (slice(start, start + step) for start in range(0, num_draws, step))


def _class_ap(matches: ClassMatches, by_image: NDArray[np.int32], num_objects: Integers) -> Floats:
    """AP of one class, mean over the IoU thresholds: [D]."""
    drawn = by_image[matches.images]  # [M, D]
    seen = drawn.cumsum(axis=0, dtype=np.int32)
    total = np.zeros(drawn.shape[1])
    for hits, ignored in zip(matches.hits, matches.ignored, strict=True):
        right = np.flatnonzero(hits)
        if not len(right):
            continue
        counted = seen[right]
        if ignored.any():
            counted = counted - np.where(ignored[:, None], drawn, 0).cumsum(axis=0)[right]
        total += _average_precision(drawn[right].cumsum(axis=0), counted, num_objects)
    return total / max(len(matches.hits), 1)  # no detection: AP 0


def _average_precision(right: Integers, counted: Integers, num_objects: Integers) -> Floats:
    """Mean interpolated precision at 101 recalls: [D].

    The precision at a recall is the highest at this recall or a greater one. Each right detection therefore stands for
    the recalls that it is the first to reach.

    Args:
        right: [H, D] right detections up to and including each right one.
        counted: [H, D] all detections up to there, without the ignored ones.
        num_objects: [D].
    """
    precision = right / np.maximum(counted, 1)
    envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    reached = _count_recalls(right / np.maximum(num_objects, 1))
    first = np.diff(reached, axis=0, prepend=0)
    return np.asarray((envelope * first).sum(axis=0) / NUM_RECALLS, np.float64)


def _count_recalls(recall: Floats) -> Integers:
    """How many of the 101 recalls 0, 0.01, ... 1 are reached, compared as the protocol compares them."""
    wanted = np.append(np.linspace(0, 1, NUM_RECALLS), np.inf)
    count = (recall * (NUM_RECALLS - 1)).astype(np.int64)  # may be off by one where a product is rounded
    count += wanted[count + 1] <= recall
    count -= wanted[count] > recall
    return np.asarray(count + 1, np.int64)
