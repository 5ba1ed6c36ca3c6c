"""COCO JSON as tools write it: types, repetitions, empty cells, other units. One clear error, or a count.

The set is that of `coco_content`: image 7 (b.jpg) with a dog and a crowd of cats, image 3 (a.jpg) with a cat.
"""

from __future__ import annotations

import codecs
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from core.errors import DataError
from data import ground_truth, open_dataset

Edit = Callable[[dict], object]


def write(root: Path, content: dict, edit: Edit) -> Path:
    edit(content)
    file = root / "annotations/instances_val2017.json"
    file.write_text(json.dumps(content))
    return root


def truth_of(root: Path) -> list[tuple]:
    """Image, class, box, area and crowd of every annotation."""
    annotations = ground_truth(open_dataset(root, "val"))["annotations"]
    return [(a["image_id"], a["category_id"], a["bbox"], a["area"], a["iscrowd"]) for a in annotations]


PLAIN = [
    (3, 1, [0, 0, 60, 40], 2400.0, 0),
    (7, 2, [1.5, 2, 10, 20], 150.0, 0),
    (7, 1, [30, 5, 20, 30], 600.0, 1),
]


def each(table: str, **values: object) -> Edit:
    return lambda content: [entry.update(values) for entry in content[table]]


def test_the_set_itself(coco_root: Path) -> None:
    assert truth_of(coco_root) == PLAIN


# ------------------------------------------------------------------------- what is accepted: the value, and a count
@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda c: [a.update(iscrowd=str(a["iscrowd"])) for a in c["annotations"]], "3 numbers are written as strings"),
        (lambda c: [a.update(iscrowd=bool(a["iscrowd"])) for a in c["annotations"]], None),
        (lambda c: [a.update(iscrowd=float(a["iscrowd"])) for a in c["annotations"]], None),
        (lambda c: c["annotations"][0].update(iscrowd=None), None),
        (lambda c: c["annotations"][0].pop("iscrowd"), None),
        (each("images", width="60", height="40"), "4 numbers are written as strings"),
        (each("images", width=60.0, height=40.0), None),
        (each("images", width=None), None),
        (lambda c: [i.pop("height") for i in c["images"]], None),
        (lambda c: [a.update(bbox=[str(v) for v in a["bbox"]]) for a in c["annotations"]], "12 numbers are written"),
        (lambda c: [a.update(area=str(a["area"])) for a in c["annotations"]], "3 numbers are written as strings"),
        (lambda c: [a.update(image_id=float(a["image_id"])) for a in c["annotations"]], None),
        (lambda c: [k.update(id=str(k["id"])) for k in c["categories"][::-1]]
            + [a.update(category_id=str(a["category_id"])) for a in c["annotations"]]
            + [c["categories"].reverse()], None),
    ],
)  # fmt: skip
def test_other_spellings_of_a_value_are_that_value(
    coco_root: Path, coco_content: dict, caplog: pytest.LogCaptureFixture, edit: Edit, said: str | None
) -> None:
    with caplog.at_level(logging.WARNING):
        assert truth_of(write(coco_root, coco_content, edit)) == PLAIN
    assert (said or "") in caplog.text
    assert bool(caplog.text) == bool(said)


@pytest.mark.parametrize("area", ["n/a", -3, float("nan"), float("inf"), [1], True, ""])
def test_an_area_that_is_none_is_that_of_the_box(
    coco_root: Path, coco_content: dict, caplog: pytest.LogCaptureFixture, area: object
) -> None:
    root = write(coco_root, coco_content, lambda c: c["annotations"][0].update(area=area))
    assert truth_of(root)[1] == (7, 2, [1.5, 2, 10, 20], 200.0, 0)
    assert "1 areas are not positive numbers; the areas of the boxes are used" in caplog.text
    assert "annotations[0]: area is" in caplog.text


@pytest.mark.parametrize("area", [None, 0])
def test_an_area_that_is_not_given_is_that_of_the_box(
    coco_root: Path, coco_content: dict, area: object
) -> None:
    root = write(coco_root, coco_content, lambda c: c["annotations"][0].update(area=area))
    assert truth_of(root)[1][3] == 200.0


def test_repeated_annotations_are_dropped_with_a_count(
    coco_root: Path, coco_content: dict, caplog: pytest.LogCaptureFixture
) -> None:
    def edit(content: dict) -> None:
        first, second, _ = content["annotations"]
        content["annotations"] += [
            {**first, "id": 100},
            {**first, "id": 101},
            {**second, "id": 102},
            {**first, "id": 103, "category_id": 5},
            {**second, "id": 104, "iscrowd": 0},
            {**first, "id": 105, "segmentation": [[1, 1, 9, 1, 9, 9]]},
        ]

    assert len(truth_of(write(coco_root, coco_content, edit))) == 6
    assert "Left out 3 objects that repeat another of the same image exactly" in caplog.text
    assert "annotations[3]" in caplog.text


def test_images_that_the_file_does_not_list_are_counted(
    coco_root: Path, write_image, caplog: pytest.LogCaptureFixture
) -> None:
    write_image(coco_root / "images/val2017/extra.jpg")
    write_image(coco_root / "images/val2017/.thumbs/a.jpg")
    with caplog.at_level(logging.INFO):
        assert len(open_dataset(coco_root, "val")) == 2
    assert "1 images in the folder are not in the annotation file" in caplog.text
    assert "Left out 1 hidden files and folders" in caplog.text


@pytest.mark.parametrize("mark", [codecs.BOM_UTF8, b""])
def test_byte_order_marks_and_utf16(coco_root: Path, mark: bytes) -> None:
    file = coco_root / "annotations/instances_val2017.json"
    text = file.read_text()
    file.write_bytes(mark + text.encode() if mark else text.encode("utf-16"))
    assert truth_of(coco_root) == PLAIN


def test_roboflows_layout(tmp_path: Path, coco_content: dict, write_image) -> None:
    for name in ("a.jpg", "b.jpg"):
        write_image(tmp_path / "valid" / name)
    (tmp_path / "valid/_annotations.coco.json").write_text(json.dumps(coco_content))
    assert truth_of(tmp_path) == PLAIN


# -------------------------------------------------------------------------- what is refused, with file and index
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (each("annotations", iscrowd="no"), r"3 faults.*annotations\[0\]: iscrowd is 'no', expected 0 or 1"),
        (each("annotations", iscrowd=2), r"annotations\[0\]: iscrowd is 2, expected 0 or 1"),
        (lambda c: c["annotations"][1].update(bbox=None), r"annotations\[1\]: bbox is missing, expected four numbers"),
        (lambda c: c["annotations"][1].pop("bbox"), r"annotations\[1\]: bbox is missing"),
        (lambda c: c["annotations"][1].update(bbox=[]), r"annotations\[1\]: bbox is \[\], expected four"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, None, 4]), r"annotations\[1\]: bbox is \[1, 2, None, 4\]"),
        (lambda c: c["annotations"][1].update(bbox="1 2 3 4"), r"annotations\[1\]: bbox is '1 2 3 4'"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, True, 4]), r"annotations\[1\]: bbox is .*True"),
        (lambda c: [a.update(bbox=[v / 60 for v in a["bbox"]]) for a in c["annotations"]],
            r"annotations\[0\]: bbox is .*3 of 3 boxes lie within 0 to 1: these are fractions"),
        (lambda c: c["categories"][0].update(id=5), r"categories 'dog', 'cat' share the id 5"),
        (lambda c: c["categories"][0].update(name=None), r"categories\[0\]: name is missing"),
        (lambda c: c["categories"][0].update(id=[1]), r"categories\[0\]: id is \[1\], expected an integer"),
        (lambda c: c["images"][0].update(width="wide"), r"images\[0\]: width is 'wide', expected a whole number"),
        (lambda c: c["images"][0].update(width="61"), "declared 40 high and 61 wide, but the file has 40 and 60"),
        (lambda c: c["images"][0].update(height=0), r"images\[0\]: height is 0, expected a whole number of pixels"),
        (lambda c: c["images"][0].update(file_name=None), r"images\[0\]: file_name is missing"),
        (lambda c: c["images"][0].update(file_name="a.jpg"), r"images\[1\]: file_name 'a\.jpg' is that of images\[0\]"),
        (lambda c: c["annotations"][0].update(image_id="7"), r"image_id '7', .*not among the images; there it is 7"),
        (lambda c: c["annotations"][0].update(category_id="90"), r"category_id '90', .*there it is 90"),
        (lambda c: c["annotations"][0].update(image_id=None), r"annotations\[0\]: image_id is None, expected"),
        (lambda c: c.update(categories={"1": "cat"}), "is not COCO JSON: categories is a dict, expected a list"),
        (lambda c: c["images"].append(None), r"is not COCO JSON: images\[2\] is None"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(
    coco_root: Path, coco_content: dict, edit: Edit, message: str
) -> None:
    with pytest.raises(DataError, match=message) as error:
        open_dataset(write(coco_root, coco_content, edit), "val")
    assert "instances_val2017.json" in str(error.value)


def test_corners_in_place_of_sides_are_refused(coco_root: Path, coco_content: dict) -> None:
    corners = [[20, 10, 50, 30], [31, 5, 58, 39], [5, 21, 25, 35], [10, 2, 30, 20], [40, 20, 59, 38]]

    def edit(content: dict, boxes: list[list[int]]) -> None:
        base = content["annotations"][0]
        content["annotations"] = [{**base, "id": n, "bbox": box} for n, box in enumerate(boxes)]

    with pytest.raises(
        DataError, match=r"annotations\[0\]: bbox: 4 of 5 boxes leave their image.*expected x, y"
    ):
        open_dataset(write(coco_root, coco_content, lambda c: edit(c, corners)), "val")
    sides = [[x, y, right - x, bottom - y] for x, y, right, bottom in corners]
    assert len(truth_of(write(coco_root, coco_content, lambda c: edit(c, sides)))) == 5


def test_a_few_tiny_boxes_are_no_fractions(coco_root: Path, coco_content: dict) -> None:
    root = write(coco_root, coco_content, lambda c: c["annotations"][0].update(bbox=[0.2, 0.1, 0.8, 0.9]))
    assert len(truth_of(root)) == 3
