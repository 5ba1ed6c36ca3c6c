"""Opens a dataset of either format, checks it, and serves its images.

All checks that can be made before the first training step are made here, so that bad input ends a run within
seconds and not in the middle of an epoch.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from core.choices import DANGLING_LINKS
from core.errors import DataError
from core.names import closest_hint, listing
from data.formats.coco import find_annotations, read_coco
from data.formats.yolo import names_split, read_yolo
from data.images import file_version, read_header, read_image
from data.inventory import Inventory
from data.masks import coco_segmentation
from data.samples import Dataset, ImageRecord, Sample

FORMATS = ("auto", "yolo", "coco")
SPLITS = ("train", "val", "test")
DEGENERATE = "Left out {number} boxes that are NaN, infinite, without area, or outside their image"

_log = logging.getLogger(__name__)


class DetectionDataset:
    """Images with boxes, decoded on access.

    Args:
        names: class names, by class index.
        records: one per image.
        root: where the dataset was opened.
        notes: sentences about what was left out.
    """

    def __init__(
        self, names: Sequence[str], records: Sequence[ImageRecord], root: Path, notes: Sequence[str] = ()
    ) -> None:
        self.names = tuple(names)
        self.records = list(records)
        self.root = root
        self.notes = tuple(notes)
        self._versions: dict[int, tuple[int, int]] = {}  # of files that changed and are sound
        self.ids: Sequence[int] = [record.image_id for record in self.records]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """Decode one image.

        Raises:
            DataError: the file vanished, or changed and is damaged or of another size since the dataset was opened.
        """
        record = self.records[index]
        if record.version is not None:
            self._verify_again(index, record)
        image = read_image(record.path, record.apply_orientation)
        size = (image.shape[0], image.shape[1])
        if size != record.size:
            raise DataError(
                f"{record.path} is {size} (height, width), but was {record.size} when the run began."
            )
        boxes = record.boxes.clip(0, np.array([size[1], size[0], size[1], size[0]], np.float64)).astype(
            np.float32
        )
        return Sample(
            image, boxes, record.labels, record.image_id, size, record.crowd, record.areas, record.segments
        )

    def _verify_again(self, index: int, record: ImageRecord) -> None:
        """Verify a file that changed since it was verified: OpenCV decodes the half of a JPEG silently."""
        try:
            version = file_version(record.path)
            if version != self._versions.get(index, record.version):
                read_header(record.path)
                self._versions[index] = version
        except FileNotFoundError as error:
            raise DataError(
                f"Image {record.path} does not exist: restore the file, or remove it and its annotation."
            ) from error
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(
                f"Image {record.path} changed since the run began and is damaged ({error}): restore the file."
            ) from error


def open_dataset(
    root: Path | str,
    split: str,
    *,
    format: str = "auto",
    merge_classes: Mapping[str, Sequence[str | int]] | None = None,
    verify: bool = True,
    cache_dir: Path | None = None,
    segments: bool = False,
    links: str = "error",
    inventory: Inventory | None = None,
) -> DetectionDataset:
    """Open one split of a YOLO tree or of a COCO JSON dataset.

    Whatever is on disk and not used is counted and logged: hidden files, images of unknown kinds, labels without an
    image, images without labels, repeated objects.

    Args:
        root: the dataset's folder, or a YOLO `data.yaml`.
        split: `train` or `val`.
        format: `yolo`, `coco`, or `auto`: a folder with a `data.yaml` is YOLO, one with
            `annotations/instances_<split>*.json` or `<split>/_annotations.coco.json` is COCO; where both are there,
            the `data.yaml` decides,
            since its class order is the one that a YOLO checkpoint was trained with.
        merge_classes: new class name -> original names or indices that become it. Objects of other classes are
            dropped, their images stay. Example: `{"vehicle": ["car", "bus", 7]}`.
        verify: decode every image once, so that broken files are found now and not during training.
        cache_dir: folder for a small file that remembers which images were verified. None remembers nothing; nothing is
            ever written into the dataset.
        segments: read the objects' masks, too, for instance segmentation: outlines of YOLO labels, polygons and
            run-length codes of COCO JSON.
        links: `error` refuses a dataset with broken links, `skip` counts them.
        inventory: takes the account; None makes one.

    Returns:
        The dataset. Boxes with NaN, infinity or no area are left out, and their number is logged as a warning. Items
        have their boxes clipped to the image; `ground_truth` keeps COCO boxes as they were annotated.

    Raises:
        DataError: anything missing, empty, malformed or out of range; with `segments` an object without a mask.
    """
    root = Path(root)
    if format not in FORMATS:
        raise DataError(f"Unknown dataset format {format!r}: expected one of {', '.join(FORMATS)}.")
    if not root.exists():
        raise DataError(
            f"No dataset at {root}: expected a folder or a data.yaml. Set data.root to its location."
        )
    if links not in DANGLING_LINKS:
        raise DataError(f"links is {links!r}, expected one of {', '.join(DANGLING_LINKS)}.")
    inventory = inventory or Inventory()
    yaml_file, annotation_file = _locate(root, split, format)
    if yaml_file is not None:
        names, records = read_yolo(yaml_file, split, verify, cache_dir, segments, inventory, links)
    else:
        assert annotation_file is not None
        names, records = read_coco(annotation_file, root, verify, cache_dir, segments, inventory)
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise DataError(
            f"{yaml_file or annotation_file}: class names {listing(repeated)} occur more than once."
        )
    records = _clean(records, inventory)
    if not inventory.collects:
        inventory.log()
    if merge_classes:
        names, records = _merge(names, records, merge_classes)
    num_objects = sum(len(record.labels) for record in records)
    if num_objects == 0:
        raise DataError(
            f"Split {split!r} of {root} has {len(records)} images but no object in them"
            + (" after merge_classes." if merge_classes else ". Check its annotation files.")
        )
    _log.info("Opened %s, split %s: %d images, %d objects.", root, split, len(records), num_objects)
    return DetectionDataset(names, records, root, [note.sentence() for note in inventory.notes.values()])


def find_splits(root: Path | str, format: str = "auto") -> list[str]:
    """The splits that a dataset says it has, of train, val and test; none where there is no dataset.

    Raises:
        DataError: a data.yaml that cannot be read.
    """
    root = Path(root)
    found = []
    for split in SPLITS if root.exists() else ():
        try:
            yaml_file, _ = _locate(root, split, format)
        except DataError:
            continue
        if yaml_file is None or names_split(yaml_file, split):
            found.append(split)
    return found


def ground_truth(dataset: Dataset) -> dict[str, Any]:
    """Annotations as a COCO dictionary (images, annotations, categories), as pycocotools takes it.

    Category ids are class indices plus 1, annotation ids count from 1, image ids are the dataset's. Images of a dataset
    that is not a `DetectionDataset` are read one by one: keep the result for repeated evaluations. Annotations have a
    `segmentation` where the items have `segments`.
    """
    source: Sequence[ImageRecord] | Dataset = (
        dataset.records if isinstance(dataset, DetectionDataset) else dataset
    )
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(len(source)):
        item = source[index]
        images.append({"id": int(item.image_id), "height": int(item.size[0]), "width": int(item.size[1])})
        boxes = np.asarray(item.boxes, np.float64).reshape(-1, 4)
        sides = boxes[:, 2:] - boxes[:, :2]
        areas = sides.prod(axis=1) if item.areas is None else item.areas
        crowd = np.zeros(len(boxes), bool) if item.crowd is None else item.crowd
        for row in range(len(boxes)):
            entry = {
                "id": len(annotations) + 1,
                "image_id": int(item.image_id),
                "category_id": int(item.labels[row]) + 1,
                "bbox": [*boxes[row, :2].tolist(), *sides[row].tolist()],
                "area": float(areas[row]),
                "iscrowd": int(crowd[row]),
            }
            if item.segments is not None:
                entry["segmentation"] = coco_segmentation(item.segments[row])
            annotations.append(entry)
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(dataset.names)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def _locate(root: Path, split: str, format: str) -> tuple[Path | None, Path | None]:
    """The file that describes the split: (data.yaml, None) or (None, COCO JSON)."""
    if root.is_file():
        if root.suffix.lower() not in (".yaml", ".yml") or format == "coco":
            raise DataError(f"{root} is a file: expected a YOLO data.yaml, or a folder for COCO JSON.")
        return root, None
    yaml_file = next((root / name for name in ("data.yaml", "data.yml") if (root / name).is_file()), None)
    if format in ("auto", "yolo") and yaml_file is not None:
        return yaml_file, None
    annotation_file = find_annotations(root, split) if format in ("auto", "coco") else None
    if annotation_file is not None:
        return None, annotation_file
    expected = {
        "yolo": "data.yaml",
        "coco": f"annotations/instances_{split}*.json",
        "auto": f"data.yaml (YOLO) or annotations/instances_{split}*.json (COCO)",
    }
    empty = "is empty" if not any(root.iterdir()) else f"has no split {split!r} that can be read"
    raise DataError(
        f"{root} {empty}: expected {expected[format]} in it. Set data.root to the dataset's folder."
    )


def _clean(records: list[ImageRecord], inventory: Inventory) -> list[ImageRecord]:
    """Leave out boxes that are not finite or have no area inside their image."""
    cleaned = []
    for record in records:
        height, width = record.size
        inside = record.boxes.clip(0, np.array([width, height, width, height], np.float64))  # keeps NaN
        sides = inside[:, 2:] - inside[:, :2]
        keep = np.isfinite(record.boxes).all(axis=1) & (sides > 0).all(axis=1)
        if not keep.all():
            inventory.note(DEGENERATE, record.path, int((~keep).sum()))
        cleaned.append(record if keep.all() else _select(record, keep))
    return cleaned


def _select(record: ImageRecord, keep: np.ndarray) -> ImageRecord:
    return replace(
        record,
        boxes=record.boxes[keep],
        labels=record.labels[keep],
        crowd=record.crowd[keep],
        areas=record.areas[keep],
        segments=None
        if record.segments is None
        else [record.segments[row] for row in np.flatnonzero(keep).tolist()],
    )


def _merge(
    names: tuple[str, ...], records: list[ImageRecord], merge_classes: Mapping[str, Sequence[str | int]]
) -> tuple[tuple[str, ...], list[ImageRecord]]:
    new_index = np.full(len(names), -1, np.int64)
    for new, (name, members) in enumerate(merge_classes.items()):
        for member in [members] if isinstance(members, str | int) else members:
            old = _class_index(member, names)
            if new_index[old] not in (-1, new):
                raise DataError(
                    f"merge_classes puts class {names[old]!r} into two groups; the second is {name!r}."
                )
            new_index[old] = new
    merged = [_select(record, new_index[record.labels] >= 0) for record in records]
    merged = [replace(record, labels=new_index[record.labels]) for record in merged]
    return tuple(merge_classes), merged


def _class_index(member: str | int, names: tuple[str, ...]) -> int:
    if isinstance(member, int):
        if not 0 <= member < len(names):
            raise DataError(
                f"merge_classes: class index {member} is out of range, expected 0 to {len(names) - 1}."
            )
        return member
    if member not in names:
        raise DataError(f"merge_classes: no class {member!r}{closest_hint(member, names)}.")
    return names.index(member)
