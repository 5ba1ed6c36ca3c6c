"""Reads YOLO trees: a `data.yaml`, folders of images, and one text file of normalised boxes per image.

Layout: `images/.../name.jpg` has its objects in `labels/.../name.txt`, one per line: class, centre x, centre y, width,
height, all but the class as fractions of the image (in its EXIF orientation). A line with an outline (class and three
or more points) counts as the outline's bounding box, and
the outline is kept where masks are asked for. An image without a label file has no objects.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from core.errors import DataError
from core.names import listing
from data.images import SUFFIXES, scan_images
from data.masks import Outlines, polygon_area
from data.samples import ImageRecord

_TOLERANCE = 0.01  # how far a fraction may leave [0, 1] by rounding before it is taken for a pixel value


def read_yolo(
    yaml_file: Path, split: str, verify: bool, cache_dir: Path | None, segments: bool = False
) -> tuple[tuple[str, ...], list[ImageRecord]]:
    """Read one split of a YOLO tree.

    Args:
        yaml_file: the `data.yaml`.
        split: key of the split in it, `train` or `val`.
        verify: decode every image once.
        cache_dir: see `scan_images`.
        segments: keep the outlines, too; every line must have one. Areas are then those of the outlines.

    Returns:
        Class names and one record per image, ids from 1 in the order of the sorted paths. Boxes are clipped to
        the image and may be empty or NaN: the dataset leaves those out.

    Raises:
        DataError: anything missing, empty or malformed; names the file and line.
    """
    config = _load_yaml(yaml_file)
    names = _class_names(config, yaml_file)
    paths = _image_paths(config, yaml_file, split)
    label_paths = [label_path(path) for path in paths]
    _check_label_folders(paths, label_paths, split)
    headers = scan_images(paths, verify, cache_dir)
    records = []
    for number, (path, labels_file, header) in enumerate(
        zip(paths, label_paths, headers, strict=True), start=1
    ):
        size = header.size()
        labels, boxes, outlines = _read_labels(labels_file, len(names), size, segments)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        if segments:
            areas = np.array([polygon_area(outline) for outline in outlines], np.float64)
        crowd = np.zeros(len(labels), bool)
        masks = outlines if segments else None
        records.append(ImageRecord(path, number, size, boxes, labels, crowd, areas, segments=masks))
    return names, records


def label_path(image: Path) -> Path:
    """Where an image's labels lie: the last folder called `images` becomes `labels`, the suffix becomes `.txt`.

    Example: `set/images/val/7.jpg` has `set/labels/val/7.txt`; without such a folder they lie beside the image.
    """
    parts = list(image.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _load_yaml(yaml_file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(yaml_file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{yaml_file} cannot be read as YAML: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"{yaml_file} holds {type(config).__name__}, expected keys: path, train, val, names.")
    return config


def _class_names(config: dict[str, Any], yaml_file: Path) -> tuple[str, ...]:
    names, count = config.get("names"), config.get("nc")
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise DataError(
                f"{yaml_file}: names has the keys {sorted(map(str, names))}, expected 0 to {len(names) - 1}."
            )
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(
            f"{yaml_file}: names is {names!r}, expected a list of class names or a map from index to name."
        )
    if count is not None and count != len(names):
        raise DataError(
            f"{yaml_file}: nc is {count!r} but names has {len(names)} entries; remove nc or correct names."
        )
    return tuple(str(name) for name in names)


def _image_paths(config: dict[str, Any], yaml_file: Path, split: str) -> list[Path]:
    value = config.get(split)
    sources = value if isinstance(value, list) else [value]
    if not sources or not all(isinstance(source, str) and source for source in sources):
        raise DataError(
            f"{yaml_file}: {split} is {value!r}, expected a folder of images, a .txt list, or a list of them."
        )
    root = yaml_file.parent / str(config.get("path") or ".")
    if not root.is_dir():
        raise DataError(
            f"{yaml_file}: path leads to {root}, which does not exist. It is relative to the YAML file; "
            "correct it, or remove it if the images lie beside the file."
        )
    paths: list[Path] = []
    for source in map(str, sources):
        paths += _expand_source(root / source, yaml_file, split)
    if not paths:
        raise DataError(f"{yaml_file}: split {split!r} is empty: no image in {value!r} under {root}.")
    return sorted(set(paths))


def _expand_source(source: Path, yaml_file: Path, split: str) -> list[Path]:
    if source.is_dir():
        return [path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    if source.is_file() and source.suffix.lower() == ".txt":
        return _read_list(source, yaml_file.parent)
    raise DataError(
        f"{yaml_file}: {split} leads to {source}, which is neither a folder nor a .txt list of images."
    )


def _read_list(list_file: Path, yaml_folder: Path) -> list[Path]:
    paths, missing = [], []
    for line in list_file.read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        candidates = [list_file.parent / line.strip(), yaml_folder / line.strip()]
        existing = next((path for path in candidates if path.is_file()), None)
        if existing is None:
            missing.append(line.strip())
        else:
            paths.append(existing)
    if missing:
        raise DataError(
            f"{list_file}: {len(missing)} listed images do not exist: {listing(missing)}. "
            f"Paths may be relative to {list_file.parent} or {yaml_folder}."
        )
    return paths


def _check_label_folders(images: Sequence[Path], labels: Sequence[Path], split: str) -> None:
    folders = {path.parent for path in labels}
    missing = sorted(str(folder) for folder in folders if not folder.is_dir())
    if missing:
        raise DataError(
            f"Split {split!r}: no labels folder {listing(missing)}. Labels of images/NAME.jpg are expected in "
            "labels/NAME.txt; put them there, or use COCO JSON annotations."
        )
    if not any(path.is_file() for path in labels):
        raise DataError(
            f"Split {split!r}: none of the {len(images)} images has a label file; "
            f"{images[0]} for example should have {labels[0]}."
        )


def _read_labels(
    labels_file: Path, num_classes: int, size: tuple[int, int], segments: bool
) -> tuple[NDArray[np.int64], NDArray[np.float64], list[Outlines]]:
    """Parse one label file to classes [N], boxes [N, 4] in pixels (xyxy) and, if wanted, N outlines in pixels."""
    if not labels_file.is_file():
        return np.zeros(0, np.int64), np.zeros((0, 4)), []
    labels: list[int] = []
    boxes: list[tuple[float, float, float, float]] = []
    outlines: list[Outlines] = []
    try:
        lines = labels_file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{labels_file} is not a text file: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            label, box, points = _parse_line(line, f"{labels_file} line {number}", num_classes)
            labels.append(label)
            boxes.append(box)
            if segments:
                outlines.append(_outline(points, f"{labels_file} line {number}", size))
    scale = np.array([size[1], size[0], size[1], size[0]], np.float64)
    corners = np.array(boxes, np.float64).reshape(-1, 4).clip(0, 1) * scale
    return np.array(labels, np.int64), corners, outlines


def _outline(points: list[float], place: str, size: tuple[int, int]) -> Outlines:
    """The one polygon of a line, in pixels."""
    if not points:
        raise DataError(
            f"{place}: a box without an outline. A segmentation network needs one for every object: class x y x y ... "
            "as fractions; add it, or use a detection network."
        )
    return [np.array(points, np.float64).reshape(-1, 2) * (size[1], size[0])]


def _parse_line(
    line: str, place: str, num_classes: int
) -> tuple[int, tuple[float, float, float, float], list[float]]:
    """Class, box as corners, and the outline x y x y ..., empty where the line has none; all as fractions."""
    try:
        first, *values = (float(word) for word in line.split())
    except ValueError as error:
        raise DataError(f"{place}: {line.strip()!r} holds something that is not a number.") from error
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise DataError(
            f"{place}: {len(values) + 1} values, expected 5 (class, centre x, centre y, width, height) or a class "
            "followed by at least three points."
        )
    if not (first.is_integer() and 0 <= first < num_classes):
        raise DataError(
            f"{place}: class {first:g} is out of range, expected a whole number from 0 to {num_classes - 1} "
            f"({num_classes} names). Correct the label or the names."
        )
    if any(value < -_TOLERANCE or value > 1 + _TOLERANCE for value in values):
        raise DataError(
            f"{place}: {line.strip()!r} leaves the range 0 to 1. Boxes are fractions of the image size, not pixels."
        )
    if len(values) == 4:
        x, y, width, height = values
        return int(first), (x - width / 2, y - height / 2, x + width / 2, y + height / 2), []
    xs, ys = values[0::2], values[1::2]
    return int(first), (min(xs), min(ys), max(xs), max(ys)), values
