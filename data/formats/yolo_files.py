"""Which files of a YOLO tree belong together: pictures, their label files, and what is left over on either side."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from core.errors import DataError
from core.names import listing
from data.inventory import Inventory
from data.walk import SUFFIXES, UNREAD_SUFFIXES, account_for_link, is_image, only_with_images, walk_files

# Files among labels that are none: lists of class names by LabelImg and others, notes.
NO_LABELS = frozenset({"classes.txt", "labels.txt", "names.txt", "notes.txt", "readme.txt", "license.txt"})

WITHOUT_LABELS = "{number} images have no label file: they count as images without objects"
WITHOUT_PICTURE = "{number} label files have no image: their objects are not used"
UNREAD = "Left out {number} files of a kind that is not read ({kind})"
OTHER_LABELS = "Left out {number} files among the labels that are not NAME.txt ({kind})"
SHARED = "{number} images share their label file with another image of the same name"


def label_path(image: Path) -> Path:
    """Where an image's labels lie: the last folder called `images` becomes `labels`, the suffix becomes `.txt`.

    Example: `set/images/val/7.jpg` has `set/labels/val/7.txt`; else they are in the image's folder.
    """
    return _swapped(image, "images", "labels").with_suffix(".txt")


def _swapped(path: Path, old: str, new: str) -> Path:
    parts = list(path.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == old:
            parts[position] = new
            break
    return Path(*parts)


def find_pictures(folder: Path, inventory: Inventory, links: str) -> list[Path]:
    """All images below a folder that are read; pictures of other kinds, and whatever has a label file, are counted.

    Raises:
        DataError: a folder that cannot be read.
    """
    found, unread = [], []
    for path in only_with_images(walk_files(folder, inventory, links), folder):
        if is_image(path):
            found.append(path)
        elif path.suffix.lower() in UNREAD_SUFFIXES or _has_labels(path):
            unread.append(path)
    for path in unread:
        kind = path.suffix.lower() or "without a suffix"
        with_label = ", with a label file" if _has_labels(path) else ""
        inventory.note(UNREAD.replace("{kind}", kind + with_label), path)
    return found


def _has_labels(path: Path) -> bool:
    label = label_path(path)
    return label != path and path.suffix.lower() != ".txt" and label.is_file()


class LabelFiles:
    """The label files of a split's images.

    Args:
        images: sorted.
        inventory: gets faults and counts.
        links: `error` or `skip`, for broken links.
    """

    def __init__(self, images: Sequence[Path], inventory: Inventory, links: str) -> None:
        self.images = images
        self.inventory = inventory
        self.links = links
        self.expected = [label_path(path) for path in images]

    def check_folders(self, split: str) -> None:
        """Raise DataError where there are no labels at all."""
        folders = {path.parent for path in self.expected}
        missing = sorted(str(folder) for folder in folders if not folder.is_dir())
        if missing:
            raise DataError(
                f"Split {split!r}: no labels folder {listing(missing)}. Labels of images/NAME.jpg are expected in "
                "labels/NAME.txt; put them there, or use COCO JSON annotations."
            )
        if not any(path.is_file() for path in self.expected):
            raise DataError(
                f"Split {split!r}: none of the {len(self.images)} images has a label file; "
                f"{self.images[0]} for example should have {self.expected[0]}."
            )

    def existing(self) -> list[Path | None]:
        """Each image's label file, None where there is none. A broken link, or a folder, does not count as none."""
        found: list[Path | None] = []
        for image, label in zip(self.images, self.expected, strict=True):
            found.append(label if label.is_file() else None)
            if found[-1] is not None:
                continue
            if label.is_symlink():
                account_for_link(label, self.inventory, self.links)
            elif label.exists():
                self.inventory.fault(f"{label} is a folder, expected the label file of {image}.")
            else:
                self.inventory.note(WITHOUT_LABELS, image, is_warning=False)
        return found

    def account(self, sources: Sequence[Path]) -> None:
        """Count label files that no image has, and images that share one.

        Args:
            sources: folders that the split consists of; of a list of images, the folders of these are looked at.
        """
        for label, count in Counter(self.expected).items():
            if count > 1:
                self.inventory.note(SHARED, label, count)
        used = set(self.expected)
        quiet = Inventory()  # hidden files and links were counted on the walk through the images
        for folder in self._label_folders(sources):
            for file in walk_files(folder, quiet, "skip"):
                if file in used or is_image(file) or file.suffix.lower() in UNREAD_SUFFIXES:
                    continue
                if file.suffix == ".txt":
                    if file.name.lower() not in NO_LABELS and not self._has_picture(file):
                        self.inventory.note(WITHOUT_PICTURE, file)
                elif file.suffix.lower() in (".txt", ".xml", ".json"):
                    self.inventory.note(OTHER_LABELS.replace("{kind}", file.suffix), file)

    def _label_folders(self, sources: Sequence[Path]) -> list[Path]:
        """Folders of labels, none of them below another."""
        covered = {label_path(source / "x.jpg").parent for source in sources}
        folders = covered | {
            path.parent
            for path in self.expected
            if not any(path.is_relative_to(folder) for folder in covered)
        }
        outer = [f for f in sorted(folders) if not any(f != g and f.is_relative_to(g) for g in folders)]
        return [folder for folder in outer if folder.is_dir()]

    def _has_picture(self, label: Path) -> bool:
        """Whether there is a file of that name where images lie, in the split or not, of a kind that is read or not."""
        beside = _swapped(label, "labels", "images")
        endings = ("", *SUFFIXES, *(suffix.upper() for suffix in SUFFIXES), *UNREAD_SUFFIXES)
        return any(beside.with_suffix(ending).is_file() for ending in endings)
