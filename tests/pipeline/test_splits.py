"""Batches of a run's splits: how many there are when a run is told to use few images."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from configs.data_schema import DataConfig
from core.errors import DataError
from data import generate_synthetic
from models import SegmentTargets
from pipeline.splits import Splits, targets_of


def write_yolo(root: Path, names: tuple[str, ...] = ("cat", "dog")) -> Path:
    """A tree of two images in each split, each with one object of every class."""
    for split in ("train", "val"):
        for name in ("a", "b"):
            for kind in ("images", "labels"):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(root / f"images/{split}/{name}.jpg"), np.zeros((40, 60, 3), np.uint8))
            lines = [f"{label} 0.5 0.5 {0.2 + 0.1 * label} 0.2" for label in range(len(names))]
            (root / f"labels/{split}/{name}.txt").write_text("\n".join(lines))
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {list(names)}\n")
    return root


@pytest.mark.parametrize(
    ("limit", "batch_size", "sizes"),
    [
        (4, 16, [4]),  # fewer than a batch
        (1, 16, [1]),
        (20, 16, [16, 4]),  # between one batch and two: nothing is left out
        (40, 16, [16, 16]),  # two full batches: the rest is
        (None, 16, [16, 16]),
        (100, 16, [16, 16]),  # more than there are
        (None, 64, [40]),
    ],
)
def test_any_limit_makes_batches(
    tmp_path: Path, limit: int | None, batch_size: int, sizes: list[int]
) -> None:
    root = generate_synthetic(tmp_path / "set", 40, 2, 64, 0)
    config = DataConfig(root=str(root), image_size=64, workers=0, limit_train=limit, cache_dir=None)
    splits = Splits(config, "detect", torch.device("cpu"))
    loader = splits.train_batches(batch_size, None)
    assert [len(batch) for batch in loader] == sizes
    assert len(loader) == len(sizes)


def test_a_changed_crowd_flag_or_area_is_other_data(tmp_path: Path) -> None:
    """Figures depend on them, so a resumed run must not take the old ones."""
    root = generate_synthetic(tmp_path / "set", 1, 2, 64, 0)
    file = root / "annotations/instances_val.json"
    content = json.loads(file.read_text())
    seen = set()
    for change in ({}, {"iscrowd": 1}, {"area": 3.5}):
        annotations = [{**content["annotations"][0], **change}, *content["annotations"][1:]]
        file.write_text(json.dumps({**content, "annotations": annotations}))
        config = DataConfig(root=str(root), workers=0, cache_dir=None)
        seen.add(Splits(config, "detect", torch.device("cpu")).digest("val"))
    assert len(seen) == 3


@pytest.mark.parametrize("first", ["train", "val"])
def test_images_that_are_in_both_splits_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], first: str
) -> None:
    root = write_yolo(tmp_path / "set")
    for source, number in (("images/val", 2), ("train.txt", 1), ("images/train", 0)):
        (root / "train.txt").write_text("images/train/a.jpg\nimages/val/b.jpg\n")
        (root / "data.yaml").write_text(f"train: {source}\nval: images/val\nnames: [cat, dog]\n")
        splits = Splits(DataConfig(root=str(root), workers=0, cache_dir=None), "detect", torch.device("cpu"))
        for name in (first, "train", "val"):
            getattr(splits, name)
        note = f"{number} of the 2 validation images are also training images."
        assert splits.notes == ([note] if number else [])
        assert capsys.readouterr().err.count(note) == bool(number)


def test_dangling_links_by_setting(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "set")
    (root / "images/val/gone.jpg").symlink_to("nowhere.jpg")
    config = DataConfig(root=str(root), workers=0, cache_dir=None)
    with pytest.raises(DataError, match=r"data\.dangling_links=skip"):
        Splits(config, "detect", torch.device("cpu")).val  # noqa: B018
    config.dangling_links = "skip"
    splits = Splits(config, "detect", torch.device("cpu"))
    assert len(splits.val) == 2


def test_targets_of_a_part_of_a_batch_are_those_of_a_batch_of_its_own(tmp_path: Path) -> None:
    """Images counted from 0, objects and masks in their order; compared with a loader of batches of that size."""
    root = generate_synthetic(tmp_path / "set", 6, 2, 64, 0)
    config = DataConfig(root=str(root), image_size=64, workers=0, cache_dir=None)
    splits = Splits(config, "segment", torch.device("cpu"))

    def batches(size: int) -> list[tuple[torch.Tensor, SegmentTargets]]:
        return list(splits.labelled(splits.letterboxed(splits.train, size, masks=True), "test"))

    ((_, whole),) = batches(6)
    for number, (_, part) in enumerate(batches(2)):
        found = targets_of(whole, 2 * number, 2 * number + 2)
        assert len(part.boxes) > 0
        assert torch.equal(found.boxes, part.boxes)
        assert torch.equal(found.masks, part.masks)
        assert torch.equal(targets_of(whole.boxes, 2 * number, 2 * number + 2), part.boxes)
