"""Reads COCO JSON: `annotations/instances_<split>*.json` and images, or Roboflow's `<split>/_annotations.coco.json`.

Category ids may have gaps (COCO's own go from 1 to 90 for 80 classes): class indices follow the sorted ids. Crowd
regions and segmentation areas are kept, since the COCO metric uses both. Images and categories are looked up by their
ids as the file has them, of whatever size or kind; from there on they are positions.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.documents import DocumentError, parse_json, shown
from core.errors import DataError
from core.names import listing
from data.formats import coco_fields as fields
from data.formats.corners import Corners
from data.images import ImageHeader, scan_images
from data.inventory import DUPLICATES, Inventory
from data.masks import Segmentation, parse_segmentation
from data.samples import ImageRecord
from data.text import is_path, read_text
from data.walk import UNREAD_SUFFIXES, is_image, walk_files

MAX_ANNOTATION_BYTES = 2**31
MAX_CATEGORIES = 20_000
MAX_DIGITS = 40
TABLES = ("images", "annotations", "categories")
ROBOFLOW = "_annotations.coco.json"
FOLDER_NAMES = {"val": ("val", "valid")}  # what Roboflow calls a split's folder
UNLISTED = "{number} images in the folder are not in the annotation file: they are not used"
FRACTIONS = 0.5  # share of boxes within 0 to 1 from which on they are taken for fractions


class _Entry(NamedTuple):
    """One annotation: class, box as x y width height, crowd, area, its mask as in the file, and its position there."""

    label: int
    box: list[float]
    crowd: bool
    area: float
    segmentation: Any
    position: int


@dataclass
class _Image:
    """One image as the file describes it, and its index there; height and width are None where it does not say."""

    name: str
    height: int | None
    width: int | None
    index: int
    entries: list[_Entry] = field(default_factory=list)


def find_annotations(root: Path, split: str) -> Path | None:
    """The split's annotation file under `root`, or None where there is none.

    `instances_val.json` is taken before `instances_val2017.json`; two of the latter kind are an error. Then comes
    `val/_annotations.coco.json`, or `valid/...`, as Roboflow writes it.
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
    names = FOLDER_NAMES.get(split, (split,))
    found += [root / name / ROBOFLOW for name in names if (root / name / ROBOFLOW).is_file()]
    return found[0] if found else None


def read_coco(
    annotation_file: Path,
    root: Path,
    verify: bool,
    cache_dir: Path | None,
    segments: bool = False,
    inventory: Inventory | None = None,
) -> tuple[tuple[str, ...], list[ImageRecord]]:
    """Read one COCO annotation file.

    Args:
        annotation_file: the JSON file.
        root: folder under which the images are looked for: `images/<split>`, `<split>`, `images`, or itself, where
            `<split>` is what follows `instances_` in the file's name.
        verify: decode every image once.
        cache_dir: see `scan_images`.
        segments: keep the masks, too; every annotation must have one.
        inventory: records everything that was left out.

    Returns:
        Class names by sorted category id and one record per image, sorted by image id. Boxes may still leave the
        image or be empty: the dataset cleans them.

    Raises:
        DataError: anything missing, empty or malformed; names the file and entry.
    """
    inventory = inventory or Inventory()
    content = _load_tables(annotation_file)
    reader = _Reader(annotation_file, inventory)
    names = reader.categories(content["categories"])
    images = reader.images(content["images"])
    inventory.refuse()
    if not images or not names:
        raise DataError(f"{annotation_file} is empty: {len(images)} images, {len(names)} categories.")
    reader.annotations(content["annotations"])
    inventory.refuse()
    ids, order = fields.number_images(list(images), inventory)
    chosen = [images[key] for key in order]
    folder = _image_folder(root, annotation_file, chosen[0].name)
    paths = [folder / image.name for image in chosen]
    _count_unlisted(folder, root, paths, inventory)
    headers = scan_images(paths, verify, cache_dir, inventory)
    corners = Corners("x, y, width, height")
    records = [
        _record(path, number, image, header, annotation_file, segments, corners, inventory)
        for path, number, image, header in zip(paths, ids, chosen, headers, strict=True)
        if header is not None
    ]
    corners.check(inventory)
    inventory.refuse()
    return names, records


def _load_tables(annotation_file: Path) -> dict[str, list[Any]]:
    try:
        content = parse_json(read_text(annotation_file, MAX_ANNOTATION_BYTES))
    except DocumentError as error:
        raise DataError(f"{annotation_file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(
            f"{annotation_file} holds a {type(content).__name__}, expected images, annotations, categories."
        )
    for table in TABLES:
        if not isinstance(content.get(table), list):
            found = f"a {type(content[table]).__name__}" if table in content else "missing"
            raise DataError(f"{annotation_file} is not COCO JSON: {table} is {found}, expected a list.")
    return content


class _Reader:
    """Checks the three tables of a file; what cannot be used becomes a fault with the table and the index."""

    def __init__(self, file: Path, inventory: Inventory) -> None:
        self.file = file
        self.inventory = inventory
        self.class_of: dict[fields.Id, int] = {}
        self.image_of: dict[fields.Id, _Image] = {}

    def categories(self, table: list[Any]) -> tuple[str, ...]:
        """Class names, by sorted id, or in the file's order where an id is a text."""
        if len(table) > MAX_CATEGORIES:
            raise DataError(f"{self.file} has {len(table)} categories; at most {MAX_CATEGORIES} are read.")
        found = [
            (fields.read_id(entry.get("id"), f"{place}: id", self.inventory), entry.get("name"), place)
            for _, place, entry in self._entries("categories", table)
        ]
        for twice in fields.repeated([key for key, *_ in found]):
            names = [shown(name) for key, name, _ in found if shown(key) == twice]
            self.inventory.fault(
                f"{self.file}: categories {', '.join(names)} share the id {twice}; every category needs its own."
            )
        if all(isinstance(key, int) for key, *_ in found):
            found.sort(key=lambda item: item[0] if isinstance(item[0], int) else 0)
        self.class_of = {key: index for index, (key, *_) in enumerate(found) if key is not None}
        return tuple(fields.read_text(name, f"{place}: name", self.inventory) for _, name, place in found)

    def images(self, table: list[Any]) -> dict[fields.Id, _Image]:
        """Images by id, in the file's order."""
        place_of: dict[str, str] = {}
        for index, place, entry in self._entries("images", table):
            key = fields.read_id(entry.get("id"), f"{place}: id", self.inventory)
            name = fields.read_text(entry.get("file_name"), f"{place}: file_name", self.inventory)
            height, width = (
                fields.read_side(entry.get(side), f"{place}: {side}", self.inventory)
                for side in ("height", "width")
            )
            if name and not is_path(name):
                self.inventory.fault(f"{place}: file_name is {shown(name)}, which is not a file path.")
                continue
            if key is None or not name:
                continue
            if key in self.image_of:
                self.inventory.fault(
                    f"{place}: some images share an id, {shown(key)}; every image needs its own."
                )
            if name in place_of:
                self.inventory.fault(
                    f"{place}: file_name {shown(name)} is that of {place_of[name]}, too: the image would count twice, "
                    "each time with a part of its objects; give both one entry."
                )
            place_of.setdefault(name, place.removeprefix(f"{self.file}: "))
            self.image_of[key] = _Image(name, height, width, index)
        return self.image_of

    def annotations(self, table: list[Any]) -> None:
        """Put the annotations to their images; exact repetitions are left out and counted."""
        seen: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
        tiny = 0
        first = ""
        for index, place, entry in self._entries("annotations", table):
            label = self._find(entry, "category_id", place, self.class_of, "categories")
            image = self._find(entry, "image_id", place, self.image_of, "images")
            box = fields.read_box(entry.get("bbox"), f"{place}: bbox", self.inventory)
            crowd = fields.read_crowd(entry.get("iscrowd"), f"{place}: iscrowd", self.inventory)
            if label is None or image is None or box is None:
                continue
            area = fields.read_area(entry.get("area"), box, f"{place}: area", self.inventory)
            twins = seen[id(image), label, *box, crowd]
            if any(_same(entry, twin) for twin in twins):
                self.inventory.note(DUPLICATES, place)
                continue
            twins.append(entry)
            if 0 < max(box) <= 1:
                tiny += 1
                first = first or f"{place}: bbox is {box}"
            image.entries.append(_Entry(label, box, crowd, area, entry.get("segmentation"), index))
        if tiny and tiny >= FRACTIONS * len(table):
            self.inventory.fault(
                f"{first}. {tiny} of {len(table)} boxes lie within 0 to 1: these are fractions of the image size, "
                "expected x, y, width, height in pixels."
            )

    def _find(
        self, entry: dict[str, Any], key: str, place: str, known: dict[fields.Id, Any], table: str
    ) -> Any:
        """The object that an id of an annotation refers to; None and a fault where it is unknown."""
        value = fields.read_id(entry.get(key), f"{place}: {key}", self.inventory)
        if value is None:
            return None
        if value not in known:
            other: fields.Id = shown(value) if isinstance(value, int) else value
            if isinstance(value, str) and len(value) < MAX_DIGITS and value.lstrip("-").isdecimal():
                other = int(value)
            hint = f"; there it is {other!r}" if other in known else ""
            self.inventory.fault(f"{place} has {key} {shown(value)}, which is not among the {table}{hint}.")
            return None
        return known[value]

    def _entries(self, name: str, table: list[Any]) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """(index, place, entry) of a table; an entry that is not a JSON object is a fault."""
        for index, entry in enumerate(table):
            place = f"{self.file}: {name}[{index}]"
            if isinstance(entry, dict):
                yield index, place, entry
            else:
                self.inventory.fault(f"{self.file} is not COCO JSON: {name}[{index}] is {shown(entry)}.")


def _same(entry: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two annotations differ in nothing but their ids."""
    return {**entry, "id": None} == {**other, "id": None}


def _image_folder(root: Path, annotation_file: Path, name: str) -> Path:
    split = annotation_file.stem.removeprefix("instances_")
    candidates = [root / "images" / split, root / split, root / "images", root]
    if annotation_file.name == ROBOFLOW:
        candidates = [annotation_file.parent]
    for folder in candidates:
        if (folder / name).is_file():
            return folder
    raise DataError(
        f"{annotation_file} names {shown(name)}, which is in none of "
        f"{listing([str(folder) for folder in candidates])}. Put the images into the first of these folders."
    )


def _count_unlisted(folder: Path, root: Path, paths: Sequence[Path], inventory: Inventory) -> None:
    """Images in the split's own folder that the file does not list; a folder of all splits has those of the others."""
    if folder in (root, root / "images"):
        return
    used = set(paths)
    for path in walk_files(folder, inventory, "skip"):
        if path not in used and (is_image(path) or path.suffix.lower() in UNREAD_SUFFIXES):
            inventory.note(UNLISTED, path, is_warning=False)


def _record(
    path: Path,
    number: int,
    image: _Image,
    header: ImageHeader,
    file: Path,
    segments: bool,
    corners: Corners,
    inventory: Inventory,
) -> ImageRecord:
    declared = (image.height, image.width)
    apply_orientation = declared != header.size(False) or declared == header.size(True)
    size = header.size(apply_orientation)
    if any(side not in (None, found) for side, found in zip(declared, size, strict=True)):
        inventory.fault(
            f"{file}: images[{image.index}]: {path} is declared {declared[0]} high and {declared[1]} wide, but the "
            f"file has {size[0]} and {size[1]}. The boxes refer to another version of the image; correct one of them."
        )
    entries = image.entries
    for entry in entries:
        x, y, width, height = entry.box
        leaves = x + width > 1.02 * size[1] + 1 or y + height > 1.02 * size[0] + 1
        corners.add(entry.box, leaves, f"{file}: annotations[{entry.position}]: bbox")
    labels = np.array([entry.label for entry in entries], np.int64)
    boxes = np.array([entry.box for entry in entries], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    crowd = np.array([entry.crowd for entry in entries], bool)
    areas = np.array([entry.area for entry in entries], np.float64)
    masks = (
        [_segmentation(entry, size, path.name, file, inventory) for entry in entries] if segments else None
    )
    return ImageRecord(
        path, number, size, boxes, labels, crowd, areas, apply_orientation, masks, header.version
    )


def _segmentation(
    entry: _Entry, size: tuple[int, int], name: str, file: Path, inventory: Inventory
) -> Segmentation:
    try:
        return parse_segmentation(entry.segmentation, size)
    except ValueError as error:
        box = ", ".join(f"{value:g}" for value in entry.box)
        inventory.fault(
            f"{file}: annotations[{entry.position}]: the object of {name} with bbox [{box}] has as segmentation "
            f"{error}. A segmentation network needs a mask for every object; correct the annotation, or use a "
            "detection network."
        )
        return []
