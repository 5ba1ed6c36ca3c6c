"""Text files as they occur: with a byte-order mark, in UTF-16 as PowerShell writes it, in a code page."""

import codecs
from pathlib import Path

from core.documents import MAX_BYTES, DocumentError, read_limited
from core.errors import DataError

MAX_LIST_BYTES = 256 * 2**20  # of a list of images
MAX_PATH = 4096  # characters of a path, as systems have it
MAX_FILE_NAME = 255  # bytes

# UTF-32 first: its mark begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def is_path(text: str) -> bool:
    """Whether a text can be the path of a file; asking the system for any other one raises."""
    parts = text.encode("utf-8", "replace").split(b"/")
    return bool(text) and "\0" not in text and len(text) <= MAX_PATH and max(map(len, parts)) <= MAX_FILE_NAME


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """Read a text file: UTF-8, or UTF-8, UTF-16 or UTF-32 with a byte-order mark, or UTF-16 without one.

    Raises:
        DataError: it cannot be read, is not a regular file, has more than `max_bytes`, or is in another encoding; the
            message names the first line that is.
    """
    try:
        content = read_limited(path, max_bytes)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): restore it, or grant access.") from error
    except DocumentError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    encoding = next((name for mark, name in MARKS if content.startswith(mark)), None) or _guess(content)
    try:
        return content.decode(encoding).replace("\ufeff", "")  # also within, where files were joined
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path} is not UTF-8 text (line {line} has the byte 0x{content[error.start]:02x}), perhaps a code page of "
            "Windows or a binary file: save it as UTF-8."
            if encoding == "utf-8"
            else f"{path} is damaged {encoding.upper()} text ({error.reason}): save it as UTF-8."
        ) from error


def _guess(content: bytes) -> str:
    """UTF-16 without a mark shows in zeros at every second place of its Latin letters, digits and line ends."""
    start = content[:400]
    even, odd = start[0::2].count(0), start[1::2].count(0)
    if len(content) % 2 == 0 and max(even, odd) > len(start) // 4 and min(even, odd) == 0:
        return "utf-16-le" if odd else "utf-16-be"
    return "utf-8"
