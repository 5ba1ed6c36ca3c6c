"""Datasets: data.yaml, lists of images, labels, COCO JSON, pictures."""

from __future__ import annotations

import io
import random
import struct
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.fuzzing.mutations import Read, as_text, mutate_bytes, to_json, to_yaml
from data import open_dataset


@cache
def picture(kind: str) -> bytes:
    """A small picture in a format of Pillow's."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    image = Image.fromarray(pixels)
    if kind == "GIF":
        image.save(stream, kind, save_all=True, append_images=[image.rotate(90)])
    elif kind == "PNG16":
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 256).save(stream, "PNG")
    elif kind in ("CMYK", "EXIF"):
        exif = image.getexif()
        exif[0x0112] = 6
        image.convert("CMYK" if kind == "CMYK" else "RGB").save(stream, "JPEG", exif=exif)
    else:
        image.save(stream, kind)
    return stream.getvalue()


def yolo_tree(folder: Path) -> Path:
    """A YOLO tree of two images, with its data.yaml; returns its root."""
    for name in ("a", "b"):
        for part, suffix, content in (
            ("images", ".jpg", picture("JPEG")),
            ("labels", ".txt", b"0 .5 .5 .5 .5\n"),
        ):
            path = folder / part / "val" / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    (folder / "data.yaml").write_text("path: .\nval: images/val\nnames: [cat, dog]\n")
    return folder


def make_data_yaml(chance: random.Random, folder: Path) -> Read:
    """A YOLO data.yaml."""
    content = {
        "path": ".", "train": "images/val", "val": ["images/val"], "names": {0: "cat", 1: "dog"}, "nc": 2,
        "kpt_shape": [0, 0], "download": "touch downloaded",
    }  # fmt: skip
    (yolo_tree(folder) / "data.yaml").write_bytes(as_text(chance, content, to_yaml))
    return lambda: open_dataset(folder, "val")


def make_list(chance: random.Random, folder: Path) -> Read:
    """A list of images."""
    yolo_tree(folder)
    (folder / "data.yaml").write_text("val: list.txt\nnames: [cat, dog]\n")
    lines = b"images/val/a.jpg\n./images/val/b.jpg\r\nimages\\val\\b.jpg\n"
    (folder / "list.txt").write_bytes(mutate_bytes(chance, lines))
    return lambda: open_dataset(folder, "val")


def make_labels(chance: random.Random, folder: Path) -> Read:
    """Labels of one image: boxes, an outline, keypoints."""
    lines = (
        b"0 0.5 0.5 0.5 0.5\n1 0.1 0.1 0.9 0.1 0.5 0.9\n0 0.25 0.25 0.1 0.1\n1 .5 .5 .4 .4 .5 .5 2 .4 .4 1\n"
    )
    (yolo_tree(folder) / "labels" / "val" / "a.txt").write_bytes(mutate_bytes(chance, lines))
    segments = chance.random() < 0.3
    return lambda: open_dataset(folder, "val", segments=segments)


def make_coco(chance: random.Random, folder: Path) -> Read:
    """COCO JSON."""
    images = [
        {"id": n, "file_name": f"{name}.jpg", "height": 32, "width": 48} for n, name in ((7, "a"), (9, "b"))
    ]
    shapes: list[Any] = [[[1, 1, 9, 1, 9, 9]], {"size": [32, 48], "counts": [100, 36, 1400]}]
    annotations = [
        {
            "id": number, "image_id": image, "category_id": 5, "bbox": [1.5, 2, 10, 20], "area": 150.0,
            "iscrowd": crowd,
            "segmentation": shapes[crowd],
        }
        for number, image, crowd in ((1, 7, 0), (2, 9, 1), (3, 9, 0))
    ]  # fmt: skip
    categories = [{"id": 5, "name": "cat"}, {"id": 90, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories, "info": {}}
    yolo_tree(folder)
    (folder / "data.yaml").unlink()
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_val.json").write_bytes(as_text(chance, content, to_json))
    segments = chance.random() < 0.5
    return lambda: open_dataset(folder, "val", segments=segments)


def make_image(chance: random.Random, folder: Path) -> Read:
    """A picture, with the suffix of its kind or of another one."""
    kind = chance.choice(("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PNG16", "CMYK", "EXIF", "PPM"))
    suffix = chance.choice((".jpg", ".png", ".bmp", ".webp", ".tif"))
    yolo_tree(folder)
    for old in (folder / "images" / "val").glob("a.*"):
        old.unlink()
    data = bytearray(mutate_bytes(chance, picture(kind)) if chance.random() < 0.9 else picture(kind))
    if kind.startswith("PNG") and chance.random() < 0.3 and len(data) > 24:  # another size, as bombs declare
        data[16:24] = struct.pack(
            ">II", chance.choice((1, 2**14, 2**31 - 1)), chance.choice((1, 2**13, 2**20))
        )
    (folder / "images" / "val" / f"a{suffix}").write_bytes(bytes(data))

    def look() -> None:
        dataset = open_dataset(folder, "val")
        for index in range(len(dataset)):
            dataset[index]

    return look
