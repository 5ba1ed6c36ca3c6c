"""YOLO trees as people have them: what a line means, what is repeated, and what lies about on the disk.

Each situation is one that gave another figure silently. The oracle is what the files hold, counted by hand.
"""

from __future__ import annotations

import codecs
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from core.errors import DataError
from data import open_dataset

BOX = "0 0.5 0.5 0.4 0.5"
POSE2 = " 0.4 0.4 0.6 0.4 0.5 0.6"  # three points inside the box
POSE3 = " 0.4 0.4 2 0.6 0.4 1 0 0 0"
PIXELS = [[18.0, 10.0, 42.0, 30.0]]  # of BOX in 60 x 40


def write_labels(root: Path, *lines: str, split: str = "val", stem: str = "c") -> None:
    (root / f"labels/{split}/{stem}.txt").write_text("\n".join(lines) + "\n")


def declare(root: Path, line: str) -> None:
    file = root / "data.yaml"
    file.write_text(file.read_text() + line + "\n")


def only_boxes(root: Path, split: str = "val") -> list[list[float]]:
    (record,) = open_dataset(root, split).records
    return record.boxes.round(6).tolist()


# ---------------------------------------------------------------------------------------------- what a line means
@pytest.mark.parametrize(
    ("shape", "line"), [("[3, 2]", BOX + POSE2), ("[3, 3]", BOX + POSE3), ("[1, 2]", BOX + " 0.5 0.5")]
)
def test_kpt_shape_makes_a_box_and_keypoints(yolo_root: Path, shape: str, line: str) -> None:
    write_labels(yolo_root, line)
    declare(yolo_root, f"kpt_shape: {shape}")
    assert only_boxes(yolo_root) == PIXELS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            BOX + POSE2,
            r"c\.txt line 1: 11 values that read as a box with keypoints.*kpt_shape: \[3, 2\] or \[2, 3\]",
        ),
        (BOX + POSE3, r"c\.txt line 1: 14 values, expected 5.*Keypoints need kpt_shape.*14 in 3 lines"),
        (BOX + " 0.4 0.4 2 0.6 0.6 1", r"11 values that read as a box with keypoints"),
        (BOX + " 0 0 0 0 0 0", r"11 values that read as a box with keypoints"),  # nobody marked them
        (BOX + " 0.5 0.31 2 0.52 0.3 2 0 0 0 0 0 0", r"17 values that read as a box with keypoints"),
        (
            BOX + " 0.5 0.31 2 0.52 0.3 2 0.51 0.3 1 0.5 0.3 1",
            r"17 values that read as a box with keypoints",
        ),  # a face
        (BOX + " 0.93 17", r"7 values that read as tracker output.*7 in 3 lines"),
        (BOX + " 0.93 1", r"7 values that read as tracker output"),
        (BOX + " 0.93", r"6 values, expected 5.*confidence.*6 in 3 lines"),
    ],
)
def test_other_columns_without_kpt_shape_are_refused_with_counts(
    yolo_root: Path, line: str, message: str
) -> None:
    write_labels(yolo_root, line, line.replace("0.5 0.4", "0.51 0.4"), line.replace("0.4 0.5", "0.4 0.51"))
    with pytest.raises(DataError, match=message):
        open_dataset(yolo_root, "val")


def test_lines_that_do_not_fit_kpt_shape_are_refused_with_counts(yolo_root: Path) -> None:
    write_labels(yolo_root, BOX + POSE2, BOX + " 0.1 0.1 0.2 0.2")
    declare(yolo_root, "kpt_shape: [3, 2]")
    with pytest.raises(DataError, match=r"line 2: 9 values, expected 11.*or 5.*11 in 1 lines, 9 in 1 lines"):
        open_dataset(yolo_root, "val")


@pytest.mark.parametrize("shape", ["17", "[17]", "[17, 4]", "[a, 2]", "[-1, 2]"])
def test_a_kpt_shape_that_says_nothing_is_refused(yolo_root: Path, shape: str) -> None:
    declare(yolo_root, f"kpt_shape: {shape}")
    with pytest.raises(DataError, match=r"kpt_shape is .*such as \[17, 3\]"):
        open_dataset(yolo_root, "val")


def test_keypoints_have_no_outlines_for_a_segmentation_network(yolo_root: Path) -> None:
    write_labels(yolo_root, BOX + POSE2)
    declare(yolo_root, "kpt_shape: [3, 2]")
    with pytest.raises(DataError, match=r"keypoints .*without an outline"):
        open_dataset(yolo_root, "val", segments=True)


def test_what_reads_as_keypoints_counts_as_outlines_where_the_file_says_so(yolo_root: Path) -> None:
    write_labels(yolo_root, BOX + POSE2)
    declare(yolo_root, "kpt_shape: [0, 0]")
    assert only_boxes(yolo_root) == [[24.0, 16.0, 36.0, 24.0]]  # extent of the five points


def test_outlines_and_boxes_may_be_mixed(yolo_root: Path) -> None:
    """Outlines of many lengths, as drawn by hand, and rectangles of four corners are no keypoints."""
    angles = [np.linspace(0, 2 * np.pi, points, endpoint=False) for points in (5, 6, 9, 14)]
    lines = [BOX]
    for number, angle in enumerate(angles):
        x, y = 0.2 + 0.15 * number, 0.6
        points = np.stack([x + 0.08 * np.cos(angle), y + 0.1 * np.sin(angle)], axis=1)
        lines.append("1 " + " ".join(f"{value:.5f}" for value in points.reshape(-1)))
    write_labels(yolo_root, *lines)
    assert len(only_boxes(yolo_root)) == 5
    write_labels(yolo_root, BOX, BOX + POSE2)  # a single long line among boxes is an outline
    assert len(only_boxes(yolo_root)) == 2
    corners = [(0.1, 0.1, 0.3, 0.2), (0.5, 0.6, 0.7, 0.8), (0.05, 0.7, 0.2, 0.9), (0.6, 0.1, 0.9, 0.4)]
    write_labels(yolo_root, *(f"1 {a} {b} {c} {b} {c} {d} {a} {d}" for a, b, c, d in corners))
    assert only_boxes(yolo_root) == [
        pytest.approx([60 * a, 40 * b, 60 * c, 40 * d]) for a, b, c, d in corners
    ]


def test_corners_in_place_of_centre_and_size_are_refused(yolo_root: Path) -> None:
    """x1 y1 x2 y2 passes every check of a line."""
    random = np.random.default_rng(0)
    low = random.uniform(0, 0.7, (12, 2))
    high = low + random.uniform(0.05, 0.3, (12, 2))
    write_labels(yolo_root, *(f"0 {a} {b} {c} {d}" for (a, b), (c, d) in zip(low, high, strict=True)))
    with pytest.raises(DataError, match=r"of 12 boxes leave their image.*corners x1, y1, x2, y2"):
        open_dataset(yolo_root, "val")
    write_labels(
        yolo_root,
        *(f"0 {(a + c) / 2} {(b + d) / 2} {c - a} {d - b}" for (a, b), (c, d) in zip(low, high, strict=True)),
    )
    assert len(only_boxes(yolo_root)) == 12


def test_all_faults_of_all_files_are_told_at_once(yolo_root: Path) -> None:
    write_labels(yolo_root, "0 x 0.5 0.1 0.1", split="train", stem="a")
    write_labels(yolo_root, BOX, "7 0.5 0.5 0.1 0.1", split="train", stem="b")
    with pytest.raises(DataError, match=r"2 faults\. .*a\.txt line 1.*b\.txt line 2: class 7"):
        open_dataset(yolo_root, "train")


# ------------------------------------------------------------------------------------------------------- repetitions
def test_repeated_lines_are_dropped_with_a_count(yolo_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_labels(yolo_root, BOX, BOX, "1 0.5 0.5 0.4 0.5", "0 0.50 0.5 0.4 0.500", "0 0.5 0.5 0.4 0.51")
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(yolo_root, "val")
    assert dataset.records[0].labels.tolist() == [0, 1, 0]
    assert "Left out 2 objects that repeat another of the same image exactly; the first: " in caplog.text
    assert "c.txt line 2" in caplog.text
    assert any("Left out 2 objects" in note for note in dataset.notes)


def test_repeated_outlines_are_dropped_and_different_ones_kept(yolo_root: Path) -> None:
    one, other = "1 0.1 0.5 0.3 0.25 0.2 0.75", "1 0.1 0.5 0.3 0.25 0.25 0.6 0.2 0.75"  # of the same extent
    write_labels(yolo_root, one, other, one)
    assert len(open_dataset(yolo_root, "val").records[0].labels) == 2
    assert len(open_dataset(yolo_root, "val", segments=True).records[0].labels) == 2


def test_an_image_listed_twice_counts_once_and_a_shared_label_file_is_said(
    yolo_root: Path, write_image, caplog: pytest.LogCaptureFixture
) -> None:
    (yolo_root / "val.txt").write_text("images/val/c.jpg\n./images/val/c.jpg\nimages/val/c.png\n")
    write_image(yolo_root / "images/val/c.png", seed=3)
    file = yolo_root / "data.yaml"
    file.write_text(file.read_text().replace("val: images/val", "val: val.txt"))
    with caplog.at_level(logging.WARNING):
        assert len(open_dataset(yolo_root, "val")) == 2
    assert "1 images are listed more than once" in caplog.text
    assert "2 images share their label file with another image" in caplog.text


# --------------------------------------------------------------------------------------- what lies about on the disk
@pytest.mark.parametrize(
    "name",
    [
        ".ipynb_checkpoints/c-checkpoint.jpg",
        "._c.jpg",
        "@eaDir/c.jpg/SYNOPHOTO_THUMB_M.jpg",
        "__MACOSX/c.jpg",
        ".thumbnails/large/c.png",
        "$RECYCLE.BIN/c.jpg",
    ],
)
def test_hidden_copies_are_no_images(
    yolo_root: Path, write_image, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    write_image(yolo_root / "images/val" / name)
    with caplog.at_level(logging.INFO):
        dataset = open_dataset(yolo_root, "val")
    assert [record.path.name for record in dataset.records] == ["c.jpg"]
    assert "Left out 1 hidden files and folders" in caplog.text


def test_a_dataset_below_a_hidden_folder_is_read(yolo_root: Path) -> None:
    hidden = yolo_root.parent / ".cache"
    hidden.mkdir()
    yolo_root.rename(hidden / "yolo")
    assert len(open_dataset(hidden / "yolo", "train")) == 2


def test_linked_folders_are_read_and_circles_end(
    yolo_root: Path, write_image, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = yolo_root.parent / "elsewhere"
    write_image(elsewhere / "d.jpg")
    write_image(elsewhere / "sub/e.jpg")
    (elsewhere / "back").symlink_to(yolo_root / "images/val")
    (elsewhere / "sub/again").symlink_to(elsewhere)
    (yolo_root / "images/val/linked").symlink_to(elsewhere)
    (yolo_root / "images/val/loop").symlink_to(yolo_root / "images/val")
    (yolo_root / "labels/val/linked").mkdir()
    (yolo_root / "labels/val/linked/d.txt").write_text(BOX + "\n")
    (yolo_root / "labels/val/linked/sub").mkdir()
    with caplog.at_level(logging.INFO):
        dataset = open_dataset(yolo_root, "val")
    found = {
        record.path.relative_to(yolo_root / "images/val").as_posix(): len(record.labels)
        for record in dataset.records
    }
    assert found == {"c.jpg": 2, "linked/d.jpg": 1, "linked/sub/e.jpg": 0}
    assert "Left out 3 links to folders that are read already" in caplog.text


@pytest.mark.parametrize("place", ["images/val/gone.jpg", "images/val/folder", "labels/val/c.txt"])
def test_links_that_lead_nowhere_are_an_error_unless_told_otherwise(
    yolo_root: Path, write_image, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    write_image(yolo_root / "images/val/other.jpg")
    write_labels(yolo_root, BOX, stem="other")
    (yolo_root / place).unlink(missing_ok=True)
    (yolo_root / place).symlink_to("/nowhere/at/all")
    with pytest.raises(
        DataError, match=rf"{Path(place).name} is a link to '/nowhere/at/all'.*data\.dangling_links=skip"
    ):
        open_dataset(yolo_root, "val")
    with caplog.at_level(logging.WARNING):
        assert len(open_dataset(yolo_root, "val", links="skip")) == 2
    assert "Left out 1 broken links" in caplog.text


def test_a_link_to_itself_and_one_in_a_list_are_named(yolo_root: Path) -> None:
    (yolo_root / "images/val/self.jpg").symlink_to("self.jpg")
    with pytest.raises(DataError, match=r"self\.jpg is a link"):
        open_dataset(yolo_root, "val")
    file = yolo_root / "data.yaml"
    file.write_text(file.read_text().replace("val: images/val", "val: val.txt"))
    (yolo_root / "val.txt").write_text("images/val/c.jpg\nimages/val/self.jpg\n")
    with pytest.raises(DataError, match=r"self\.jpg is a link"):
        open_dataset(yolo_root, "val")


def test_a_folder_that_cannot_be_listed_is_an_error(yolo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = yolo_root / "images/val/locked"
    locked.mkdir()
    real = os.scandir

    def scandir(path):
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(DataError, match=r"locked cannot be read \(Permission denied\)"):
        open_dataset(yolo_root, "val")


def test_pictures_of_other_kinds_and_leftovers_on_either_side_are_counted(
    yolo_root: Path, write_image, caplog: pytest.LogCaptureFixture
) -> None:
    images, labels = yolo_root / "images/val", yolo_root / "labels/val"
    for name in ("d.heic", "e.HEIC", "f.gif", "g"):
        (images / name).write_bytes(b"picture")
    for name in ("d.txt", "g.txt", "lost.txt", "classes.txt"):
        (labels / name).write_text(BOX + "\n")
    (labels / "c.xml").write_text("<annotation/>")
    (labels / "UPPER.TXT").write_text(BOX)
    write_image(images / "unlabelled.jpg")
    (images / "notes.md").write_text("no picture")
    with caplog.at_level(logging.INFO):
        dataset = open_dataset(yolo_root, "val")
    assert len(dataset) == 2
    for sentence in (
        "Left out 1 files of a kind that is not read (.heic, with a label file)",
        "Left out 1 files of a kind that is not read (.heic);",
        "Left out 1 files of a kind that is not read (.gif)",
        "Left out 1 files of a kind that is not read (without a suffix, with a label file)",
        "1 label files have no image: their objects are not used; the first: ",
        "Left out 1 files among the labels that are not NAME.txt (.xml)",
        "Left out 1 files among the labels that are not NAME.txt (.TXT)",
        "1 images have no label file: they count as images without objects",
    ):
        assert sentence in caplog.text, sentence
    assert "lost.txt" in caplog.text


def test_a_list_of_images_does_not_miss_the_others(yolo_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Labels of images that are in another list are no leftovers; labels without any image are."""
    file = yolo_root / "data.yaml"
    file.write_text(file.read_text().replace("train: images/train", "train: train.txt"))
    (yolo_root / "train.txt").write_text("images/train/a.jpg\n")
    (yolo_root / "labels/train/lost.txt").write_text(BOX)
    with caplog.at_level(logging.INFO):
        assert len(open_dataset(yolo_root, "train")) == 1
    assert "1 label files have no image" in caplog.text


def test_a_well_formed_tree_has_no_notes(yolo_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert open_dataset(yolo_root, "train").notes == ()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# --------------------------------------------------------------------------------------------- layouts and encodings
def roboflow(root: Path, write_image, above: str = "../") -> Path:
    for split in ("train", "valid"):
        write_image(root / split / "images/x.jpg")
        (root / split / "labels").mkdir(parents=True)
        (root / split / "labels/x.txt").write_text(BOX + "\n")
    (root / "data.yaml").write_text(
        f"train: {above}train/images\nval: {above}valid/images\nnc: 1\nnames: ['cell']\n"
    )
    return root


def test_roboflows_layout(tmp_path: Path, write_image) -> None:
    root = roboflow(tmp_path / "export", write_image)
    for split, folder in (("train", "train"), ("val", "valid")):
        (record,) = open_dataset(root, split).records
        assert record.path == root / folder / "images/x.jpg"
        assert record.boxes.tolist() == PIXELS
    assert len(open_dataset(root / "data.yaml", "train")) == 1


def test_a_folder_that_is_where_the_file_says_comes_first(
    tmp_path: Path, write_image, caplog: pytest.LogCaptureFixture
) -> None:
    root = roboflow(tmp_path / "export", write_image)
    roboflow(tmp_path, write_image)
    (record,) = open_dataset(root, "train").records
    assert record.path.resolve() == tmp_path / "train/images/x.jpg"
    assert f"{root / 'train/images'} is there, too, and is not used" in caplog.text


def test_a_list_beside_the_yaml_and_the_key_valid(tmp_path: Path, write_image) -> None:
    root = roboflow(tmp_path / "export", write_image)
    (root / "valid.txt").write_text("valid/images/x.jpg\n")
    (root / "data.yaml").write_text("train: ../train/images\nvalid: ../valid.txt\nnames: [cell]\n")
    assert len(open_dataset(root, "val")) == 1
    (root / "data.yaml").write_text("train: ../gone/images\nnames: [cell]\n")
    with pytest.raises(DataError, match=r"train leads to .*\.\./gone/images"):
        open_dataset(root, "train")


ENCODINGS = ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_lists_labels_and_yaml_in_other_encodings(yolo_root: Path, write_image, encoding: str) -> None:
    write_image(yolo_root / "images/val/größe.jpg")
    (yolo_root / "labels/val/größe.txt").write_bytes(f"{BOX}\r\n{BOX[:-1]}4\r\n".encode(encoding))
    (yolo_root / "val.txt").write_bytes("images\\val\\größe.jpg\r\nimages/val/c.jpg\r\n".encode(encoding))
    file = yolo_root / "data.yaml"
    text = file.read_text().replace("val: images/val", "val: val.txt").replace("cat", "Käfer")
    file.write_bytes(text.encode("utf-8-sig"))
    dataset = open_dataset(yolo_root, "val")
    assert dataset.names == ("Käfer", "dog")
    assert {record.path.name: len(record.labels) for record in dataset.records} == {
        "größe.jpg": 2,
        "c.jpg": 2,
    }


def test_joined_files_have_marks_within(yolo_root: Path) -> None:
    mark = codecs.BOM_UTF8.decode()
    (yolo_root / "labels/val/c.txt").write_text(f"{mark}{BOX}\n{mark}1 0.5 0.5 0.2 0.2\n", encoding="utf-8")
    assert len(only_boxes(yolo_root)) == 2


def test_a_code_page_is_named_with_file_and_line(yolo_root: Path) -> None:
    file = yolo_root / "data.yaml"
    file.write_text(file.read_text().replace("val: images/val", "val: val.txt"))
    (yolo_root / "val.txt").write_bytes("images/val/c.jpg\nimages/val/größe.jpg\n".encode("cp1252"))
    with pytest.raises(
        DataError, match=r"val\.txt is not UTF-8 text \(line 2 has the byte 0xf6\).*save it as UTF-8"
    ):
        open_dataset(yolo_root, "val")
    (yolo_root / "val.txt").write_text("images/val/c.jpg\n")
    (yolo_root / "labels/val/c.txt").write_bytes(b"0 0.5 0.5 0.1 0.1\n\xff\x93\x00binary")
    with pytest.raises(DataError, match=r"c\.txt is not UTF-8 text \(line 2"):
        open_dataset(yolo_root, "val")
