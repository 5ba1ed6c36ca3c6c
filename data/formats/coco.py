"""Reads COCO JSON: `annotations/instances_<split>*.json` with its images.

Category ids may have gaps (COCO's own go from 1 to 90 for 80 classes): class indices follow the sorted ids. Crowd
regions and segmentation areas are kept, since the COCO metric uses both.
"""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.errors import DataError
from core.names import listing
from data.images import ImageHeader, scan_images
from data.masks import Segmentation, parse_segmentation
from data.samples import ImageRecord


class _Entry(NamedTuple):
    """One annotation: class, box as x y width height, crowd, area, and its mask as the file has it."""

    label: int
    box: list[float]
    crowd: bool
    area: float
    segmentation: Any


def find_annotations(root: Path, split: str) -> Path | None:
    """The split's annotation file under `root`, or None where there is none.

    `instances_val.json` is taken before `instances_val2017.json`; two of the latter kind are an error.
    """
    folder = root / "annotations"
    exact = folder / f"instances_{split}.json"
    if exact.is_file():
        return exact
    found = sorted(folder.glob(f"instances_{split}*.json"))
    if len(found) > 1:
        raise DataError(
            f"{folder} has several annotation files for split {split!r}: {listing([path.name for path in found])}. "
            f"Rename the one to use to {exact.name}."
        )
    return found[0] if found else None


def read_coco(
    annotation_file: Path, root: Path, verify: bool, cache_dir: Path | None, segments: bool = False
) -> tuple[tuple[str, ...], list[ImageRecord]]:
    """Read one COCO annotation file.

    Args:
        annotation_file: the JSON file.
        root: folder under which the images are looked for: `images/<split>`, `<split>`, `images`, or itself, where
            `<split>` is what follows `instances_` in the file's name.
        verify: decode every image once.
        cache_dir: see `scan_images`.
        segments: keep the masks, too; every annotation must have one.

    Returns:
        Class names by sorted category id and one record per image, sorted by image id. Boxes may still leave the
        image or be empty: the dataset cleans them.

    Raises:
        DataError: anything missing, empty or malformed; names the file and entry.
    """
    content = _load_json(annotation_file)
    try:
        categories = sorted(content["categories"], key=lambda category: category["id"])
        class_of = {category["id"]: index for index, category in enumerate(categories)}
        names = tuple(str(category["name"]) for category in categories)
        images = sorted(content["images"], key=lambda image: image["id"])
        entries = _group_annotations(
            content["annotations"], class_of, {i["id"] for i in images}, annotation_file
        )
        file_names = [str(image["file_name"]) for image in images]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{annotation_file} is not COCO JSON: {type(error).__name__} {error}") from error
    if not images or not names:
        raise DataError(f"{annotation_file} is empty: {len(images)} images, {len(names)} categories.")
    if len({image["id"] for image in images}) != len(images):
        raise DataError(f"{annotation_file}: some images share an id; every image needs its own.")
    folder = _image_folder(root, annotation_file, file_names)
    paths = [folder / name for name in file_names]
    headers = scan_images(paths, verify, cache_dir)
    records = [
        _record(path, image, header, entries[image["id"]], annotation_file, segments)
        for path, image, header in zip(paths, images, headers, strict=True)
    ]
    return names, records


def _load_json(annotation_file: Path) -> dict[str, Any]:
    try:
        content = json.loads(annotation_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{annotation_file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(
            f"{annotation_file} holds a {type(content).__name__}, expected images, annotations, categories."
        )
    return content


def _group_annotations(
    annotations: list[dict[str, Any]], class_of: dict[int, int], image_ids: set[int], annotation_file: Path
) -> dict[int, list[_Entry]]:
    """Sort annotations by image."""
    grouped: dict[int, list[_Entry]] = defaultdict(list)
    for entry in annotations:
        place = f"{annotation_file}: annotation {entry.get('id')!r}"
        if entry["category_id"] not in class_of:
            raise DataError(
                f"{place} has category_id {entry['category_id']!r}, which is not among the categories."
            )
        if entry["image_id"] not in image_ids:
            raise DataError(f"{place} has image_id {entry['image_id']!r}, which is not among the images.")
        box = entry["bbox"]
        if len(box) != 4 or not all(isinstance(value, int | float) for value in box):
            raise DataError(
                f"{place} has bbox {box!r}, expected four numbers: x, y, width, height in pixels."
            )
        area = float(entry.get("area") or box[2] * box[3])
        area = area if math.isfinite(area) else box[2] * box[3]
        label, crowd = class_of[entry["category_id"]], bool(entry.get("iscrowd", 0))
        grouped[entry["image_id"]].append(_Entry(label, box, crowd, area, entry.get("segmentation")))
    return grouped


def _image_folder(root: Path, annotation_file: Path, file_names: list[str]) -> Path:
    split = annotation_file.stem.removeprefix("instances_")
    candidates = [root / "images" / split, root / split, root / "images", root]
    for folder in candidates:
        if (folder / file_names[0]).is_file():
            return folder
    raise DataError(
        f"{annotation_file} names {file_names[0]!r}, which is in none of "
        f"{listing([str(folder) for folder in candidates])}. Put the images into the first of these folders."
    )


def _record(
    path: Path,
    image: dict[str, Any],
    header: ImageHeader,
    entries: list[_Entry],
    annotation_file: Path,
    segments: bool,
) -> ImageRecord:
    if not isinstance(image["id"], int) or image["id"] < 0:
        raise DataError(f"{annotation_file}: image id {image['id']!r}, expected a whole number from 0.")
    declared = (image.get("height"), image.get("width"))
    apply_orientation = declared != header.size(False) or declared == header.size(True)
    size = header.size(apply_orientation)
    if declared not in (size, (None, None)):
        raise DataError(
            f"{annotation_file}: {path} is declared {declared[0]} high and {declared[1]} wide, but the file has "
            f"{size[0]} and {size[1]}. The boxes refer to another version of the image; correct one of the two."
        )
    labels = np.array([entry.label for entry in entries], np.int64)
    boxes = np.array([entry.box for entry in entries], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    crowd = np.array([entry.crowd for entry in entries], bool)
    areas = np.array([entry.area for entry in entries], np.float64)
    masks = (
        [_segmentation(entry, size, f"{annotation_file}: {path.name}") for entry in entries]
        if segments
        else None
    )
    return ImageRecord(path, image["id"], size, boxes, labels, crowd, areas, apply_orientation, masks)


def _segmentation(entry: _Entry, size: tuple[int, int], place: str) -> Segmentation:
    try:
        return parse_segmentation(entry.segmentation, size)
    except ValueError as error:
        raise DataError(
            f"{place}: the object with bbox {entry.box} has as segmentation {error}. A segmentation network needs a "
            "mask for every object; correct the annotation, or use a detection network."
        ) from error
