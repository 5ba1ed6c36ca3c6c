"""Ids of images, annotations and categories: exact up to 2^63 - 1, and never a figure that depends on them.

The oracle is the definition of AP: ground truth given back as detections scores 1, whatever the images are called.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import DataError
from data import Batch, Sample, build_loader, evaluate, ground_truth, open_dataset
from data.metrics.coco import ENGINES

LARGEST = 2**63 - 1
CAPTURE_TIME = 20250311142233000  # 17 digits: as float64, neighbours become one number


def write_set(root: Path, ids: list, write_image, annotation_ids: list | None = None, scale: int = 1) -> Path:
    """One image per id, each with one box at a place of its own; class k in image k, category ids times `scale`."""
    images, annotations = [], []
    for number, image_id in enumerate(ids):
        name = f"{number}.jpg"
        write_image(root / "images/val" / name, seed=number)
        images.append({"id": image_id, "file_name": name, "height": 40, "width": 60})
        annotations.append(
            {
                "id": (annotation_ids or range(len(ids)))[number],
                "image_id": image_id,
                "category_id": (number % 2 + 1) * scale,
                "bbox": [4 * number, 3 * number, 12, 10],
                "area": 120,
                "iscrowd": 0,
            }
        )
    categories = [{"id": scale, "name": "cat"}, {"id": 2 * scale, "name": "dog"}]
    (root / "annotations").mkdir(parents=True)
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations/instances_val.json").write_text(json.dumps(content))
    return root


def perfect(batches: list[Batch]):
    """Targets of the batches as detections of score 0.9."""
    queue = iter(batches)

    def predict(images: torch.Tensor) -> list[torch.Tensor]:
        targets = next(queue).targets
        rows = [targets[targets[:, 0] == number] for number in range(len(images))]
        return [torch.cat([row[:, 2:], torch.full((len(row), 1), 0.9), row[:, 1:2]], 1) for row in rows]

    return predict


def figures(dataset, engine: str = "hotcoco") -> tuple[float, float, float]:
    batches = list(build_loader(dataset, 64, 2))
    metrics = evaluate(perfect(batches), batches, dataset, engine)
    return metrics.ap, metrics.precision, metrics.recall


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "ids",
    [
        [CAPTURE_TIME + step for step in range(6)],
        [2**53 + step for step in range(6)],
        [LARGEST - step for step in range(6)],
        [0, 1, 2, 3, 4, 5],
    ],
)
def test_no_figure_depends_on_the_ids(tmp_path: Path, write_image, engine: str, ids: list[int]) -> None:
    dataset = open_dataset(write_set(tmp_path, ids, write_image), "val")
    assert figures(dataset, engine) == pytest.approx((1.0, 1.0, 1.0))
    assert list(dataset.ids) == sorted(ids)
    assert [entry["id"] for entry in ground_truth(dataset)["images"]] == sorted(ids)


@pytest.mark.parametrize("scale", [CAPTURE_TIME, LARGEST // 2])
def test_large_annotation_and_category_ids(tmp_path: Path, write_image, scale: int) -> None:
    numbers = [LARGEST - step for step in range(4)]
    dataset = open_dataset(write_set(tmp_path, [1, 2, 3, 4], write_image, numbers, scale), "val")
    assert figures(dataset) == pytest.approx((1.0, 1.0, 1.0))
    assert dataset.names == ("cat", "dog")


@pytest.mark.parametrize(
    "ids", [["cam0_17", "cam0_3", "cam1_17"], [2**63, 2**63 + 1, 2**70], [7, "7", "a"], [-5, 3, 4]]
)
def test_ids_that_are_no_such_number_are_replaced_and_said(
    tmp_path: Path, write_image, caplog: pytest.LogCaptureFixture, ids: list
) -> None:
    with caplog.at_level(logging.INFO):
        dataset = open_dataset(write_set(tmp_path, ids, write_image), "val")
    assert list(dataset.ids) == [1, 2, 3]
    assert [record.path.name for record in dataset.records] == ["0.jpg", "1.jpg", "2.jpg"]
    assert figures(dataset) == pytest.approx((1.0, 1.0, 1.0))
    assert "numbered 1 to 3 in the file's order" in caplog.text
    assert repr(ids[0]) in caplog.text or repr(ids[1]) in caplog.text


@pytest.mark.parametrize("image_id", [2.5, True, None, [1], float("nan"), 2.0**60])
def test_other_types_are_refused_with_their_place(tmp_path: Path, write_image, image_id: object) -> None:
    root = write_set(tmp_path, [1, image_id], write_image)
    with pytest.raises(DataError, match=r"instances_val\.json: images\[1\]: id is .*expected an integer"):
        open_dataset(root, "val")


def test_whole_numbers_as_floats_are_the_same_ids(tmp_path: Path, write_image) -> None:
    """Data frames write 3.0 for 3 where a column had an empty cell."""
    root = write_set(tmp_path, [1, 2, 3], write_image)
    file = root / "annotations/instances_val.json"
    content = json.loads(file.read_text())
    for entry in content["annotations"]:
        entry["image_id"] = float(entry["image_id"])
    file.write_text(json.dumps(content))
    assert figures(open_dataset(root, "val")) == pytest.approx((1.0, 1.0, 1.0))


class Own:
    """A user's dataset with given ids."""

    names = ("square",)

    def __init__(self, ids: list) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        x = 5 * index
        box = np.array([[x, x, x + 10, x + 12]], np.float32)
        return Sample(np.zeros((60, 60, 3), np.uint8), box, np.zeros(1, np.int64), self.ids[index], (60, 60))


def test_own_datasets_with_large_ids() -> None:
    assert figures(Own([CAPTURE_TIME + step for step in range(5)])) == pytest.approx((1.0, 1.0, 1.0))
