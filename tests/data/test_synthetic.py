import hashlib
import json
import time
from pathlib import Path

import numpy as np
import pytest

from core.errors import DataError
from data import generate_synthetic, open_dataset
from data.formats.synthetic_scene import CLASSES, draw_scene


def digest(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_arguments_same_bytes(tmp_path: Path):
    first = digest(generate_synthetic(tmp_path / "a", 6, 3, 96, 1))
    assert first == digest(generate_synthetic(tmp_path / "b", 6, 3, 96, 1))
    assert len([name for name in first if name.endswith(".png")]) == 9
    other = digest(generate_synthetic(tmp_path / "c", 6, 3, 96, 2))
    assert all(other[name] != value for name, value in first.items() if name.endswith(".png"))


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path: Path):
    few, many = (digest(generate_synthetic(tmp_path / str(n), n, 2, 96, 1)) for n in (3, 8))
    assert few["images/train/000003.png"] == many["images/train/000003.png"]
    assert few["images/train/000001.png"] != few["images/val/000001.png"]


def test_second_call_reuses_and_other_arguments_replace(tmp_path: Path):
    root = generate_synthetic(tmp_path / "set", 4, 2, 96, 0)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    generate_synthetic(root, 4, 2, 96, 0)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    generate_synthetic(root, 5, 2, 96, 0)
    assert len(open_dataset(root, "train")) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["set"]  # nothing temporary is left


def test_an_incomplete_set_is_made_again(tmp_path: Path):
    root = generate_synthetic(tmp_path / "set", 4, 2, 96, 0)
    before = digest(root)
    (root / "images/train/000002.png").unlink()
    generate_synthetic(root, 4, 2, 96, 0)
    assert digest(root) == before


def test_a_failed_call_leaves_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("data.formats.synthetic.draw_scene", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate_synthetic(tmp_path / "set", 2, 2, 96, 0)
    assert list(tmp_path.iterdir()) == []


def test_other_content_is_never_overwritten(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="will not be overwritten"):
        generate_synthetic(tmp_path, 2, 2, 96, 0)
    assert (tmp_path / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("arguments", [(0, 1, 96, 0), (1, 0, 96, 0), (1, 1, 16, 0), (1, 1, 96, -1)])
def test_arguments_out_of_range(tmp_path: Path, arguments):
    with pytest.raises(DataError, match="expected at least"):
        generate_synthetic(tmp_path / "set", *arguments)


def test_content_has_what_the_task_needs(tmp_path: Path):
    root = generate_synthetic(tmp_path / "set", 60, 5, 192, 0)
    dataset = open_dataset(root, "train")
    labels = np.concatenate([record.labels for record in dataset.records])
    boxes = np.concatenate([record.boxes for record in dataset.records])
    assert dataset.names == CLASSES
    assert np.bincount(labels, minlength=4).min() > 0.15 * len(labels)  # no rare class
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = sides.prod(axis=1)
    assert sides.min() >= 2
    assert 0.15 < (areas < 20**2).mean() < 0.6  # many small objects
    assert (areas > 48**2).mean() > 0.1
    assert any(overlaps(record.boxes) for record in dataset.records)
    content = json.loads((root / "annotations/instances_train.json").read_text())
    assert set(content) == {"info", "images", "annotations", "categories"}


def overlaps(boxes: np.ndarray) -> bool:
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (high - low).clip(0).prod(axis=2)
    np.fill_diagonal(shared, 0)
    return bool((shared > 0).any())


def test_boxes_hold_their_objects(monkeypatch):
    """Without background and noise, the pixels that were painted must fill the boxes exactly."""
    monkeypatch.setattr(
        "data.formats.synthetic_scene._background", lambda size, _: np.zeros((size, size, 3), np.float32)
    )
    monkeypatch.setattr("data.formats.synthetic_scene._camera", lambda canvas, _: canvas)

    def paint(window, shape, solid, random):
        window[solid] = 255

    monkeypatch.setattr("data.formats.synthetic_scene._paint", paint)
    monkeypatch.setattr(
        "data.formats.synthetic_scene._hides_too_much", lambda owners, areas: bool((owners >= 0).any())
    )
    for number in range(20):
        canvas, objects = draw_scene(192, (0, 0, number))
        painted = (canvas > 0).any(axis=2)
        inside = np.zeros_like(painted)
        for x1, y1, x2, y2 in (item.box for item in objects):
            part = painted[int(y1) : int(y2), int(x1) : int(x2)]
            assert part.any(axis=0)[[0, -1]].all()
            assert part.any(axis=1)[[0, -1]].all()
            inside[int(y1) : int(y2), int(x1) : int(x2)] = True
        assert objects
        assert not (painted & ~inside).any()


def test_made_in_seconds(tmp_path: Path):
    start = time.perf_counter()
    generate_synthetic(tmp_path / "set", 200, 50, 160, 0)
    assert time.perf_counter() - start < 20  # two busy cores take 2 s
