"""Reading YOLO trees and COCO JSON: what comes out of well-formed input."""

import hashlib
import json
import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data import ground_truth, list_images, open_dataset


def test_yolo_boxes_become_pixels(yolo_root: Path):
    dataset = open_dataset(yolo_root, "train")
    sample = dataset[0]
    assert dataset.names == ("cat", "dog")
    assert (len(dataset), list(dataset.ids)) == (2, [1, 2])
    assert sample.size == (40, 60) == sample.image.shape[:2]
    assert sample.image.dtype == np.uint8
    # centre (30, 20), 30 wide, 10 high; centre (15, 10), 6 wide, 8 high
    np.testing.assert_allclose(sample.boxes, [[15, 15, 45, 25], [12, 6, 18, 14]], atol=1e-4)
    assert sample.labels.tolist() == [0, 1]


def test_image_is_rgb(yolo_root: Path):
    blue_first = np.zeros((40, 60, 3), np.uint8)
    blue_first[..., 2] = 255  # OpenCV writes BGR: this is red
    cv2.imwrite(str(yolo_root / "images/val/c.png"), blue_first)
    (yolo_root / "images/val/c.jpg").unlink()
    assert open_dataset(yolo_root, "val")[0].image[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    "content",
    [
        "path: .\ntrain: images/train\nval: images/val\nnames: [cat, dog]\nnc: 2\n",
        "train: [images/train]\nval: images/val\nnames: {0: cat, 1: dog}\n",
        "train: train.txt\nval: images/val\nnames: {0: cat, 1: dog}\n",
    ],
)
def test_yaml_forms(yolo_root: Path, content: str):
    (yolo_root / "data.yaml").write_text(content)
    (yolo_root / "train.txt").write_text("./images/train/a.jpg\nimages/train/b.jpg\n")
    dataset = open_dataset(yolo_root / "data.yaml", "train")
    assert dataset.names == ("cat", "dog")
    assert [record.path.name for record in dataset.records] == ["a.jpg", "b.jpg"]
    assert len(dataset.records[0].labels) == 2


def test_outline_becomes_its_bounding_box(yolo_root: Path):
    (yolo_root / "labels/val/c.txt").write_text("1 0.1 0.5 0.3 0.25 0.2 0.75\n")
    sample = open_dataset(yolo_root, "val")[0]
    np.testing.assert_allclose(sample.boxes, [[6, 10, 18, 30]], atol=1e-4)


def test_image_without_label_file_has_no_objects(yolo_root: Path):
    (yolo_root / "labels/train/a.txt").unlink()
    assert len(open_dataset(yolo_root, "train")[0].labels) == 0


def test_coco_ids_with_gaps_and_crowds(coco_root: Path):
    dataset = open_dataset(coco_root, "val")
    assert dataset.names == ("cat", "dog")  # category 5 before 90
    assert list(dataset.ids) == [3, 7]
    sample = dataset[1]
    np.testing.assert_allclose(sample.boxes, [[1.5, 2, 11.5, 22], [30, 5, 50, 35]])
    assert sample.labels.tolist() == [1, 0]
    assert sample.crowd is not None
    assert sample.crowd.tolist() == [False, True]
    truth = ground_truth(dataset)
    assert [entry["iscrowd"] for entry in truth["annotations"]] == [0, 0, 1]
    assert [entry["area"] for entry in truth["annotations"]] == [2400.0, 150.0, 600.0]
    assert [entry["bbox"] for entry in truth["annotations"]][1] == [1.5, 2.0, 10.0, 20.0]
    assert [entry["id"] for entry in truth["annotations"]] == [1, 2, 3]  # an id of 0 would never match


def test_yaml_wins_over_json_where_both_are_there(yolo_root: Path, coco_content: dict):
    (yolo_root / "annotations").mkdir()
    (yolo_root / "annotations/instances_val.json").write_text(json.dumps(coco_content))
    assert open_dataset(yolo_root, "val").records[0].path.name == "c.jpg"
    with pytest.raises(ValueError, match=r"a\.jpg.*which is in none of"):
        open_dataset(yolo_root, "val", format="coco")


def test_both_formats_of_bccd_agree(shared_data: Path):
    root = shared_data / "data" / "bccd"
    for split, images, boxes in (("train", 205, 2804), ("val", 87, 1137)):  # as the set's README counts them
        yolo, coco = open_dataset(root, split), open_dataset(root, split, format="coco")
        assert yolo.names == coco.names == ("RBC", "WBC", "Platelets")
        assert len(yolo) == len(coco) == images
        assert sum(len(record.labels) for record in yolo.records) == boxes
        by_name = {record.path.name: record for record in coco.records}
        for record in yolo.records:
            other = by_name[record.path.name]
            np.testing.assert_array_equal(record.labels, other.labels)
            np.testing.assert_allclose(record.boxes, other.boxes, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "format", "split", "digest"),
    [
        ("bccd", "yolo", "train", "1953466ee1d118c1"),
        ("bccd", "yolo", "val", "bc5086638a43c7e6"),
        ("bccd", "coco", "train", "af951605d47b27d9"),
        ("bccd", "coco", "val", "e6b9093de9096a47"),
        ("coco128", "auto", "train", "e00873d733bb74f6"),
        ("coco128", "auto", "val", "2338bb4f0bc664c1"),
    ],
)
def test_ground_truth_of_real_sets_is_on_record(
    shared_data: Path, name: str, format: str, split: str, digest: str
):
    """Recorded before files on disk, repetitions and types were accounted for: clean sets stay as they were."""
    truth = ground_truth(open_dataset(shared_data / "data" / name, split, format=format, verify=False))
    assert hashlib.sha256(json.dumps(truth, sort_keys=True).encode()).hexdigest()[:16] == digest


def test_merged_classes_of_coco128(shared_data: Path):
    groups = {"person": [0], "vehicle": [2, "motorcycle", 5, 7], "animal": list(range(14, 24))}
    plain = open_dataset(shared_data / "data" / "coco128", "val")
    merged = open_dataset(shared_data / "data" / "coco128", "val", merge_classes=groups)
    assert merged.names == ("person", "vehicle", "animal")
    assert len(merged) == len(plain) == 64
    count = [0, 0, 0]
    for file in (shared_data / "data/coco128/labels/val2017").glob(
        "*.txt"
    ):  # counted from the files themselves
        for line in file.read_text().splitlines():
            label = int(line.split()[0])
            for new, members in enumerate(([0], [2, 3, 5, 7], range(14, 24))):
                count[new] += label in members
    labels = np.concatenate([record.labels for record in merged.records])
    assert np.bincount(labels, minlength=3).tolist() == count


def test_bad_boxes_are_left_out_and_counted(yolo_root: Path, caplog: pytest.LogCaptureFixture):
    (yolo_root / "labels/val/c.txt").write_text("0 0.5 0.5 0.5 0.5\n0 nan 0.5 0.1 0.1\n1 0.5 0.5 0 0.1\n")
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(yolo_root, "val")
    assert dataset.records[0].labels.tolist() == [0]
    assert "Left out 2 boxes" in caplog.text
    assert "c.jpg" in caplog.text


def test_boxes_beyond_the_image_are_clipped_for_training_only(coco_root: Path, coco_content: dict):
    coco_content["annotations"][2]["bbox"] = [-2, -3, 63, 44]
    (coco_root / "annotations/instances_val2017.json").write_text(json.dumps(coco_content))
    dataset = open_dataset(coco_root, "val")
    assert dataset[0].boxes.tolist() == [[0, 0, 60, 40]]
    assert ground_truth(dataset)["annotations"][0]["bbox"] == [-2, -3, 63, 44]


def _save_turned(path: Path) -> None:
    """A file of 60x40 pixels that EXIF says is to be shown 40 wide and 60 high."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = 255  # left half as stored: top half when turned clockwise
    Image.fromarray(pixels).save(path, exif=exif, quality=95)


def test_yolo_labels_refer_to_the_turned_image(yolo_root: Path):
    _save_turned(yolo_root / "images/val/c.jpg")
    (yolo_root / "labels/val/c.txt").write_text("0 0.5 0.25 1 0.5\n")
    sample = open_dataset(yolo_root, "val")[0]
    assert sample.size == (60, 40) == sample.image.shape[:2]
    assert sample.boxes.tolist() == [[0, 0, 40, 30]]
    assert sample.image[:25].mean() > 250
    assert sample.image[35:].mean() < 5


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40)])
def test_coco_size_decides_the_orientation(coco_root: Path, coco_content: dict, height: int, width: int):
    _save_turned(coco_root / "images/val2017/a.jpg")
    coco_content["images"][1].update(height=height, width=width)
    coco_content["annotations"][2]["bbox"] = [0, 0, 10, 10]
    (coco_root / "annotations/instances_val2017.json").write_text(json.dumps(coco_content))
    sample = open_dataset(coco_root, "val")[0]
    assert sample.size == (height, width) == sample.image.shape[:2]


def test_grey_and_transparent_images_have_three_channels(yolo_root: Path):
    Image.fromarray(np.full((40, 60), 77, np.uint8)).save(yolo_root / "images/train/a.jpg")
    (yolo_root / "images/train/b.jpg").unlink()
    Image.fromarray(np.full((40, 60, 4), 99, np.uint8)).save(yolo_root / "images/train/b.png")
    for sample in map(open_dataset(yolo_root, "train").__getitem__, range(2)):
        assert sample.image.shape == (40, 60, 3)


def test_list_images(tmp_path: Path, write_image):
    write_image(tmp_path / "set" / "sub" / "2.png")
    write_image(tmp_path / "set" / "1.jpg")
    (tmp_path / "set" / "notes.md").write_text("no image")
    (tmp_path / "list.txt").write_text("set/sub/2.png\n\nset/1.jpg\n")
    assert [path.name for path in list_images(tmp_path / "set")] == ["1.jpg", "2.png"]
    assert [path.name for path in list_images(tmp_path / "list.txt")] == ["2.png", "1.jpg"]
    assert list_images(tmp_path / "set" / "1.jpg") == [tmp_path / "set" / "1.jpg"]
    for bad in ("nothing", "set/notes.md"):
        with pytest.raises(ValueError, match="expected"):
            list_images(tmp_path / bad)
