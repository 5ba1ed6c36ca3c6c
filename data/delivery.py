"""How batches come from worker processes: through memory that is large enough, and with an end where none come.

torch passes tensors in shared memory (/dev/shm). A container may have as little as 64 MB of it, less than the
batches in flight; torch then loses a batch and waits for it for ever. The free memory is checked before workers start,
and where it is too small batches travel through pipes, or are made in this process. A worker that stops delivering,
for whatever reason, ends the iteration with an error that says what is known.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from core.errors import DataError, OctetError
from core.failures import known_failure
from data.letterbox import LetterboxInfo
from data.samples import Batch

SHARED_MEMORY = Path("/dev/shm")
PREFETCH = 2  # batches that each worker prepares ahead, torch's default
TICK = 1.0  # seconds of waiting after which the workers are looked at
PATIENCE = 45.0  # seconds without a batch, and without an image read by any worker
LEAST_ROOM = 2**20  # below this not even the queues' locks fit

_STATES = {
    "R": "running",
    "S": "waiting",
    "D": "waiting for a disk",
    "T": "stopped",
    "Z": "dead",
    "X": "dead",
}
_log = logging.getLogger(__name__)


def free_shared_memory() -> int | None:
    """Bytes that are free in /dev/shm; None where the system has none, and its shared memory no such limit."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


@dataclass(frozen=True)
class Transport:
    """How many workers there are, and whether they pass batches in shared memory."""

    workers: int
    shares: bool = True


def choose_transport(workers: int, batch_bytes: int) -> Transport:
    """Fit the workers to the free shared memory; one log line where it is too small.

    Args:
        workers: processes that are wanted.
        batch_bytes: size of one batch.
    """
    free = free_shared_memory() if workers else None
    needed = batch_bytes * (workers * PREFETCH + 2)  # one in use, one in transit
    if free is None or free >= needed:
        return Transport(workers)
    shares = f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free, the batches in flight need {needed / 1e6:.0f} MB"
    remedy = "give the container more with --shm-size=1g"
    if free < LEAST_ROOM:
        _log.warning("%s: images are read in the main process, which is slower; %s", shares, remedy)
        return Transport(0)
    _log.warning("%s: the workers send batches through pipes, which is slower; %s", shares, remedy)
    return Transport(workers, shares=False)


@dataclass
class Packed:
    """A batch as arrays, which travel through a pipe instead of shared memory."""

    images: NDArray[np.uint8]
    targets: NDArray[np.float32]
    image_ids: list[int]
    infos: list[LetterboxInfo]
    masks: NDArray[np.uint8] | None
    skipped: dict[str, str]

    @classmethod
    def of(cls, batch: Batch) -> Packed:
        """Pack a batch."""
        masks = None if batch.masks is None else batch.masks.numpy()
        return cls(
            batch.images.numpy(), batch.targets.numpy(), batch.image_ids, batch.infos, masks, batch.skipped
        )

    def unpack(self) -> Batch:
        """The batch again."""
        masks = None if self.masks is None else torch.from_numpy(self.masks)
        images, targets = torch.from_numpy(self.images), torch.from_numpy(self.targets)
        return Batch(images, targets, self.image_ids, self.infos, masks, self.skipped)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; called by the DataLoader where CUDA is present."""
        return self.unpack().pin_memory()


def hand_over(batch: Batch, shares: bool) -> Batch | Packed:
    """What a worker returns for a batch: in shared memory, or packed where that is not wanted or too small."""
    if get_worker_info() is None:
        return batch
    if shares:
        # torch would move the tensors in a thread of its queue, where an error loses the batch
        with contextlib.suppress(RuntimeError, OSError):
            for tensor in (batch.images, batch.targets, batch.masks):
                if tensor is not None:
                    tensor.share_memory_()
            return batch
    return Packed.of(batch)


class Pulse:
    """Signs of life of a loader's workers: their process ids, and how many images each of them has read."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._numbers = RawArray(ctypes.c_uint64, 2 * max(workers, 1))

    def start(self, worker: int) -> None:
        """Called by a worker at its start."""
        self._numbers[self.workers + worker] = os.getpid()

    def beat(self) -> None:
        """Called by a worker for each image; does nothing in the main process."""
        info = get_worker_info()
        if info is not None:
            self._numbers[info.id] += 1

    @property
    def beats(self) -> list[int]:
        """Images that each worker has read."""
        return list(self._numbers[: self.workers])

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that have started."""
        return [pid for pid in self._numbers[self.workers :] if pid]

    def describe(self) -> str:
        """The workers and their states, if the system reports them."""
        states = [f"{pid} is {_STATES.get(_state(pid), 'of unknown state')}" for pid in self.pids]
        return ", ".join(states) or "none has started"


class _Watch(threading.Thread):
    """Looks at the workers while the main thread waits for a batch, and decides that they are stuck.

    It is a thread because the wait cannot always be given a limit: a tensor's memory is asked for at the worker that
    made it, and one that is stopped never answers. Only time that is spent waiting counts, in ticks: a run that was
    stopped as a whole, or computes for minutes, has lost none.
    """

    def __init__(self, pulse: Pulse) -> None:
        super().__init__(daemon=True)
        self.pulse = pulse
        self.is_waiting = False
        self.verdict = ""
        self._ended = threading.Event()

    def run(self) -> None:
        waited, beats = 0.0, self.pulse.beats
        while not self._ended.wait(TICK):
            now = self.pulse.beats
            waited, beats = (waited + TICK if self.is_waiting and now == beats else 0.0), now
            if waited >= PATIENCE:
                self.verdict = self.pulse.describe()
                for pid in self.pulse.pids[:1]:  # the signal of its end interrupts the main thread's wait
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                return

    def end(self) -> None:
        """Stop looking."""
        self._ended.set()


def delivered(batches: Any, pulse: Pulse) -> Iterator[Batch]:
    """The batches of a DataLoader's iterator, as long as its workers deliver.

    Raises:
        DataError: a worker died, or none has read an image or delivered a batch for `PATIENCE` seconds.
        OctetError: that a worker met.
    """
    watch = _Watch(pulse)
    if pulse.workers:
        watch.start()
    try:
        while (received := _await(batches, watch)) is not None:
            if isinstance(received, OctetError):
                raise received
            yield received.unpack() if isinstance(received, Packed) else received
    finally:
        watch.end()


def _await(batches: Any, watch: _Watch) -> Any:
    """The next batch; None where there is none."""
    watch.is_waiting = True
    try:
        while not watch.verdict:
            try:
                return next(batches)
            except StopIteration:
                return None
            except (RuntimeError, OSError, EOFError) as error:
                if watch.verdict or str(error).startswith("DataLoader timed out"):
                    continue  # a tick of the wait, see `build_loader`
                known = known_failure(error)
                if known is None:
                    raise
                raise known from error
    finally:
        watch.is_waiting = False
    _stop(batches, watch.pulse)
    free = free_shared_memory()
    space = "" if free is None else f" {SHARED_MEMORY} has {free / 1e6:.0f} MB free."
    raise DataError(
        f"No batch and no image for {PATIENCE:.0f} s: the data workers have stopped delivering (process "
        f"{watch.verdict}).{space} Look for a disk or network folder that does not answer, or use data.workers=0"
    )


def _stop(batches: Any, pulse: Pulse) -> None:
    """Kill the workers: one that is stopped would not end by itself, and this process would wait for it at its end."""
    in_main = threading.current_thread() is threading.main_thread()
    previous = (
        signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main else None
    )  # torch's raises for each of them
    try:
        for pid in pulse.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        batches._shutdown_workers()
    finally:
        if in_main and previous is not None:
            signal.signal(signal.SIGCHLD, previous)


def _state(pid: int) -> str:
    """Letter of a process's state as Linux writes it; empty where that is not known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
