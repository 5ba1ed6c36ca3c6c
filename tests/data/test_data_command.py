"""`python -m data` says what is wrong with a dataset before a run does: one odd dataset for each situation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.command import main
from data.duplicates import find_copies
from tests.data.test_odd_labels import BOX, POSE2, roboflow

Edit = Callable[[Path], object]


def labels(*lines: str, name: str = "c.txt") -> Edit:
    return lambda root: (root / "labels/val" / name).write_text("\n".join(lines) + "\n")


def copy(source: str, *targets: str) -> Edit:
    def edit(root: Path) -> None:
        for target in targets:
            (root / target).parent.mkdir(parents=True, exist_ok=True)
            (root / target).write_bytes((root / source).read_bytes())

    return edit


def link(place: str, target: str) -> Edit:
    return lambda root: (root / place).symlink_to(target)


def yaml(old: str, new: str) -> Edit:
    return lambda root: (root / "data.yaml").write_text((root / "data.yaml").read_text().replace(old, new))


def tiff(root: Path) -> None:
    (root / "images/val/c.jpg").unlink()
    Image.fromarray(np.zeros((40, 60), np.float32)).save(root / "images/val/c.tif")


C = "images/val/c.jpg"
ODD_TREES = [
    # situation, exit code, what stdout says
    ("plain", lambda root: None, 0, ["val: 1 images, 2 objects", "classes: 0 cat 1, 1 dog 1", "40 x 60 (1)"]),
    ("keypoints", labels(BOX + POSE2), 3, ["11 values that read as a box with keypoints", "11 in 1 lines"]),
    ("tracker", labels(BOX + " 0.9 4"), 3, ["tracker output", "c.txt line 1"]),
    ("bad lines", labels(BOX, "0 a 1 1 1", "5 0.5 0.5 0.1 0.1"), 3,
        ["c.txt line 2: '0 a 1 1 1' holds something", "c.txt line 3: class 5", "2 faults; a run would refuse it"]),
    ("repetitions", labels(BOX, BOX, BOX), 0, ["Left out 2 objects that repeat", "1 images, 1 objects", "1 warnings"]),
    ("degenerate", labels(BOX, "0 0.5 0.5 0 0.1", "0 nan 0.5 0.1 0.1"), 0, ["Left out 2 boxes that are NaN"]),
    ("hidden", copy(C, "images/val/.ipynb_checkpoints/c.jpg", "images/val/._c.jpg"), 0,
        ["note: Left out 2 hidden files and folders", "val: 1 images"]),
    ("links", lambda root: [link(f"{kind}/val/more", "../train")(root) for kind in ("images", "labels")], 0,
        ["note: 1 linked folders are read", "val: 3 images, 6 objects"]),
    ("gone", link("images/val/gone.jpg", "/nowhere"), 3, ["gone.jpg is a link to '/nowhere'", "1 faults"]),
    ("label gone", lambda root: ((root / "labels/train/a.txt").unlink(), link("labels/train/a.txt", "/no")(root)), 3,
        ["a.txt is a link to '/no'"]),
    ("kinds", copy(C, "images/val/d.heic", "images/val/e.gif"), 0, ["kind that is not read (.heic)", "(.gif)"]),
    ("orphan", labels(BOX, name="lost.txt"), 0, ["warning: 1 label files have no image", "lost.txt"]),
    ("background", copy(C, "images/val/d.jpg"), 0, ["note: 1 images have no label file", "1 images without objects"]),
    ("utf-16", lambda root: (root / "labels/val/c.txt").write_bytes(BOX.encode("utf-16")), 0, ["1 images, 1 objects"]),
    ("binary", lambda root: (root / "labels/val/c.txt").write_bytes(b"\xff\x01\x02"), 3, ["is not UTF-8 text"]),
    ("broken", lambda root: (root / C).write_bytes(b"no image"), 3, ["c.jpg (is not an image): cannot be read"]),
    ("float", tiff, 3, ["c.tif", "mode F", "convert it to PNG or JPEG"]),
    ("names", yaml("1: dog", "1: cat"), 3, ["class names cat occur more than once"]),
    ("no folder", yaml("val: images/val", "val: images/gone"), 3, ["val: cannot be opened", "images/gone"]),
    ("leak", copy(C, "images/train/z.jpg"), 0,
        ["images occur more than once in train and val alike", "c.jpg"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "code", "words"), [case[1:] for case in ODD_TREES], ids=[c[0] for c in ODD_TREES]
)
def test_odd_trees(
    yolo_root: Path, write_image, capsys: pytest.CaptureFixture[str], edit: Edit, code: int, words: list[str]
) -> None:
    for number, path in enumerate(sorted(yolo_root.rglob("*.jpg"))):
        write_image(path, seed=number)  # the fixture's three images are one
    edit(yolo_root)
    assert main([str(yolo_root), "--places", "5"]) == code
    printed = capsys.readouterr().out
    for word in words:
        assert word in printed, (word, printed)
    assert printed.rstrip().splitlines()[-1].startswith(f"{yolo_root}: ")


ODD_JSON = [
    ("text", lambda c: [a.update(iscrowd=str(a["iscrowd"])) for a in c["annotations"]], 0, ["3 numbers are written"]),
    ("crowd", lambda c: None, 0, ["2 images, 3 objects, 1 of them crowds"]),
    ("area", lambda c: c["annotations"][0].update(area="n/a"), 0, ["1 areas are not positive numbers"]),
    ("box", lambda c: [a.update(bbox=None) for a in c["annotations"]], 3,
        ["annotations[0]: bbox is missing", "annotations[1]: bbox", "annotations[2]: bbox"]),
    ("fractions", lambda c: [a.update(bbox=[0.1, 0.1, 0.5, 0.5]) for a in c["annotations"]], 3, ["fractions of the"]),
    ("category", lambda c: c["categories"][0].update(id=5), 3, ["categories 'dog', 'cat' share the id 5"]),
    ("ids", lambda c: ([i.update(id=f"x{i['id']}") for i in c["images"]],
                       [a.update(image_id=f"x{a['image_id']}") for a in c["annotations"]]), 0,
        ["2 image ids are not integers from 0 to 2^63 - 1: images are numbered 1 to 2", "'x7', 'x3'"]),
    ("size", lambda c: [i.update(width=61) for i in c["images"]], 3,
        ["images[0]: ", "images[1]: ", "is declared 40 high and 61 wide", "2 faults"]),
    ("missing", lambda c: c["images"][0].update(file_name="gone.jpg"), 3, ["gone.jpg", "cannot be read"]),
    ("repetition", lambda c: c["annotations"].append({**c["annotations"][0], "id": 55}), 0, ["Left out 1 objects"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "code", "words"), [case[1:] for case in ODD_JSON], ids=[c[0] for c in ODD_JSON]
)
def test_odd_coco_json(
    coco_root: Path, coco_content: dict, capsys: pytest.CaptureFixture[str], edit, code: int, words: list[str]
) -> None:
    edit(coco_content)
    (coco_root / "annotations/instances_val2017.json").write_text(json.dumps(coco_content))
    assert main([str(coco_root)]) == code
    printed = capsys.readouterr().out
    for word in words:
        assert word in printed, (word, printed)


def test_masks_are_looked_at_when_asked(coco_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(coco_root), "--segments"]) == 3
    printed = capsys.readouterr().out
    assert printed.count("needs a mask for every object") == 3


def test_splits_in_another_order_and_copies_within(tmp_path: Path, write_image, capsys) -> None:
    for split, order in (("train", "ab"), ("val", "ba")):
        for name in ("1.jpg", "2.jpg"):
            write_image(tmp_path / "images" / split / name, seed=len(split))
        content = {
            "images": [{"id": n, "file_name": f"{n}.jpg"} for n in (1, 2)],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 0, "bbox": [1, 1, 9, 9]}],
            "categories": [{"id": index, "name": name} for index, name in enumerate(order)],
        }
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "the classes of val are in another order than those of train" in printed
    assert "1 images occur more than once within train" in printed
    assert "1 images occur more than once within val" in printed


def test_only_whole_contents_count_as_copies(tmp_path: Path) -> None:
    long = bytes(range(256)) * 1000
    contents = {
        "a": long + b"1",
        "b": long + b"2",
        "c": long + b"1",
        "d": b"short",
        "e": b"other",
        "f": b"short",
    }
    places = []
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        places.append(("val" if name == "c" else "train", tmp_path / name))
    found = find_copies(places)
    assert found == {
        ("train", "val"): [[tmp_path / "a", tmp_path / "c"]],
        ("train",): [[tmp_path / "d", tmp_path / "f"]],
    }


def test_facts_as_json_and_roboflows_layout(tmp_path: Path, write_image, capsys) -> None:
    root = roboflow(tmp_path / "export", write_image)
    file = tmp_path / "facts.json"
    assert main([str(root), "--split", "val", "--json", str(file)]) == 0
    facts = json.loads(file.read_text())["splits"]["val"]
    assert facts["objects_by_class"] == {"cell": 1}
    assert (facts["images"], facts["notes"], facts["faults"]) == (1, [], [])
    assert capsys.readouterr().out.rstrip().endswith(f"{root}: usable")


def test_what_is_no_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 3
    assert "No dataset at" in capsys.readouterr().out
    (tmp_path / "data.yaml").write_text("names: {0: [")
    assert main([str(tmp_path)]) == 3
    assert "cannot be read as YAML" in capsys.readouterr().err


def test_all_faults_are_listed(yolo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels(*["9 0.5 0.5 0.1 0.1"] * 30)(yolo_root)
    assert main([str(yolo_root), "--split", "val"]) == 3
    printed = capsys.readouterr().out
    assert printed.count("class 9 is out of range") == 30
