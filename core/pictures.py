"""The size of a picture from its header, before anything is decoded.

A PNG file of some kilobytes can stand for 10^9 pixels. Every decoder of pictures in Octet is called through
`check_picture` first. OpenCV has limits of its own that it does not report: `resize` and `warpAffine` end in an
assertion for sides of 32,767 pixels and more.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from core.documents import DocumentError, check_regular
from core.errors import DataError

MAX_PIXELS = 2**26  # 8192 x 8192: 200 MB as RGB
MAX_SIDE = 32766
LARGE_PIXELS = 2**24  # decoded one at a time where many are verified

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # the limit here is below Pillow's


def check_picture(path: Path) -> tuple[int, int]:
    """Read a picture's (height, width) from its header, as stored.

    Raises:
        DataError: it is not an image that Pillow reads, not a regular file, or larger than `MAX_PIXELS` or `MAX_SIDE`.
    """
    try:
        check_regular(path)
        with Image.open(path) as image:
            width, height = image.size
    except FileNotFoundError as error:
        raise DataError(
            f"Image {path} does not exist: restore the file, or remove it and its annotation."
        ) from error
    except DocumentError as error:
        raise DataError(f"Image {path} cannot be read: {error}.") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"Image {path}: {_too_large(str(error))}") from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"Image {path} cannot be decoded: it is not an image. Restore the file, or remove it and its annotation."
        ) from error
    except (OSError, SyntaxError, ValueError, OverflowError, MemoryError) as error:
        raise DataError(
            f"Image {path} cannot be decoded ({error}): restore the file, or remove it and its annotation."
        ) from error
    problem = size_problem(height, width)
    if problem:
        raise DataError(f"Image {path}: {problem}")
    return height, width


def size_problem(height: int, width: int) -> str | None:
    """What is wrong with a picture's size, in words; None where nothing is."""
    if height * width <= MAX_PIXELS and max(height, width) <= MAX_SIDE:
        return None
    return _too_large(f"it has {height} x {width} pixels (height x width)")


def _too_large(what: str) -> str:
    return (
        f"{what}, more than the {MAX_PIXELS} that are decoded, or a side of more than {MAX_SIDE}: "
        "shrink it, or cut it into tiles."
    )
