"""Every kind of broken dataset ends in a DataError that names the place and the remedy."""

import json
import os
from pathlib import Path

import cv2
import pytest

from core.errors import DataError
from data import AugmentOptions, build_loader, open_dataset
from data.images import scan_images


def truncate(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def test_missing_root(tmp_path: Path):
    with pytest.raises(DataError, match=r"No dataset at .*nowhere.*data\.root"):
        open_dataset(tmp_path / "nowhere", "val")


def test_empty_root(tmp_path: Path):
    with pytest.raises(DataError, match=r"is empty: expected data\.yaml \(YOLO\) or annotations"):
        open_dataset(tmp_path, "val")


def test_empty_split(yolo_root: Path):
    (yolo_root / "images/val/c.jpg").unlink()
    with pytest.raises(DataError, match="split 'val' is empty"):
        open_dataset(yolo_root, "val")


def test_missing_labels_folder(yolo_root: Path):
    (yolo_root / "labels/val/c.txt").unlink()
    (yolo_root / "labels/val").rmdir()
    with pytest.raises(DataError, match=r"no labels folder .*labels/val"):
        open_dataset(yolo_root, "val")


def test_no_label_fits_any_image(yolo_root: Path):
    (yolo_root / "labels/val/c.txt").rename(yolo_root / "labels/val/other.txt")
    with pytest.raises(DataError, match=r"none of the 1 images has a label file.*c\.txt"):
        open_dataset(yolo_root, "val")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", r"c\.txt line 2: class 2 is out of range.*0 to 1"),
        ("-1 0.5 0.5 0.1 0.1", "class -1 is out of range"),
        ("0.5 0.5 0.5 0.1 0.1", r"class 0\.5 is out of range"),
        ("0 30 20 10 10", "not pixels"),
        ("0 0.5 0.5 inf 0.1", "leaves the range"),
        ("0 0.5 0.5 0.1", "4 values, expected 5"),
        ("0 0.5 0.5 0.1 0.1 0.9", "6 values, expected 5"),
        ("0 x 0.5 0.1 0.1", "not a number"),
    ],
)
def test_bad_label_line(yolo_root: Path, line: str, message: str):
    (yolo_root / "labels/val/c.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(DataError, match=message):
        open_dataset(yolo_root, "val")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "expected keys"),
        ("names: {0: [", "cannot be read as YAML"),
        ("val: images/val\nnames: {0: cat, 2: dog}", "expected 0 to 1"),
        ("val: images/val\nnames: [cat, dog]\nnc: 3", "nc is 3 but names has 2"),
        ("val: images/val\nnames: cat", "expected a list of class names"),
        ("val: images/val\nnames: [cat, cat]", "class names cat occur more than once"),
        ("names: [cat, dog]", "val is None"),
        ("val: images/val\nnames: [yes, no]", "names has True, which YAML makes of yes.*in quotes"),
        ("val: images/val\nnames: {0: cat, 1: null}", "names has None, which YAML makes of"),
        ("val: images/nothing\nnames: [cat, dog]", "neither a folder nor"),
        ("path: gone\nval: images/val\nnames: [cat, dog]", "path leads to .*gone"),
        ("val: !!python/object/apply:os.system ['touch owned']\nnames: [cat]", "cannot be read as YAML"),
    ],
)
def test_bad_yaml(yolo_root: Path, content: str, message: str):
    (yolo_root / "data.yaml").write_text(content)
    with pytest.raises(DataError, match=message):
        open_dataset(yolo_root, "val")
    assert not Path("owned").exists()


@pytest.mark.parametrize("share", [0.6, 0.97])
def test_truncated_jpeg_is_named_though_opencv_reads_it(yolo_root: Path, share: float):
    path = yolo_root / "images/train/b.jpg"
    truncate(path, share)
    assert cv2.imread(str(path)) is not None  # why Pillow has to look at it
    with pytest.raises(DataError, match=r"1 of 2 images cannot be read: .*b\.jpg.*Restore"):
        open_dataset(yolo_root, "train")


def test_truncated_png_and_no_image(yolo_root: Path):
    (yolo_root / "images/train/a.jpg").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"a\.jpg \(is not an image\)"):
        open_dataset(yolo_root, "train")
    (yolo_root / "images/train/a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="is not an image"):
        open_dataset(yolo_root, "train")


def test_verified_images_are_remembered_and_changes_noticed(yolo_root: Path, tmp_path: Path, monkeypatch):
    paths = sorted((yolo_root / "images/train").glob("*.jpg"))
    before = {path: path.stat().st_mtime_ns for path in yolo_root.rglob("*")}
    first = scan_images(paths, cache_dir=tmp_path / "cache")
    assert {path: path.stat().st_mtime_ns for path in yolo_root.rglob("*")} == before
    with monkeypatch.context() as patched:
        patched.setattr("data.images.read_header", lambda *_: pytest.fail("read again"))
        assert scan_images(paths, cache_dir=tmp_path / "cache") == first
    content = paths[1].read_bytes()
    paths[1].write_bytes(content[:-200] + bytes(200))  # the same size, but later
    os.utime(paths[1], ns=(0, before[paths[1]] + 1))
    with pytest.raises(DataError, match=paths[1].name):
        scan_images(paths, cache_dir=tmp_path / "cache")
    truncate(paths[0], 0.9)
    with pytest.raises(DataError, match=paths[0].name):
        scan_images(paths, cache_dir=tmp_path / "cache")


def test_damaged_cache_is_rebuilt(yolo_root: Path, tmp_path: Path, caplog):
    paths = sorted((yolo_root / "images/train").glob("*.jpg"))
    first = scan_images(paths, cache_dir=tmp_path)
    cache = next(tmp_path.glob("verified-images-*.json"))
    for content in ("{", "[]", '{"a": 1}'):
        cache.write_text(content)
        assert scan_images(paths, cache_dir=tmp_path) == first
        assert "damaged image cache" in caplog.text
        caplog.clear()


def change(root: Path, edit) -> None:
    file = root / "annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["annotations"][0].update(category_id=1), "category_id 1, which is not among"),
        (lambda c: c["annotations"][0].update(image_id=99), "image_id 99, which is not among"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "expected four numbers"),
        (
            lambda c: c["annotations"][0].pop("bbox"),
            r"annotations\[0\]: bbox is missing, expected four numbers",
        ),
        (lambda c: c.pop("images"), "is not COCO JSON"),
        (lambda c: c.update(images=[], annotations=[]), "is empty: 0 images"),
        (lambda c: c.update(annotations=[]), "no object"),
        (lambda c: c["images"].append(dict(c["images"][0])), "share an id"),
        (lambda c: c["images"][0].update(width=61), "declared 40 high and 61 wide"),
        (lambda c: c["images"][1].update(file_name="gone.jpg"), r"gone\.jpg"),
        (lambda c: c["annotations"].insert(0, 5), "is not COCO JSON"),
    ],
)
def test_bad_coco_json(coco_root: Path, edit, message: str):
    change(coco_root, edit)
    with pytest.raises(DataError, match=message):
        open_dataset(coco_root, "val")


def test_coco_file_problems(coco_root: Path):
    file = coco_root / "annotations/instances_val2017.json"
    (file.parent / "instances_val2014.json").write_text("{}")
    with pytest.raises(DataError, match=r"several annotation files.*Rename"):
        open_dataset(coco_root, "val")
    (file.parent / "instances_val2014.json").unlink()
    with pytest.raises(DataError, match="no split 'train'"):
        open_dataset(coco_root, "train")
    file.write_text('{"images": [')
    with pytest.raises(DataError, match="cannot be read as JSON"):
        open_dataset(coco_root, "val")


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"pet": ["catt"]}, "no class 'catt'; closest: 'cat'"),
        ({"pet": [2]}, "index 2 is out of range, expected 0 to 1"),
        ({"pet": [0, 1], "dog": ["dog"]}, "'dog' into two groups"),
    ],
)
def test_bad_merge(yolo_root: Path, groups, message: str):
    with pytest.raises(DataError, match=message):
        open_dataset(yolo_root, "val", merge_classes=groups)


def test_merge_that_leaves_nothing(yolo_root: Path):
    (yolo_root / "labels/val/c.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    with pytest.raises(DataError, match="no object in them after merge_classes"):
        open_dataset(yolo_root, "val", merge_classes={"dog": ["dog"]})


def test_unknown_format_and_wrong_file(yolo_root: Path):
    with pytest.raises(DataError, match=r"'voc': expected one of auto, yolo, coco"):
        open_dataset(yolo_root, "val", format="voc")
    with pytest.raises(DataError, match="is a file"):
        open_dataset(yolo_root / "labels/val/c.txt", "val")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_image(yolo_root: Path):
    (yolo_root / "images/val/c.jpg").chmod(0)
    with pytest.raises(DataError, match=r"c\.jpg.*[Pp]ermission"):
        open_dataset(yolo_root, "val")


def test_image_that_changed_after_opening(yolo_root: Path):
    dataset = open_dataset(yolo_root, "val")
    (yolo_root / "images/val/c.jpg").unlink()
    with pytest.raises(DataError, match=r"c\.jpg does not exist"):
        dataset[0]


def test_loader_arguments(yolo_root: Path):
    dataset = open_dataset(yolo_root, "train")
    for arguments, message in (
        ({"image_size": 0, "batch_size": 1}, "image_size is 0"),
        ({"image_size": 32, "batch_size": 0}, "batch_size is 0"),
        ({"image_size": 32, "batch_size": 1, "workers": -1}, "workers is -1"),
        ({"image_size": 32, "batch_size": 1, "limit": 0}, "limit is 0"),
        (
            {"image_size": 32, "batch_size": 3, "drop_last": True},
            r"no full batch of 3 .*, or smaller batches",
        ),
        (
            {"image_size": 32, "batch_size": 3, "rank": 2, "world_size": 4},
            "for process 2: .*at most 2 processes",
        ),
    ):
        with pytest.raises(DataError, match=message):
            build_loader(dataset, **arguments)
    with pytest.raises(ValueError, match="mosaic is 2"):
        AugmentOptions(mosaic=2)
