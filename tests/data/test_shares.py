"""Detections of several processes, put together in the order of one."""

from __future__ import annotations

import numpy as np
import pytest

from data import Detections, join_shares

SEED = 5


def found(count: int, masks: bool) -> Detections:
    """Detections in `count` images, up to three in each; a mask is its image's and its own number."""
    random = np.random.default_rng(SEED)
    rows = [random.random((int(random.integers(0, 4)), 6)) for _ in range(count)]
    codes = [{"image": i, "number": n} for i, image in enumerate(rows) for n in range(len(image))]
    return Detections(rows, [7 * i + 3 for i in range(count)], codes if masks else None)  # type: ignore[arg-type]


def share_of(whole: Detections, rank: int, size: int, batch: int) -> Detections:
    """What one process finds that takes every `size`-th batch."""
    chosen = [i for i in range(len(whole.image_ids)) if i // batch % size == rank]
    masks = None if whole.masks is None else [code for code in whole.masks if code["image"] in chosen]
    return Detections([whole.rows[i] for i in chosen], [whole.image_ids[i] for i in chosen], masks)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("count", [1, 4, 11, 24])
@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_joined_shares_are_the_whole(size: int, count: int, masks: bool) -> None:
    whole = found(count, masks)
    joined = join_shares([share_of(whole, rank, size, 4) for rank in range(size)], 4)
    assert joined.image_ids == whole.image_ids
    assert all(np.array_equal(a, b) for a, b in zip(joined.rows, whole.rows, strict=True))
    assert joined.masks == whole.masks
