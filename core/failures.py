"""Failures of the machine that libraries report in their own messages: what they mean to the user.

A full disk, a killed loader process or a limit of the system is not a defect of the program, whichever library
reports it. `known_failure` turns such an exception into an `OctetError` with its remedy; every other exception stays
what it is, and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re

from core.errors import DataError, OctetError, ResourceError, WriteError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
UNUSABLE = frozenset({errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.ESTALE, errno.ENOTCONN})
WRITERS = ("PytorchStreamWriter", "inline_container", "unexpected pos", "iostream error", "I/O error: ")
"""Parts of the messages of torch, OpenVINO and safetensors when they cannot write."""
NO_MEMORY = (
    "out of memory",  # CUDA
    "can't allocate memory",  # torch
    "not enough memory",
    "could not create a primitive",  # oneDNN
    "could not create a memory",
    "could not execute a primitive",
    "bad_alloc",
    "bad allocation",
    "Insufficient memory",  # OpenCV
    "Cannot allocate memory",  # the system
)
"""Parts of the messages of libraries that get no memory."""


def known_failure(error: BaseException) -> OctetError | None:
    """What a failure of the machine means to the user; None for any other exception.

    Example: `known_failure(OSError(errno.ENOSPC, "No space left on device", "x.pt"))` is a `WriteError` about x.pt.
    """
    if isinstance(error, OctetError):
        return error
    if (no_memory := _memory_failure(error)) is not None:
        return no_memory
    if isinstance(error, OSError):
        return _disk_failure(error)
    if isinstance(error, RuntimeError) and (found := _loader_failure(str(error))) is not None:
        return found
    return write_failure(None, error) if any(text in str(error) for text in WRITERS) else None


def write_failure(path: object, error: BaseException) -> WriteError:
    """The error about a file that could not be written; `path` None where it is not known."""
    code = error.errno if isinstance(error, OSError) else _stated_code(str(error))
    reason = str(error) if code is None else os.strerror(code)
    if code is None and not isinstance(error, OSError):
        reason = f"is the disk full? {' '.join(reason.split())[:200]}"
    remedy = "choose a folder that can be written"
    if code in FULL or code is None:
        remedy = "free some space or choose another folder"
    elif code in (errno.EACCES, errno.EPERM) and hasattr(os, "getuid"):
        remedy = (
            f"user {os.getuid()} may not write there. Choose another folder, or run as the owner of this one (in a "
            'container: docker run --user "$(id -u)")'
        )
    elif code == errno.ENAMETOOLONG:
        remedy = "choose a shorter name"
    elif code == errno.ENOTDIR:
        remedy = "a file exists where a folder is needed; choose another path"
    return WriteError(f"{'A file' if path is None else path} cannot be written ({reason}): {remedy}")


def lack_of_memory(error: BaseException) -> str | None:
    """What torch, oneDNN, OpenCV or an engine said when it got no memory, shortened; None for any other exception."""
    text = " ".join(str(error).split())
    is_stated = isinstance(error, RuntimeError | OSError) or type(error).__module__.startswith(
        ("cv2", "onnxruntime")
    )
    if not isinstance(error, MemoryError) and not (is_stated and any(part in text for part in NO_MEMORY)):
        return None
    return text[:150] or type(error).__name__


def _memory_failure(error: BaseException) -> ResourceError | None:
    reason = lack_of_memory(error)
    if reason is None:
        return None
    device = "GPU" if "CUDA" in reason else "machine or container"
    return ResourceError(
        f"The memory of the {device} is used up ({reason}): use smaller batches (train.batch_size, qat.batch_size, "
        "evaluate.batch_size), fewer images of a batch at a time (train.micro_batch, qat.micro_batch), smaller images "
        "(data.image_size), or fewer data workers (data.workers)"
    )


def _disk_failure(error: OSError) -> OctetError | None:
    if error.errno in FULL | {errno.EROFS, errno.ENAMETOOLONG}:
        return write_failure(error.filename, error)
    if error.errno in UNUSABLE and error.filename is not None:
        return DataError(
            f"{error.filename} cannot be used ({error.strerror}): check the disk and the permissions"
        )
    return None


def _stated_code(text: str) -> int | None:
    """The system's error number in a message of a library written in Rust."""
    number = re.search(r"os error (\d+)", text)
    return int(number[1]) if number else None


def _loader_failure(text: str) -> DataError | None:
    """The meaning of a message of torch's DataLoader about its workers."""
    if text.startswith("DataLoader worker (pid"):
        pids = re.search(r"\(pid(?:\(s\))? ([\d, ]+)\)", text)
        signal = re.search(r"killed by signal: ([\w ]+)", text)
        how = f"was killed ({signal[1].strip()})" if signal else "ended without a message"
        named = f"The data worker with process id {pids[1]}" if pids else "A data worker"
        return DataError(
            f"{named} {how}. Often the memory of the machine or container is used up: use fewer workers "
            "(data.workers=1, or data.workers=0 for none) or smaller batches"
        )
    if text.startswith("Too many open files"):
        return DataError(
            "Too many open files: the data workers cannot pass on their batches. Raise the limit (ulimit -n 4096) or "
            "use data.workers=0"
        )
    return None
