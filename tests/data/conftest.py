"""Small datasets on disk, written by hand so that the expected values are known."""

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

WriteImage = Callable[..., Path]


def _write_image(path: Path, height: int = 40, width: int = 60, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    assert cv2.imwrite(str(path), pixels)
    return path


@pytest.fixture
def write_image() -> WriteImage:
    """Write an image of noise: path, height, width, seed."""
    return _write_image


@pytest.fixture
def yolo_root(tmp_path: Path) -> Path:
    """Two training images (60x40), one validation image, classes cat and dog."""
    root = tmp_path / "yolo"
    for split, stems in (("train", ("a", "b")), ("val", ("c",))):
        for stem in stems:
            _write_image(root / "images" / split / f"{stem}.jpg")
            label = root / "labels" / split / f"{stem}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("0 0.5 0.5 0.5 0.25\n1 0.25 0.25 0.1 0.2\n")
    (root / "data.yaml").write_text(
        "path: .\ntrain: images/train\nval: images/val\nnames: {0: cat, 1: dog}\n"
    )
    return root


@pytest.fixture
def coco_content() -> dict:
    """Category ids with gaps and out of order, one crowd region, an area that is not the box area."""
    return {
        "images": [
            {"id": 7, "file_name": "b.jpg", "height": 40, "width": 60},
            {"id": 3, "file_name": "a.jpg", "height": 40, "width": 60},
        ],
        "categories": [{"id": 90, "name": "dog"}, {"id": 5, "name": "cat"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 7,
                "category_id": 90,
                "bbox": [1.5, 2, 10, 20],
                "area": 150.0,
                "iscrowd": 0,
            },
            {"id": 2, "image_id": 7, "category_id": 5, "bbox": [30, 5, 20, 30], "area": 600.0, "iscrowd": 1},
            {"id": 9, "image_id": 3, "category_id": 5, "bbox": [0, 0, 60, 40], "area": 2400.0, "iscrowd": 0},
        ],
    }


@pytest.fixture
def coco_root(tmp_path: Path, coco_content: dict) -> Path:
    root = tmp_path / "coco"
    for stem in ("a", "b"):
        _write_image(root / "images" / "val2017" / f"{stem}.jpg")
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(coco_content))
    return root
