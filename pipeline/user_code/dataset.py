"""Your own dataset: what `data.factory` returns, and its checks.

    def open_split(split: str) -> data.Dataset

The factory is called with `data.train_split` and `data.val_split`. What it returns needs no base class: `names`,
`ids`, `len()` and items that are `data.Sample`s are enough (see `data.Dataset`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from core.errors import DataError
from core.names import listing
from data import Dataset, Sample
from pipeline.user_code.factories import call_user, load_factory

SETTING = "data.factory"
MEMBERS = ("names", "ids", "__len__", "__getitem__")


def open_own(reference: str, split: str) -> Dataset:
    """Open a split through the user's factory and look at its first item.

    Raises:
        ConfigError: the factory is not there or fails.
        DataError: what it returns is not a dataset, is empty, or its first item is not as `Sample` says.
    """
    factory = load_factory(SETTING, reference)
    dataset = call_user(SETTING, reference, f"the call for split {split!r}", factory, split)
    prefix = f"{SETTING}={reference}, split {split!r}: "
    if not isinstance(dataset, Dataset):
        members = set(dir(dataset))
        lacking = ", ".join(name for name in MEMBERS if name not in members)
        raise DataError(f"{prefix}it returned a {type(dataset).__name__} without {lacking}; see data.Dataset")
    names, ids = list(dataset.names), list(dataset.ids)
    if not names or any(not isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise DataError(f"{prefix}names are {names[:6]}; expected at least one class name, each once")
    if not len(dataset) or len(ids) != len(dataset) or len(set(ids)) < len(ids):
        raise DataError(
            f"{prefix}{len(dataset)} items and {len(ids)} ids, {len(set(ids))} of them different; expected at least "
            "one image and a unique id for each"
        )
    odd = [value for value in ids if not _is_id(value)]
    if odd:
        raise DataError(
            f"{prefix}ids are {listing(map(repr, odd), 3)}; expected whole numbers from 0 to 2^63 - 1: number "
            "your images, and map their names in your own code"
        )
    sample = call_user(SETTING, reference, "reading item 0", dataset.__getitem__, 0)
    problem = _sample_problem(sample, len(names), ids[0])
    if problem:
        raise DataError(f"{prefix}item 0 {problem}; see data.Sample")
    return dataset


def _is_id(value: Any) -> bool:
    """Whether it is a whole number that int64 holds, and not one that went through a float."""
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return is_whole and 0 <= int(value) < 2**63


def _sample_problem(sample: Any, num_classes: int, image_id: int) -> str | None:
    """What is wrong with an item, in words; None where nothing is."""
    if not isinstance(sample, Sample):
        return f"is a {type(sample).__name__}, expected a data.Sample"
    image, boxes, labels = sample.image, sample.boxes, sample.labels
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        return f"has an image of {_describe(image)}, expected uint8 [H, W, 3]"
    if tuple(sample.size) != image.shape[:2]:
        return f"has size {sample.size}, its image {image.shape[:2]}"
    if not isinstance(boxes, np.ndarray) or boxes.ndim != 2 or boxes.shape[1] != 4:
        return f"has boxes of {_describe(boxes)}, expected float32 [N, 4]"
    if not isinstance(labels, np.ndarray) or labels.shape != (len(boxes),):
        return f"has labels of {_describe(labels)}, expected int64 [{len(boxes)}]"
    if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        return f"has labels from {labels.min()} to {labels.max()}, expected 0 to {num_classes - 1}"
    if bool((boxes[:, 2:] <= boxes[:, :2]).any()):
        return "has a box without area, expected x1 < x2 and y1 < y2 in pixels of the image"
    return None if sample.image_id == image_id else f"has image_id {sample.image_id}, ids say {image_id}"


def _describe(value: Any) -> str:
    return (
        f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
    )
