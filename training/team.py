"""Processes that work on one run together: `torchrun --nproc-per-node N train_qat.py ...`.

Each process runs the same shared stages. What they divide among them (images, units) they gather again, so that every
process continues with the same values; the first one writes and prints. See docs/distributed.md.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from core.errors import EXIT_INTERRUPTED, EXIT_OK, OctetError, TeamError
from core.failures import known_failure
from core.files import write_json
from training.link import Link

Item = TypeVar("Item")
TIMEOUT = timedelta(minutes=10)  # for the others to come at the start, and of one exchange
_BROKEN = ("gloo", "Connection closed by peer", "Connection reset", "NCCL", "nccl")
_links: list[Link] = []  # the one of this process, once it has joined


@dataclass(frozen=True)
class Team:
    """This process among `size`; `rank` counts from 0, over all machines."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def gather(self, item: Item) -> list[Item]:
        """Every process's item, in the order of ranks, in every process."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        self.wait()
        with _exchanging():
            distributed.all_gather_object(items, item)
        return items

    def collect(self, item: Item) -> list[Item]:
        """Every process's item, in the order of ranks, in the first process; in the others their own alone."""
        if self.size == 1:
            return [item]
        items: list[Any] | None = [None] * self.size if self.first else None
        self.wait()
        with _exchanging():
            distributed.gather_object(item, items)
        return [item] if items is None else items

    def share(self, item: Item) -> Item:
        """The first process's item, in every process."""
        if self.size == 1:
            return item
        items: list[Any] = [item]
        self.wait()
        with _exchanging():
            distributed.broadcast_object_list(items)
        return items[0]

    def from_first(self, compute: Callable[[], Item]) -> Item:
        """What the first process computes, in every process."""
        return self.share(compute() if self.first else None)  # type: ignore[return-value]

    def wait(self) -> None:
        """Wait for all processes, without a time limit.

        Raises:
            TeamError: another process has failed, or is gone.
        """
        if self.size > 1:
            _links[0].wait()

    def training_group(self, device: torch.device) -> Any:
        """The processes' group for gradients: NCCL where each has a GPU of its own, else gloo; None is gloo's."""
        own_gpu = (
            device.type == "cuda"
            and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
        )
        return distributed.new_group(backend="nccl", timeout=TIMEOUT) if own_gpu else None

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Where the block fails, tell the other processes why. Of all of them, the first to fail or to notice speaks.

        Raises:
            SystemExit: it is another process that speaks; with the exit code that it has.
        """
        try:
            yield
        except BaseException as error:
            if self.size == 1 or (isinstance(error, SystemExit) and error.code in (None, EXIT_OK)):
                raise
            raised = _meaning(error)
            message, exit_code = _described(raised)
            told = _links[0].tell(message, exit_code)
            if told.speaker != self.rank:
                raise SystemExit(told.exit_code) from error
            _write_error_file(told.message)
            if raised is not error:
                raise raised from error
            raise


ALONE = Team()


def join_team() -> Team:
    """The team that torchrun's environment variables describe; without them this process is alone.

    Raises:
        TeamError: the other processes do not come.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Team()
    if not _links:
        try:
            store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
            # torchrun keeps its store for a restart, and with it the addresses of processes that are gone
            prefixed = distributed.PrefixStore(f"group/{_attempt()}", store)  # type: ignore[attr-defined]
            distributed.init_process_group(
                "gloo", timeout=TIMEOUT, world_size=size, rank=rank, store=prefixed
            )
            _links.append(Link(_connect(), _connect(), rank, size))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise TeamError(
                f"the other processes of this job did not come ({reason}): see their output"
            ) from error
        atexit.register(_leave)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return Team(distributed.get_rank(), distributed.get_world_size())


def _connect() -> Any:
    """A connection of its own to the store of this job; a restarted job does not see what it wrote before."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=20))  # type: ignore[attr-defined]
    return distributed.PrefixStore(f"octet/{_attempt()}", store)  # type: ignore[attr-defined]


def _attempt() -> str:
    """How often torchrun has started these processes again."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _leave() -> None:
    _links[0].close()
    with suppress(RuntimeError):
        distributed.destroy_process_group()


@contextmanager
def _exchanging() -> Iterator[None]:
    """Say which process is gone where an exchange fails."""
    try:
        yield
    except RuntimeError as error:
        raise _links[0].lost(error) from error


def _meaning(error: BaseException) -> BaseException:
    """The error that the user should see: a broken connection is that of a process that is gone."""
    if isinstance(error, SystemExit) and (missing := _links[0].missing()) is not None:
        return TeamError.of(missing, int(str(error.code)))  # torchrun ends the processes that are left
    known = known_failure(error)
    if known is None and isinstance(error, RuntimeError) and any(text in str(error) for text in _BROKEN):
        return _links[0].lost(error)
    return known or error


def _described(error: BaseException) -> tuple[str, int]:
    """Message and exit code of an error."""
    if isinstance(error, OctetError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", EXIT_INTERRUPTED
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        return f"ended with exit code {code}", code
    return f"{type(error).__name__}: {error}", 1


def _write_error_file(message: str) -> None:
    """Leave the message where torchrun looks for it, so that its summary has it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None:
        with suppress(OSError):
            write_json(Path(path), {"message": message, "timestamp": int(time.time())})
