"""A detection set that is made on the spot, so that the main job runs without a download.

It is easy enough that a small detector learns it in minutes and hard enough that accuracy can be lost: cluttered
backgrounds, objects from a fifth to almost half of the image and some much smaller, overlaps, four classes of which two
pairs look alike, and noise. Each image depends only on (seed, split, number), so it is the same whatever was made
around it and on however many threads.
"""

import json
import os
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2

from core.errors import DataError
from data.formats.synthetic_scene import CLASSES, SceneObject, draw_scene

VERSION = 3  # raise when a change makes other files from the same arguments
_MANIFEST = "synthetic.json"
_SPLITS = ("train", "val")


def generate_synthetic(root: Path | str, train: int, val: int, size: int, seed: int) -> Path:
    """Write the synthetic set as COCO JSON with masks and PNG images, or keep it where it is already there.

    The set is written beside `root` and moved there when complete, so a stopped call leaves nothing half done.

    Args:
        root: folder to make. It may exist if it is empty or holds a synthetic set; one made with other arguments is
            replaced.
        train: number of training images, at least 1.
        val: number of validation images, at least 1.
        size: side of the square images, pixels, at least 64.
        seed: of everything random, not negative.

    Returns:
        `root`, for `open_dataset`.

    Raises:
        DataError: an argument out of range, or a folder with other content.
    """
    root = Path(root)
    for name, value, least in (("train", train, 1), ("val", val, 1), ("size", size, 64), ("seed", seed, 0)):
        if value < least:
            raise DataError(f"Synthetic set: {name} is {value}, expected at least {least}.")
    manifest = {"version": VERSION, "train": train, "val": val, "size": size, "seed": seed}
    existing = _read_manifest(root)
    if existing == manifest:
        return root
    if existing is None and root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DataError(
            f"{root} exists and is not a synthetic set; choose another folder, it will not be overwritten."
        )
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = root.parent / f".{root.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        for split, count in zip(_SPLITS, (train, val), strict=True):
            _write_split(temporary, split, count, size, seed)
        (temporary / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        _move_into_place(temporary, root, manifest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root


def _read_manifest(root: Path) -> dict[str, Any] | None:
    """The manifest of a complete synthetic set, None where there is none."""
    file = root / _MANIFEST
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}); remove {root} to generate it again.") from error
    if not isinstance(manifest, dict):
        raise DataError(f"{file} is damaged; remove {root} to generate it again.")
    complete = all(
        (root / "annotations" / f"instances_{split}.json").is_file()
        and sum(1 for _ in (root / "images" / split).glob("*.png")) == manifest.get(split)
        for split in _SPLITS
    )
    return manifest if complete else {}


def _write_split(folder: Path, split: str, count: int, size: int, seed: int) -> None:
    images = folder / "images" / split
    images.mkdir(parents=True)

    def make(number: int) -> list[SceneObject]:
        image, objects = draw_scene(size, (seed, _SPLITS.index(split), number))
        file = images / _file_name(number)
        if not cv2.imwrite(str(file), image[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1]):
            raise DataError(f"Cannot write {file}: is the disk full?")
        return objects

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        scenes = list(pool.map(make, range(count)))
    annotations: list[dict[str, Any]] = []
    for number, objects in enumerate(scenes):
        for item in objects:
            x1, y1, x2, y2 = item.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": item.label + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": item.area,
                    "segmentation": [item.outline.round(2).reshape(-1).tolist()],
                    "iscrowd": 0,
                }
            )
    content = {
        "info": {"description": "Synthetic shapes"},
        "images": [
            {"id": number + 1, "file_name": _file_name(number), "width": size, "height": size}
            for number in range(count)
        ],
        "annotations": annotations,
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(CLASSES)],
    }
    file = folder / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def _file_name(number: int) -> str:
    return f"{number + 1:06d}.png"


def _move_into_place(temporary: Path, root: Path, manifest: dict[str, Any]) -> None:
    """Rename, first removing an older synthetic set. Another process may have been faster with the same set."""
    if _read_manifest(root) is not None:
        shutil.rmtree(root)
    try:
        temporary.replace(root)
    except OSError as error:
        if _read_manifest(root) != manifest:
            raise DataError(f"Cannot move the synthetic set to {root}: {error}") from error
