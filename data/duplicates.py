"""Finds images that are there twice: within a split they count double, and between splits they flatter every figure."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HEAD_BYTES = 1 << 16

Place = tuple[str, Path]  # split, file


def find_copies(places: Sequence[Place]) -> dict[tuple[str, ...], list[list[Path]]]:
    """Files of the same content.

    Args:
        places: split and file of each image.

    Returns:
        Groups of files by the splits in which their content occurs. Whole files are read only where size and beginning
        are the same.
    """
    groups = [list(places)]
    for key in (_size, _head, _content):
        groups = [part for group in groups for part in _parts(group, key) if len(part) > 1]
    found: dict[tuple[str, ...], list[list[Path]]] = defaultdict(list)
    for group in groups:
        splits = tuple(dict.fromkeys(split for split, _ in group))
        found[splits].append([path for _, path in group])
    return dict(found)


def _parts(group: list[Place], key: Callable[[Path], Any]) -> list[list[Place]]:
    parts: dict[Any, list[Place]] = defaultdict(list)
    for place in group:
        parts[key(place[1])].append(place)
    return list(parts.values())


def _size(path: Path) -> int:
    return path.stat().st_size


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.blake2b(stream.read(HEAD_BYTES)).digest()


def _content(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").digest()
