"""What verification accepts is what reading decodes: kinds of image file that two libraries see differently."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from core.errors import DataError
from data import list_images, open_dataset
from data.images import _verified, scan_images

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
TURNED = 6


def save(root: Path, name: str, pixels: np.ndarray = PIXELS, mode: str | None = None, **options) -> None:
    """Replace the validation image by a file that Pillow writes."""
    (root / "images/val/c.jpg").unlink()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(root / "images/val" / name, **options)


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


FLOATS = np.random.default_rng(1).random((40, 60), np.float32)


@pytest.mark.parametrize(
    ("pixels", "options", "kind"),
    [
        (FLOATS, {}, "mode F"),
        ((FLOATS * 1000).astype(np.int32), {}, "mode I"),
        (PIXELS, {"compression": "zstd"}, "TIFF, mode RGB"),
        (PIXELS, {"compression": "lzma"}, "TIFF, mode RGB"),
        (PIXELS, {"exif": orientation(TURNED)}, "TIFF, mode RGB"),
    ],
    ids=["float", "int32", "zstd", "lzma", "turned"],
)
def test_what_is_verified_can_be_read(yolo_root: Path, pixels: np.ndarray, options: dict, kind: str) -> None:
    """Either the file is named when the dataset is opened, or its image is there afterwards; libraries change."""
    save(yolo_root, "c.tif", pixels, **options)
    message = ""
    try:
        sample = open_dataset(yolo_root, "val")[0]
    except DataError as error:
        message = str(error)
    if cv2.imread(str(yolo_root / "images/val/c.tif")) is not None:
        assert sample.image.shape[:2] == sample.size
        return
    for part in ("1 of 1 images cannot be read", "c.tif", kind, "convert it to PNG or JPEG"):
        assert part in message


@pytest.mark.parametrize(("name", "format"), [("c.png", "ICO"), ("c.tif", "DDS"), ("c.png", "XBM")])
def test_kinds_that_only_one_library_knows_are_named(yolo_root: Path, name: str, format: str) -> None:
    save(yolo_root, name, mode="1" if format == "XBM" else "RGB", format=format)
    with pytest.raises(DataError, match=rf"{format}, mode .*: OpenCV does not decode it; convert it"):
        open_dataset(yolo_root, "val")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("value", [1, 3, 5, TURNED, 8])
def test_orientation_in_every_format(yolo_root: Path, suffix: str, value: int) -> None:
    """The size on record, which boxes are scaled by, is that of the decoded image."""
    save(yolo_root, f"c.{suffix}", exif=orientation(value))
    (yolo_root / "labels/val/c.txt").write_text("0 0.5 0.5 1 1\n")
    sample = open_dataset(yolo_root, "val")[0]
    height, width = sample.image.shape[:2]
    assert sample.size == (height, width)
    assert sample.boxes.tolist() == [[0, 0, width, height]]
    if suffix == "jpg":
        assert (height, width) == ((60, 40) if value >= 5 else (40, 60))


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("c.jpg", "CMYK", {}),
        ("c.jpg", "L", {"progressive": True}),
        ("c.png", "P", {}),
        ("c.png", "LA", {}),
        ("c.png", "1", {}),
        ("c.tif", "CMYK", {}),
        ("c.tif", "RGB", {"compression": "tiff_lzw"}),
        ("c.tif", "RGB", {"compression": "jpeg"}),
        ("c.bmp", "P", {}),
        ("c.webp", "RGBA", {"lossless": True}),
        ("c.jpg", "RGB", {"format": "PNG"}),
    ],
)
def test_usual_kinds_are_read(yolo_root: Path, name: str, mode: str, options: dict) -> None:
    save(yolo_root, name, mode=mode, **options)
    dataset = open_dataset(yolo_root, "val")
    assert dataset[0].image.shape == (40, 60, 3)


def test_an_earlier_verification_does_not_count(yolo_root: Path, tmp_path: Path, monkeypatch) -> None:
    """What another version of the checks, or of OpenCV, has verified is verified again."""
    path = yolo_root / "images/val/c.jpg"
    with monkeypatch.context() as patched:
        patched.setattr("data.images.CHECKS", "1, OpenCV 4")
        scan_images([path], cache_dir=tmp_path)
    monkeypatch.setattr("data.images.read_header", lambda *_: pytest.fail("verified again"))
    with pytest.raises(pytest.fail.Exception, match="verified again"):
        scan_images([path], cache_dir=tmp_path)


def test_a_folder_of_pictures_to_look_at_is_walked_likewise(tmp_path: Path, write_image, caplog) -> None:
    root = tmp_path / "set"
    write_image(root / "1.jpg")
    write_image(root / "._1.jpg")
    write_image(root / ".ipynb_checkpoints/1-checkpoint.jpg")
    write_image(tmp_path / "elsewhere/2.jpg")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert [path.relative_to(root).as_posix() for path in list_images(root)] == ["1.jpg", "linked/2.jpg"]
    assert "Left out 1 broken links" in caplog.text
    (tmp_path / "list.txt").write_bytes("set/1.jpg\r\n".encode("utf-16"))
    assert list_images(tmp_path / "list.txt") == [tmp_path / "set/1.jpg"]


@pytest.mark.parametrize(
    ("new", "sentence"),
    [
        (0, "205 images: all verified by an earlier run"),
        (205, "205 images: 205 verified in 1.5 s"),
        (5, "205 images: 5 verified in 1.5 s, 200 were by an earlier run"),
    ],
)
def test_the_log_says_how_many_images_were_known(new: int, sentence: str) -> None:
    assert _verified(205, new, 1.5) == sentence
