"""Failures of the machine that libraries report in words of their own: what they mean to the user.

A full disk, a killed loader process or a limit of the system is no defect of the program, whichever library meets it
first. `known_failure` turns such an exception into an `OctetError` with its remedy; every other exception stays what it
is, and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re

from core.errors import DataError, OctetError, WriteError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
REFUSED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_WRITERS = ("PytorchStreamWriter", "inline_container", "SafetensorError", "I/O error", "write failed")


def known_failure(error: BaseException) -> OctetError | None:
    """What a failure of the machine means to the user; None for any other exception.

    Example: `known_failure(OSError(errno.ENOSPC, "No space left on device", "x.pt"))` is a `WriteError` about x.pt.
    """
    if isinstance(error, OctetError):
        return error
    if isinstance(error, OSError):
        return _disk_failure(error)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, RuntimeError) and (found := _loader_failure(str(error))) is not None:
        return found
    number = re.search(r"os error (\d+)", text)
    if number and int(number[1]) in FULL | REFUSED:
        return write_failure(None, OSError(int(number[1]), _words(int(number[1]))))
    if any(writer in text for writer in _WRITERS) and not isinstance(error, OctetError):
        return write_failure(None, error)
    return None


def write_failure(path: object, error: BaseException) -> WriteError:
    """The error about a file that could not be written; `path` None where it is not known."""
    code = error.errno if isinstance(error, OSError) else None
    number = re.search(r"os error (\d+)", str(error))
    code = int(number[1]) if code is None and number else code
    reason = _words(code) if code is not None else " ".join(str(error).split())[:200]
    remedy = "choose a folder that can be written"
    if code in FULL or code is None:
        remedy = "free some space or choose another folder"
    if code == errno.ENAMETOOLONG:
        remedy = "choose a shorter name"
    if code in (errno.ENOTDIR, errno.EEXIST):
        remedy = "a file is in the place of a folder; choose another path"
    name = "A file" if path is None else str(path)
    return WriteError(f"{name} cannot be written ({reason}): {remedy}")


def _disk_failure(error: OSError) -> WriteError | None:
    if error.errno not in FULL | {errno.EROFS, errno.ENAMETOOLONG}:
        return None
    return write_failure(error.filename, error)


def _loader_failure(text: str) -> DataError | None:
    """The meaning of what torch's DataLoader says about its workers."""
    if text.startswith("DataLoader worker (pid"):
        pids = re.search(r"\(pid(?:\(s\))? ([\d, ]+)\)", text)
        signal = re.search(r"killed by signal: ([\w ]+)", text)
        how = f"was killed ({signal[1].strip()})" if signal else "ended without a word"
        named = f"The data worker with process id {pids[1]}" if pids else "A data worker"
        return DataError(
            f"{named} {how}. Often the memory of the machine or container is used up: "
            "use fewer workers (data.workers=1, or data.workers=0 for none) or smaller batches"
        )
    if text.startswith("Too many open files"):
        return DataError(
            "Too many open files: the data workers cannot hand over their batches. Raise the limit (ulimit -n 4096) or "
            "use data.workers=0"
        )
    return None


def _words(code: int | None) -> str:
    return os.strerror(code) if code is not None else ""
