"""Pictures of strangers: bombs are refused by their header; files that change in mid-run are named."""

from __future__ import annotations

import logging
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from core.errors import DataError, DeployError
from core.pictures import MAX_SIDE, check_picture
from data import AugmentOptions, build_loader, list_images, open_dataset, read_image
from data.images import scan_images
from deploy.check.fix import _read_images
from pipeline.prediction.sources import open_source


def write_png(path: Path, width: int, height: int) -> None:
    """A grey PNG of zeros: 30,000 x 30,000 pixels take 900 kB."""
    packer = zlib.compressobj(1)
    row = bytes(width + 1)
    rows = b"".join(packer.compress(row) for _ in range(min(height, 2000))) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    packed = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


@pytest.mark.parametrize(("width", "height"), [(13_000, 13_000), (30_000, 30_000), (40_000, 1), (1, 40_000)])
def test_bombs_are_refused_before_they_are_decoded(
    width: int, height: int, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = tree / "images" / "val" / "0.png"
    for good in bomb.parent.glob("*.jpg"):
        good.unlink()
    write_png(bomb, width, height)
    monkeypatch.setattr(cv2, "imread", lambda *_: pytest.fail("it was decoded"))
    for read in (
        lambda: scan_images([bomb]),
        lambda: scan_images([bomb], verify=False),
        lambda: read_image(bomb),
        lambda: list(open_source(bomb).pictures()),
        lambda: _read_images(bomb.parent, (64, 64)),
    ):
        with pytest.raises((DataError, DeployError), match=r"0\.png"):
            read()


@pytest.mark.parametrize(("width", "height"), [(10_000, 10), (1, 1), (MAX_SIDE, 2)])
def test_long_and_tiny_pictures_are_read(width: int, height: int, tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", width, height)
    assert check_picture(tmp_path / "a.png") == (height, width)
    assert read_image(tmp_path / "a.png").shape == (height, width, 3)
    assert scan_images([tmp_path / "a.png"])[0].size() == (height, width)


def test_what_pillow_does_not_know_is_not_decoded(tmp_path: Path) -> None:
    """OpenCV would: a Radiance picture says its size in text, and may say any."""
    path = tmp_path / "a.png"
    path.write_bytes(b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 30000 +X 30000\n" + bytes(1000))
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(path)
    assert list_images(path) == [path]


# -------------------------------------------------------------------------------------------------- changes in mid-run
def many(tree: Path, number: int) -> None:
    """Copy the first training image until there are so many."""
    for part, suffix in (("images", ".jpg"), ("labels", ".txt")):
        content = (tree / part / "train" / f"0{suffix}").read_bytes()
        for index in range(3, number):
            (tree / part / "train" / f"{index}{suffix}").write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-400])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("change", [cut, Path.unlink], ids=["truncated", "missing"])
def test_a_training_image_that_is_damaged_in_mid_run_is_skipped_by_name(
    workers: int, change: object, tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    many(tree, 110)
    dataset = open_dataset(tree, "train")
    change(tree / "images" / "train" / "7.jpg")  # type: ignore[operator]
    loader = build_loader(dataset, 32, 10, workers, augment=AugmentOptions(mosaic=0.0), shuffle=True)
    with caplog.at_level(logging.WARNING, "data"):
        batches = [list(loader) for _ in range(2)]
    assert [len(batch) for batch in batches[0]] == [10] * 11
    said = [
        record.getMessage() for record in caplog.records if "Skipped a training image" in record.getMessage()
    ]
    assert len(said) == 1
    assert "7.jpg" in said[0]


def test_too_many_damaged_training_images_end_the_run(tree: Path) -> None:
    many(tree, 110)
    dataset = open_dataset(tree, "train")
    for index in (7, 50, 90):
        cut(tree / "images" / "train" / f"{index}.jpg")
    loader = build_loader(dataset, 32, 10, augment=AugmentOptions(mosaic=0.5))
    with pytest.raises(DataError, match=r"of 110 training images can no longer be read, more than 1.*\.jpg"):
        for _ in loader:
            pass


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_a_figure_are_never_skipped(workers: int, tree: Path) -> None:
    """Validation and calibration: another image would give another figure."""
    dataset = open_dataset(tree, "val")
    cut(tree / "images" / "val" / "1.jpg")
    with pytest.raises(DataError, match=r"1\.jpg changed since the run began and is damaged"):
        list(build_loader(dataset, 32, 1, workers))


def test_a_file_that_was_touched_is_sound(tree: Path) -> None:
    dataset = open_dataset(tree, "val")
    before = dataset[0].image
    (tree / "images" / "val" / "0.jpg").touch()
    np.testing.assert_array_equal(dataset[0].image, before)
