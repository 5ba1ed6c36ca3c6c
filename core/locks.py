"""Locks between processes: one owner at a time, told by host, process id and start, which ends with its owner.

The system's own lock (flock) on a file decides; it ends with the process that holds it, however that ends. Some network
folders lock for each host by itself. So the file also names its owner, who touches it every few seconds: a lock of
another host counts while that continues.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from core.failures import write_failure

try:
    import fcntl
except ImportError:  # pragma: no cover - not on Windows
    fcntl = None  # type: ignore[assignment]

BEAT = 10.0  # seconds between two touches
PATIENCE = 3 * BEAT  # a lock of another host that nobody touches for so long is stale
_UNSUPPORTED = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL})


@dataclass(frozen=True)
class Owner:
    """A process that holds a lock, or held it."""

    host: str
    pid: int
    started: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started}"


class FileLock:
    """A lock file.

    Args:
        path: of the file; its folder must exist. It is there as long as somebody holds the lock, or died holding it.

    Attributes:
        owner: who holds it, as far as a failed `acquire` could see; or whose stale lock was taken over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owner: Owner | None = None
        self._handle: int | None = None
        self._locked: bool | None = None
        self._released = threading.Event()
        self._seen: tuple[float, float] | None = None  # time of the last touch, and when it was first seen

    def acquire(self) -> bool:
        """Take the lock unless another process has it; may be called again and again.

        Returns:
            Whether this process holds it now. Where it does not and `is_watched` is true, later calls will tell whether
            the owner lives.

        Raises:
            WriteError: the file cannot be made.
        """
        handle = self._open()
        if not self._is_free(handle):
            os.close(handle)
            return False
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(asdict(_myself())).encode(), 0)
        os.fsync(handle)
        self._handle = handle
        self._released.clear()
        threading.Thread(target=self._touch, args=(handle,), daemon=True).start()
        return True

    @property
    def is_watched(self) -> bool:
        """Whether the owner is on another host, and not yet known to be alive."""
        return self._seen is not None

    def release(self) -> None:
        """Give the lock back and remove its file; does nothing where it is not held."""
        if self._handle is None:
            return
        self._released.set()
        with contextlib.suppress(OSError):
            self.path.unlink()
        os.close(self._handle)
        self._handle = None

    def _open(self) -> int:
        """The file, opened and, where nobody else has it, locked."""
        while True:
            try:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise write_failure(self.path, error) from error
            self._locked = _lock(handle)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(self.path.stat(), os.fstat(handle)):
                    return handle
            os.close(handle)  # its owner has removed it meanwhile

    def _is_free(self, handle: int) -> bool:
        """Whether the open file names no living owner."""
        self.owner = _parse(os.pread(handle, 4096, 0))
        if self._locked is False:
            self._seen = None
            return False
        if self.owner is None:
            return True
        if self.owner.host == socket.gethostname():
            return self._locked is True or not _lives(self.owner)
        touched, now = os.fstat(handle).st_mtime, time.monotonic()
        if self._seen is None:
            self._seen = touched, now
        elif self._seen[0] != touched:
            self._seen = None  # it lives
            return False
        return now - self._seen[1] >= PATIENCE

    def _touch(self, handle: int) -> None:
        while not self._released.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(handle)


def _lock(handle: int) -> bool | None:
    """Whether the system's lock was free; None where the folder has none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in _UNSUPPORTED else False
    return True


def _myself() -> Owner:
    return Owner(socket.gethostname(), os.getpid(), datetime.now().isoformat(" ", "seconds"))


def _parse(content: bytes) -> Owner | None:
    """The owner that a lock file names; None for a new or damaged file."""
    try:
        found = json.loads(content)
        return Owner(str(found["host"]), int(found["pid"]), str(found["started"]))
    except (ValueError, KeyError, TypeError):
        return None


def _lives(owner: Owner) -> bool:
    """Whether a process of this host lives."""
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
