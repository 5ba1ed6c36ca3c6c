"""Reads YOLO trees: a `data.yaml`, folders of images, and one text file of normalised boxes per image.

Layout: `images/.../name.jpg` has its objects in `labels/.../name.txt`, one per line: class, centre x, centre y, width,
height, all but the class as fractions of the image (in its EXIF orientation). A line with an outline (class and three
or more points) counts as the outline's bounding box, and the outline is kept where masks are asked for. With a
`kpt_shape` in the `data.yaml` a line is a box and keypoints, of which the box is used. An image without a label file
has no objects.
"""

from pathlib import Path
from typing import Any

import numpy as np

from core.documents import DocumentError, parse_yaml, shown
from core.errors import DataError
from core.names import listing
from data.formats.yolo_files import LabelFiles, find_pictures
from data.formats.yolo_labels import LabelReader, Labels
from data.images import ImageHeader, scan_images
from data.inventory import Inventory
from data.masks import polygon_area
from data.samples import ImageRecord
from data.text import MAX_LIST_BYTES, is_path, read_text
from data.walk import account_for_link

OTHER_KEYS = {"val": ("valid", "validation")}  # what some exports call a split


def read_yolo(
    yaml_file: Path,
    split: str,
    verify: bool,
    cache_dir: Path | None,
    segments: bool = False,
    inventory: Inventory | None = None,
    links: str = "error",
) -> tuple[tuple[str, ...], list[ImageRecord]]:
    """Read one split of a YOLO tree.

    Args:
        yaml_file: the `data.yaml`.
        split: key of the split in it, `train` or `val`.
        verify: decode every image once.
        cache_dir: see `scan_images`.
        segments: keep the outlines, too; every line must have one. Areas are then those of the outlines.
        inventory: records everything that was left out.
        links: `error` or `skip`, for broken links.

    Returns:
        Class names and one record per image, ids from 1 in the order of the sorted paths. Boxes are clipped to
        the image and may be empty or NaN: the dataset leaves those out.

    Raises:
        DataError: anything missing, empty or malformed; names the file and line.
    """
    inventory = inventory or Inventory()
    config = _load_yaml(yaml_file)
    names = _class_names(config, yaml_file)
    keypoints = _keypoint_shape(config, yaml_file)
    paths, sources = _image_paths(config, yaml_file, split, inventory, links)
    files = LabelFiles(paths, inventory, links)
    files.check_folders(split)
    inventory.refuse()
    reader = LabelReader(len(names), keypoints, segments, inventory)
    labels = [reader.read(file) if file is not None else None for file in files.existing()]
    reader.finish()
    files.account(sources)
    inventory.refuse()
    headers = scan_images(paths, verify, cache_dir, inventory)
    return names, [
        _record(path, number, objects or Labels(), header, segments)
        for number, (path, objects, header) in enumerate(zip(paths, labels, headers, strict=True), start=1)
        if header is not None
    ]


def _record(path: Path, number: int, labels: Labels, header: ImageHeader, segments: bool) -> ImageRecord:
    size = header.size()
    classes, boxes = labels.in_pixels(size)
    outlines = labels.outlines(size) if segments else None
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    if outlines is not None:
        areas = np.array([polygon_area(outline) for outline in outlines], np.float64)
    crowd = np.zeros(len(classes), bool)
    return ImageRecord(
        path, number, size, boxes, classes, crowd, areas, segments=outlines, version=header.version
    )


def names_split(yaml_file: Path, split: str) -> bool:
    """Whether a `data.yaml` says where a split's images are.

    Raises:
        DataError: it cannot be read.
    """
    config = _load_yaml(yaml_file)
    return any(config.get(key) for key in (split, *OTHER_KEYS.get(split, ())))


def _load_yaml(yaml_file: Path) -> dict[str, Any]:
    try:
        config = parse_yaml(read_text(yaml_file))
    except DocumentError as error:
        raise DataError(f"{yaml_file} cannot be read as YAML: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"{yaml_file} holds {type(config).__name__}, expected keys: path, train, val, names.")
    return config


def _class_names(config: dict[str, Any], yaml_file: Path) -> tuple[str, ...]:
    names, count = config.get("names"), config.get("nc")
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise DataError(
                f"{yaml_file}: names has the keys {listing(sorted(map(shown, names)))}, expected 0 to {len(names) - 1}."
            )
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(
            f"{yaml_file}: names is {shown(names)}, expected a list of class names or a map from index to name."
        )
    if count is not None and count != len(names):
        raise DataError(
            f"{yaml_file}: nc is {shown(count)} but names has {len(names)} entries; remove nc or correct names."
        )
    odd = [name for name in names if isinstance(name, bool) or not isinstance(name, str | int | float)]
    if odd:
        raise DataError(
            f"{yaml_file}: names has {shown(odd[0])}, which YAML makes of yes, no, on, off, null or a nested list; "
            "write class names in quotes."
        )
    return tuple(str(name) for name in names)


def _keypoint_shape(config: dict[str, Any], yaml_file: Path) -> tuple[int, int] | None:
    """`kpt_shape`: number of keypoints, and values of each; None where the file has none."""
    if "kpt_shape" not in config:
        return None
    shape = config["kpt_shape"]
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(isinstance(value, int) and value >= 0 for value in shape)
        or (all(shape) and shape[1] not in (2, 3))
    ):
        raise DataError(
            f"{yaml_file}: kpt_shape is {shown(shape)}, expected the number of keypoints and 2 or 3 values of each, "
            "such as [17, 3], or [0, 0] for labels without keypoints."
        )
    return shape[0], shape[1]


def _image_paths(
    config: dict[str, Any], yaml_file: Path, split: str, inventory: Inventory, links: str
) -> tuple[list[Path], list[Path]]:
    """Images of the split, each once, sorted; and the folders among its sources."""
    key = split
    if split not in config:
        key = next((other for other in OTHER_KEYS.get(split, ()) if other in config), split)
    value = config.get(key)
    sources = value if isinstance(value, list) else [value]
    if not sources or not all(isinstance(source, str) and is_path(source) for source in sources):
        raise DataError(
            f"{yaml_file}: {split} is {shown(value)}, expected a folder of images, a .txt list, or a list of them. Set "
            "it there, or choose another split with data.train_split or data.val_split."
        )
    prefix = config.get("path") or "."
    if not isinstance(prefix, str) or not is_path(prefix):
        raise DataError(f"{yaml_file}: path is {shown(prefix)}, expected a folder.")
    root = yaml_file.parent / prefix
    if not root.is_dir():
        raise DataError(
            f"{yaml_file}: path leads to {root}, which does not exist. It is relative to the YAML file; "
            "correct it, or remove it if the images are in the file's folder."
        )
    paths: list[Path] = []
    folders: list[Path] = []
    for source in map(str, sources):
        place = _resolve(root, source, f"{yaml_file}: {split}", inventory)
        if place.is_dir():
            folders.append(place)
            paths += find_pictures(place, inventory, links)
        elif place.is_file() and place.suffix.lower() == ".txt":
            paths += _read_list(place, yaml_file.parent, inventory, links)
        else:
            raise DataError(
                f"{yaml_file}: {split} leads to {place}, which is neither a folder nor a .txt list of images."
            )
    inventory.refuse()
    if not paths:
        raise DataError(f"{yaml_file}: split {split!r} is empty: no image in {shown(value)} under {root}.")
    once = sorted(set(paths))
    if len(once) < len(paths):
        inventory.note(
            "{number} images are listed more than once; each counts once", "", len(paths) - len(once)
        )
    return once, folders


def _resolve(root: Path, source: str, place: str, inventory: Inventory) -> Path:
    """Where a split leads. Roboflow writes `../train/images` for the folder `train/images` next to the data.yaml."""
    literal = root / source
    beside = root / source.removeprefix("../")
    if beside == literal or not beside.exists():
        return literal
    if not literal.exists():
        return beside
    if beside.resolve() != literal.resolve():
        inventory.note(
            f"{place} is {source}, which leads to {literal.resolve()}; {beside} is there, too, and is not used. Write "
            "the one that you mean without '../'"
        )
    return literal


def _read_list(list_file: Path, yaml_folder: Path, inventory: Inventory, links: str) -> list[Path]:
    paths, missing = [], []
    for line in read_text(list_file, MAX_LIST_BYTES).splitlines():
        name = line.strip()
        if not is_path(name):
            raise DataError(f"{list_file} holds {shown(name)}, which is not a file path.")
        if not name:
            continue
        names = (name, name.replace("\\", "/"))  # a list made on Windows
        candidates = [folder / each for each in names for folder in (list_file.parent, yaml_folder)]
        existing = next((path for path in candidates if path.is_file()), None)
        link = next((path for path in candidates if path.is_symlink()), None)
        if existing is not None:
            paths.append(existing)
        elif link is not None:
            account_for_link(link, inventory, links)
        else:
            missing.append(name)
    if missing:
        raise DataError(
            f"{list_file}: {len(missing)} listed images do not exist: {listing(missing)}. "
            f"Paths may be relative to {list_file.parent} or {yaml_folder}."
        )
    return paths
