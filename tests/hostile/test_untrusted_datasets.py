"""Datasets of strangers: YAML, lists, labels, COCO JSON; each case was seen to hang, to fill memory, or a traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.compose import compose, read
from core.documents import MAX_NODES, DocumentError, parse_yaml
from core.errors import ConfigError, DataError, PlacementError
from data import open_dataset
from data.command import main
from quant import load_placement

BASE = {"path": ".", "train": "images/train", "val": "images/val", "names": "[cat, dog]"}


def bomb(key: str = "names") -> str:
    """Nine to the power of ten entries in 500 bytes."""
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 10):
        text += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n"
    return text + "".join(f"{name}: {value}\n" for name, value in (BASE | {key: "*a9"}).items())


HOSTILE_YAML = {
    "bomb": bomb(),
    "merged bomb": "a: &a {x: 1}\n"
    + "".join(f"b{n}: &b{n} {{<<: [{', '.join([f'*b{n - 1}' if n else '*a'] * 9)}]}}\n" for n in range(10)),
    "deep": "names: " + "[" * 5000 + "]" * 5000,
    "deep blocks": "names: " + "- " * 5000 + "x",
    "deep maps": "names: " + "{a: " * 5000 + "1" + "}" * 5000,
    "long integer": "nc: " + "9" * 5000,
    "long integer by tag": "nc: !!int '" + "9" * 5000 + "'",
    "number in base 60": "nc: 1" + ":1" * 100_000,
    "no such date": "x: 2001-99-99",
    "contains itself": "names: &a [*a]",
    "tag that calls": "names: !!python/object/apply:os.system ['touch executed']",
    "many entries": "".join(f"k{number}: [1, 2, 3]\n" for number in range(MAX_NODES // 3)),
    "half a character": "names: [\ud800]",
}


@pytest.mark.parametrize("kind", HOSTILE_YAML)
def test_hostile_yaml_is_refused_by_every_reader(kind: str, tmp_path: Path) -> None:
    text = HOSTILE_YAML[kind]
    with pytest.raises(DocumentError):
        parse_yaml(text)
    (tmp_path / "experiment").mkdir()
    for name, error, use in (
        ("data.yaml", DataError, lambda path: open_dataset(path.parent, "val")),
        ("placement.yaml", PlacementError, load_placement),
        ("config.yaml", ConfigError, read),
        ("experiment/mine.yaml", ConfigError, lambda path: compose(["+experiment=mine"], [tmp_path])),
    ):
        path = tmp_path / name
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(error) as caught:
            use(path)
        assert len(str(caught.value)) < 2000
        path.unlink()


@pytest.mark.parametrize("key", ["names", "val", "path", "nc"])
def test_yaml_bombs_in_each_key_are_refused(key: str, tree: Path) -> None:
    (tree / "data.yaml").write_text(bomb(key))
    with pytest.raises(DataError, match=r"data\.yaml.*100000 entries"):
        open_dataset(tree, "val")


def test_aliases_that_repeat_little_are_taken() -> None:
    assert parse_yaml("a: &a [1, 2]\nb: *a\nc: {<<: &m {x: 1}, y: 2}\n")["b"] == [1, 2]


def test_a_folder_that_holds_no_images_is_left_early(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.walk.MAX_OTHER_FILES", 50)
    (tree / "data.yaml").write_text("val: usr\nnames: [cat, dog]\n")
    (tree / "usr").mkdir()
    for number in range(100):
        (tree / "usr" / f"{number}.so").touch()
    with pytest.raises(DataError, match=r"usr has 51 files that are not images"):
        open_dataset(tree, "val")


@pytest.mark.parametrize("value", ['"a\\0b"', "x" * 5000, "[null]", "3", "{a: b}"])
@pytest.mark.parametrize("key", ["val", "path"])
def test_odd_paths_are_refused(key: str, value: str, tree: Path) -> None:
    (tree / "data.yaml").write_text("".join(f"{k}: {v}\n" for k, v in (BASE | {key: value}).items()))
    with pytest.raises(DataError, match=f"{key} is|does not exist"):
        open_dataset(tree, "val")


def test_a_download_entry_is_not_followed(tree: Path) -> None:
    (tree / "data.yaml").write_text(
        "val: images/val\nnames: [cat, dog]\ndownload: touch executed; https://example.org/x.zip\n"
    )
    before = sorted(tree.rglob("*"))
    assert len(open_dataset(tree, "val")) == 3
    assert sorted(tree.rglob("*")) == before


@pytest.mark.parametrize("line", ["a\0b.jpg", "x" * 5000 + ".jpg"])
def test_odd_lines_of_a_list_are_refused(line: str, tree: Path) -> None:
    (tree / "data.yaml").write_text("val: list.txt\nnames: [cat, dog]\n")
    (tree / "list.txt").write_text(f"images/val/0.jpg\n{line}\n")
    with pytest.raises(DataError, match="is not a file path"):
        open_dataset(tree, "val")


# -------------------------------------------------------------------------------------------------------------- labels
@pytest.mark.parametrize("line", ["0 .5 .5 .5 .5\n", "x y\n", "0 5 5 5 5\n"])
def test_a_million_lines_are_no_label_file(line: str, tree: Path) -> None:
    (tree / "labels" / "val" / "0.txt").write_text(line * 10**6)
    with pytest.raises(DataError, match=r"0\.txt has 1000000 lines"):
        open_dataset(tree, "val")


def test_a_line_of_60_megabytes_is_refused(tree: Path) -> None:
    (tree / "labels" / "val" / "0.txt").write_text("0 " + ".5 " * 20_000_000)
    with pytest.raises(DataError, match=r"0\.txt cannot be read: it has 60000002 bytes"):
        open_dataset(tree, "val")
    (tree / "labels" / "val" / "0.txt").write_text("0 " + ".5 " * 1_000_000)
    with pytest.raises(DataError, match="the longest of 3000002 characters"):
        open_dataset(tree, "val")


def test_many_bad_lines_are_counted(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "labels" / "val" / "0.txt").write_text("x y\n" * 5000)
    assert main([str(tree), "--split", "val"]) == 3
    printed = capsys.readouterr().out
    assert "4900 more lines that cannot be used" in printed
    assert len(printed) < 50_000


# ---------------------------------------------------------------------------------------------------------------- COCO
@pytest.fixture
def coco(tree: Path) -> Callable[..., Path]:
    (tree / "data.yaml").unlink()
    (tree / "annotations").mkdir()

    def write(categories: list[dict] | None = None, image: dict | None = None, **changes: object) -> Path:
        annotation = {
            "id": 1,
            "image_id": 1,
            "category_id": 1,
            "bbox": [1, 1, 5, 5],
            "area": 25,
            "iscrowd": 0,
        }
        content = {
            "images": [{"id": 1, "file_name": "0.jpg", "height": 40, "width": 60} | (image or {})],
            "annotations": [annotation | changes],
            "categories": categories or [{"id": 1, "name": "cat"}],
        }
        (tree / "annotations" / "instances_val.json").write_text(json.dumps(content))
        return tree

    return write


def test_a_hundred_thousand_categories_are_refused(coco: Callable[..., Path]) -> None:
    root = coco([{"id": number, "name": f"c{number}"} for number in range(100_000)])
    with pytest.raises(DataError, match="100000 categories"):
        open_dataset(root, "val")


def test_thousands_of_categories_are_read(coco: Callable[..., Path]) -> None:
    root = coco([{"id": number, "name": f"c{number}"} for number in range(20_000)])
    assert len(open_dataset(root, "val").names) == 20_000


@pytest.mark.parametrize("key", ["bbox", "area", "iscrowd", "image_id", "category_id", "height"])
def test_integers_beyond_floats_are_named_or_counted(key: str, coco: Callable[..., Path]) -> None:
    huge = 10**400
    value = [huge, 1, 1, 1] if key == "bbox" else huge
    root = coco(image={key: value}) if key == "height" else coco(**{key: value})
    if key == "area":
        assert any("areas are not positive numbers" in note for note in open_dataset(root, "val").notes)
        return
    with pytest.raises(DataError) as caught:
        open_dataset(root, "val")
    assert len(str(caught.value)) < 1000


def test_integers_of_thousands_of_digits_are_refused(coco: Callable[..., Path]) -> None:
    file = coco(area=777) / "annotations" / "instances_val.json"
    file.write_text(file.read_text().replace("777", "9" * 5000))
    with pytest.raises(DataError, match="cannot be read as JSON"):
        open_dataset(file.parents[1], "val")


@pytest.mark.parametrize("text", ["[" * 200_000, '{"images": ' + "[" * 100_000 + "]" * 100_000 + "}"])
def test_deep_json_is_refused(text: str, coco: Callable[..., Path]) -> None:
    file = coco() / "annotations" / "instances_val.json"
    file.write_text(text)
    with pytest.raises(DataError, match="cannot be read as JSON"):
        open_dataset(file.parents[1], "val")


def test_many_unknown_ids_do_not_take_a_time_by_the_square(coco: Callable[..., Path]) -> None:
    file = coco() / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    content["images"] = [content["images"][0] | {"id": n, "file_name": f"{n}.jpg"} for n in range(20_000)]
    content["annotations"] = [content["annotations"][0] | {"image_id": f"x{n}"} for n in range(20_000)]
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="20000 faults"):
        open_dataset(file.parents[1], "val")


def test_two_categories_of_one_id_are_refused(coco: Callable[..., Path]) -> None:
    root = coco([{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}])
    with pytest.raises(DataError, match=r"categories 'cat', 'dog' share the id 1"):
        open_dataset(root, "val")


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "../../../../../../etc/passwd", "/etc/passwd"])
def test_odd_file_names_are_refused(name: str, coco: Callable[..., Path]) -> None:
    with pytest.raises(DataError):
        open_dataset(coco(image={"file_name": name}), "val")


# -------------------------------------------------------------------------------------------- no files, and their names
@pytest.mark.parametrize("name", ["data.yaml", "labels/val/0.txt", "images/val/0.jpg", "list.txt", "COCO"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_end_no_run_in_a_wait(name: str, kind: str, tree: Path) -> None:
    if name == "list.txt":
        (tree / "data.yaml").write_text("val: list.txt\nnames: [cat, dog]\n")
    if name == "COCO":
        (tree / "data.yaml").unlink()
        (tree / "annotations").mkdir()
        name = "annotations/instances_val.json"
    file = tree / name
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    try:
        left = len(open_dataset(tree, "val"))
    except DataError:
        return
    assert left < 3 or name.startswith("labels")


def test_terminal_escapes_in_class_names_are_not_printed(
    coco: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = coco([{"id": 1, "name": "\x1b[31mred\x07\u202e"}])
    assert main([str(root), "--split", "val"]) == 0
    printed = capsys.readouterr().out
    assert "\\x1b[31mred\\x07\\u202e" in printed
    assert not {"\x1b", "\x07", "\u202e"} & set(printed)
