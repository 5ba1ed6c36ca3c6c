"""One walk over a folder that accounts for every file: what is read, what is passed over and why, and where links lead.

Linked folders are followed, as the official trainers do. A folder that was read already, under whatever name, is not
read again, so that a circle of links ends.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from core.errors import DataError
from data.inventory import Inventory

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})  # of images that are read
UNREAD_SUFFIXES = frozenset(  # of pictures that are not
    {
        ".arw", ".avif", ".cr2", ".dcm", ".dng", ".exr", ".gif", ".hdr", ".heic", ".heif", ".j2k", ".jfif", ".jp2",
        ".jpe", ".jxl", ".mpo", ".nef", ".npy", ".pgm", ".pnm", ".ppm", ".psd", ".raw", ".svg", ".tga",
    }
)  # fmt: skip
# What systems and editors leave in folders: Windows, Synology, macOS archives, LabelImg's checkpoints begin with a dot.
LEFT_BY_SYSTEMS = frozenset(
    {
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "@eadir",
        "__macosx",
        "$recycle.bin",
        "#recycle",
        "__pycache__",
    }
)

MAX_OTHER_FILES = 10_000
OTHERS_PER_IMAGE = 10

FILE, FOLDER, NOTHING, OTHER = "file", "folder", "nothing", "other"

HIDDEN = "Left out {number} hidden files and folders (leading dot, or created by operating systems)"
SEEN_FOLDER = "Left out {number} links to folders that are read already"
FOLLOWED = "{number} linked folders are read"
DANGLING = "Left out {number} broken links"
SPECIAL = "Left out {number} entries that are neither files nor folders"


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is not part of a dataset: `.ipynb_checkpoints`, `._1.jpg`, `@eaDir`, ..."""
    return name.startswith(".") or name.lower() in LEFT_BY_SYSTEMS


def is_image(path: Path) -> bool:
    """Whether the name is that of an image that is read."""
    return path.suffix.lower() in SUFFIXES


def walk_files(folder: Path, inventory: Inventory, links: str = "error") -> Iterator[Path]:
    """All files below a folder, sorted within each folder, hidden ones left out; linked folders are followed.

    Args:
        folder: where to begin; its own name does not count as hidden.
        inventory: records what was left out.
        links: `error` makes a broken link a fault, `skip` counts it.

    Raises:
        DataError: a folder that cannot be read.
    """
    waiting, seen = [folder], {_identity(folder)}
    while waiting:
        current = waiting.pop()
        try:
            with os.scandir(current) as entries:
                listed = sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))
        except OSError as error:
            raise DataError(
                f"The folder {current} cannot be read ({error.strerror}): its files would be missing; grant access, "
                "or move it out of the dataset."
            ) from error
        below = []
        for entry in listed:
            path = Path(entry.path)
            if is_hidden(entry.name):
                inventory.note(HIDDEN, path, is_warning=False)
                continue
            kind = _kind(entry)
            if kind == FILE:
                yield path
            elif kind == NOTHING:
                account_for_link(path, inventory, links)
            elif kind == OTHER:
                inventory.note(SPECIAL, path)
            elif _identity(path) in seen:
                inventory.note(SEEN_FOLDER, path)
            else:
                seen.add(_identity(path))
                below.append(path)
                if entry.is_symlink():
                    inventory.note(FOLLOWED, path, is_warning=False)
        waiting += reversed(below)


def only_with_images(files: Iterator[Path], folder: Path) -> Iterator[Path]:
    """Pass files on, as long as there are images among them.

    Raises:
        DataError: thousands of other files and hardly an image: a folder such as /usr, which would take minutes.
    """
    images = others = 0
    for path in files:
        images += is_image(path)
        others += not is_image(path)
        if others > MAX_OTHER_FILES and others > OTHERS_PER_IMAGE * images:
            raise DataError(
                f"{folder} has {others} files that are not images and only {images} images. "
                "Name the folder that holds the images."
            )
        yield path


def _kind(entry: os.DirEntry[str]) -> str:
    """What an entry is, or what its link leads to; no system call if the folder's listing shows it."""
    try:
        if entry.is_file():
            return FILE
        if entry.is_dir():
            return FOLDER
    except OSError:  # a link to itself, or into a folder that is out of reach
        return NOTHING
    return NOTHING if entry.is_symlink() else OTHER


def account_for_link(path: Path, inventory: Inventory, links: str) -> None:
    """A broken link: a fault, or with `links="skip"` a note."""
    if links == "skip":
        inventory.note(DANGLING, path)
        return
    inventory.fault(
        f"{path} is a link to {str(path.readlink())!r}, which does not exist: restore the target, remove the link, or "
        "leave such links out with data.dangling_links=skip (--dangling-links skip of commands)."
    )


def _identity(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(
            f"The folder {path} cannot be read ({error.strerror}): its files would be missing; grant access, or move "
            "it out of the dataset."
        ) from error
    return status.st_dev, status.st_ino
