"""Reading image files, and finding the broken ones before a run starts.

OpenCV decodes fastest, but returns a truncated JPEG without an error, its missing part grey. So every file is read once
by Pillow, which raises an error, and once by OpenCV, which reads it later and knows fewer formats: at an eighth of the
resolution where the format allows it (the whole file is still parsed), in threads, and, if a cache folder is given,
only once per file version.
"""

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from core.documents import check_regular, shown
from core.errors import DataError
from core.names import listing
from core.pictures import LARGE_PIXELS, check_picture, size_problem
from data.inventory import Inventory
from data.text import MAX_LIST_BYTES, is_path, read_text
from data.walk import SUFFIXES, is_image, only_with_images, walk_files

CHECKS = f"2, OpenCV {cv2.__version__}"  # what a remembered verification has made sure of
_ORIENTATION_TAG = 0x0112
_TRANSPOSED = frozenset({5, 6, 7, 8})  # EXIF orientations that swap height and width

_log = logging.getLogger(__name__)
_large = threading.Lock()  # held while a large image is verified, so that few of them are in memory

Version = tuple[int, int]  # of a file: bytes, time of its last change in nanoseconds


@dataclass(frozen=True)
class ImageHeader:
    """Size of an image file as stored, whether its EXIF orientation turns it by 90 degrees, and its file's version."""

    height: int
    width: int
    transposed: bool
    version: Version | None = None

    def size(self, apply_orientation: bool = True) -> tuple[int, int]:
        """(height, width) as decoded with or without the EXIF orientation."""
        if self.transposed and apply_orientation:
            return self.width, self.height
        return self.height, self.width


def list_images(path: Path) -> list[Path]:
    """Collect image files for prediction.

    Args:
        path: one image, a folder (searched with its subfolders and linked folders, without hidden files), or a `.txt`
            file with one path per line, relative to the file's folder.

    Returns:
        At least one path, sorted by name for folders, in the file's order for lists.

    Raises:
        DataError: nothing there, or no image in it.
    """
    if path.is_dir():
        inventory = Inventory()
        files = only_with_images(walk_files(path, inventory, "skip"), path)
        found = sorted(file for file in files if is_image(file))
        inventory.log()
        if not found:
            raise DataError(f"No image in folder {path}: expected files with a suffix of {sorted(SUFFIXES)}.")
        return found
    if not path.is_file():
        raise DataError(
            f"No file or folder at {path}: expected an image, a folder of images, or a .txt list."
        )
    if path.suffix.lower() == ".txt":
        lines = [line.strip() for line in read_text(path, MAX_LIST_BYTES).splitlines()]
        odd = next((line for line in lines if line and not is_path(line)), None)
        if odd is not None:
            raise DataError(f"{path} holds {shown(odd)}, which is not a file path.")
        found = [path.parent / line for line in lines if line]
        missing = [str(file) for file in found if not file.is_file()]
        if missing or not found:
            raise DataError(
                f"{path} lists {len(found)} images, of which {len(missing)} do not exist: {listing(missing) or '-'}. "
                "Paths are relative to the list's folder."
            )
        return found
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path} is not an image: expected a suffix of {sorted(SUFFIXES)}, a folder, or a .txt list."
        )
    return [path]


def read_image(path: Path, apply_orientation: bool = True) -> NDArray[np.uint8]:
    """Decode an image file to uint8 [H, W, 3], RGB.

    Grey images get three equal channels, an alpha channel is dropped, 16 bits become 8.

    Raises:
        DataError: the file is missing, larger than `core.pictures` says, or cannot be decoded.
    """
    check_picture(path)
    flags = cv2.IMREAD_COLOR if apply_orientation else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imread(str(path), flags)
    if image is None:
        reason = "cannot be decoded" if path.is_file() else "does not exist"
        raise DataError(f"Image {path} {reason}: restore the file, or remove it and its annotation.")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)


def read_header(path: Path, verify: bool = True) -> ImageHeader:
    """Read an image's size and orientation, and with `verify` its whole content.

    Raises:
        OSError: the file is missing, truncated, no image (also as Pillow's `UnidentifiedImageError`, a subclass), too
            large, or of a kind that `read_image` cannot decode.
    """
    check_regular(path)
    with Image.open(path) as image:
        width, height = image.size
        problem = size_problem(height, width)
        if problem:
            raise OSError(problem)
        transposed = image.getexif().get(_ORIENTATION_TAG, 1) in _TRANSPOSED
        kind = f"{image.format}, mode {image.mode}"
        if verify:
            # Only JPEG has a draft mode: an eighth of the resolution skips most of the arithmetic.
            image.draft("L", (max(width // 8, 1), max(height // 8, 1)))
            image.load()
        is_jpeg = image.format == "JPEG"
    header = ImageHeader(height, width, transposed)
    if not verify:
        return header
    if is_jpeg and _ends_in_zeros(path):
        raise OSError("its end is filled with zeros, as after an interrupted download")
    if is_jpeg and _decodes_to(path, header):
        return header
    return _decoded_header(path, transposed, kind)


def file_version(path: Path) -> Version:
    """What tells one version of a file from another; raises OSError where there is none."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _is_large(path: Path) -> bool:
    check_regular(path)
    with Image.open(path) as image:
        return image.width * image.height > LARGE_PIXELS


def _decodes_to(path: Path, header: ImageHeader) -> bool:
    """Whether OpenCV decodes a JPEG to the size that its header says; an eighth of each side is enough to know."""
    image = cv2.imread(str(path), cv2.IMREAD_REDUCED_COLOR_8)
    return image is not None and image.shape[:2] == tuple(-(-side // 8) for side in header.size())


def _decoded_header(path: Path, transposed: bool, kind: str) -> ImageHeader:
    """Size and orientation as OpenCV decodes the file, which may take no notice of its orientation."""
    try:
        shown = read_image(path)
        stored = read_image(path, apply_orientation=False) if transposed else shown
    except DataError as error:
        raise OSError(
            f"{kind}: OpenCV does not decode it; convert it to PNG or JPEG with 8 bits per channel"
        ) from error
    return ImageHeader(stored.shape[0], stored.shape[1], shown.shape != stored.shape)


def _ends_in_zeros(path: Path) -> bool:
    """Whether zeros replace a JPEG's end marker; decoders silently read them as grey."""
    with path.open("rb") as stream:
        stream.seek(-2, os.SEEK_END)
        if stream.read() != b"\0\0":
            return False
    return not path.read_bytes().rstrip(b"\0").endswith(b"\xff\xd9")


def scan_images(
    paths: Sequence[Path],
    verify: bool = True,
    cache_dir: Path | None = None,
    inventory: Inventory | None = None,
) -> list[ImageHeader | None]:
    """Read the headers of many files in threads and, with `verify`, make sure that each decodes to its end.

    Args:
        paths: image files.
        verify: decode each file. False reads only the headers.
        cache_dir: folder for a small JSON file that remembers verified files by size and modification time.
        inventory: one that collects gets a fault for each broken file.

    Returns:
        One header per path; None for a broken file where the inventory collects.

    Raises:
        DataError: some files are broken (names the first ten), or the cache folder cannot be written.
    """
    started = time.perf_counter()
    cache_file = _cache_file(paths, cache_dir) if cache_dir and verify else None
    known = _read_cache(cache_file) if cache_file else {}

    def scan(path: Path) -> tuple[str, ImageHeader | str]:
        try:
            version = file_version(path)
            key = f"{path}|{version[0]}|{version[1]}"
            header = known.get(key)
            if header is None:
                with _large if verify and _is_large(path) else nullcontext():
                    header = read_header(path, verify)
            return key, replace(header, version=version)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = "is not an image" if isinstance(error, UnidentifiedImageError) else str(error)
            return "", reason

    with ThreadPoolExecutor(max_workers=min(16, 2 * (os.cpu_count() or 1))) as pool:
        results = list(pool.map(scan, paths))
    broken = [f"{path} ({r})" for path, (_, r) in zip(paths, results, strict=True) if isinstance(r, str)]
    if broken and inventory is not None and inventory.collects:
        for file in broken:
            inventory.fault(f"{file}: cannot be read. Restore it, or remove it and its annotation.")
    elif broken:
        raise DataError(
            f"{len(broken)} of {len(paths)} images cannot be read: {listing(broken)}. "
            "Restore these files, or remove them and their annotations."
        )
    headers = {key: header for key, header in results if isinstance(header, ImageHeader)}
    if verify:
        new = len(headers.keys() - known.keys())
        _log.info("%s", _verified(len(headers), new, time.perf_counter() - started))
    if cache_file and headers.keys() - known.keys():
        _write_cache(cache_file, headers)
    return [header if isinstance(header, ImageHeader) else None for _, header in results]


def _verified(number: int, new: int, seconds: float) -> str:
    """How many images can be used, and how many of them had to be decoded to find out."""
    if not new:
        return f"{number} images: all verified by an earlier run"
    before = f", {number - new} were by an earlier run" if new < number else ""
    return f"{number} images: {new} verified in {seconds:.1f} s{before}"


def _cache_file(paths: Sequence[Path], cache_dir: Path) -> Path:
    digest = hashlib.sha256("\n".join([CHECKS, *map(str, paths)]).encode()).hexdigest()[:16]
    return cache_dir / f"verified-images-{digest}.json"


def _read_cache(cache_file: Path) -> dict[str, ImageHeader]:
    if not cache_file.is_file():
        return {}
    try:
        entries = json.loads(cache_file.read_text(encoding="utf-8"))
        return {key: ImageHeader(int(h), int(w), bool(t)) for key, (h, w, t) in entries.items()}
    except (ValueError, TypeError, AttributeError) as error:
        _log.warning(
            "Ignoring the damaged image cache %s (%s): all images are verified again.", cache_file, error
        )
        return {}


def _write_cache(cache_file: Path, headers: dict[str, ImageHeader]) -> None:
    entries = {key: (header.height, header.width, header.transposed) for key, header in headers.items()}
    temporary = cache_file.with_suffix(f".{os.getpid()}.tmp")
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(entries), encoding="utf-8")
        temporary.replace(cache_file)
    except OSError as error:
        raise DataError(
            f"Cannot write {cache_file} ({error.strerror}), which records verified images: choose another folder "
            "with data.cache_dir, or data.cache_dir=null to verify them on every run."
        ) from error
