"""Hostile input: each test may take ten seconds of processor time, what the product promises for any file."""

import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

LIMIT = 10.0


@pytest.fixture(autouse=True)
def within_ten_seconds() -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < LIMIT


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A YOLO tree of three images of 60 x 40 pixels in each split, one object in each."""
    root = tmp_path / "tree"
    for split in ("train", "val"):
        for number in range(3):
            image = root / "images" / split / f"{number}.jpg"
            label = root / "labels" / split / f"{number}.txt"
            image.parent.mkdir(parents=True, exist_ok=True)
            label.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), np.uint8)
            assert cv2.imwrite(str(image), pixels)
            label.write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat, dog]\n")
    return root
