"""How the processes of one job notice that one of them is gone, and end with its message instead of waiting for ever.

Every process writes a sign of life into the store that torchrun (or the first process) keeps. The first process looks
at all of them, the others at the first one's. A process that fails writes why; the others end as soon as they have
read it. One that has shown no sign of life for `PATIENCE` seconds (its machine is lost, or it was stopped by a signal)
counts as gone. Waiting for another process is waiting at the store, which has no time limit and notices all this.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.errors import EXIT_INPUT, TeamError

BEAT = 1.0  # seconds between signs of life
PATIENCE = 30.0  # seconds without one; a process that holds Python's lock as long counts as gone
GRACE = 5.0  # seconds for the main thread to end by itself once another process is gone
_LEFT = "left"


@dataclass(frozen=True)
class Member:
    """A process of the job: `start` is when it started, in ticks of its machine (0 where that is not known)."""

    rank: int
    host: str
    pid: int
    start: int = 0

    @classmethod
    def this(cls, rank: int) -> Member:
        """This process."""
        return cls(rank, socket.gethostname(), os.getpid(), _process_state(os.getpid())[1])

    @property
    def state(self) -> str:
        """`stopped`, `gone`, or `unknown` for a process that runs, or on another machine."""
        if self.host != socket.gethostname():
            return "unknown"
        letter, start = _process_state(self.pid)
        if not letter or letter in "ZX" or (self.start and start != self.start):
            return "gone"
        return "stopped" if letter in "Tt" else "unknown"

    def __str__(self) -> str:
        return f"process {self.rank} (pid {self.pid} on {self.host})"


@dataclass(frozen=True)
class Failure:
    """Why the job ends.

    Attributes:
        rank: of the process that failed or is gone.
        message: for the user.
        exit_code: of all processes.
        speaker: rank of the process that noticed it, and prints the message.
    """

    rank: int
    message: str
    exit_code: int
    speaker: int


class Link:
    """One process's connection to the others.

    Args:
        store: key-value store that all processes share, used by the main thread.
        watched_store: a second connection to it, for the thread that watches.
        rank: of this process.
        size: number of processes.
    """

    def __init__(self, store: Any, watched_store: Any, rank: int, size: int) -> None:
        self.store = store
        self.rank, self.size = rank, size
        self._num_waits = 0
        store.set(f"member/{rank}", json.dumps(asdict(Member.this(rank))))
        store.set(f"beat/{rank}", "0")
        self.wait()
        self.members = [Member(**json.loads(store.get(f"member/{other}"))) for other in range(size)]
        self.watch = _Watch(self, watched_store)
        self.watch.start()

    def wait(self) -> None:
        """Wait for all processes, without a time limit.

        Raises:
            TeamError: another process has failed or is gone.
        """
        self._num_waits += 1
        key, pause = f"wait/{self._num_waits}", 0.001
        try:
            arrived = self.store.add(key, 1)
            while arrived < self.size:
                self.check()
                time.sleep(pause)
                pause = min(1.5 * pause, 0.1)
                arrived = self.store.add(key, 0)
        except RuntimeError as error:
            raise self.lost(error) from error

    def check(self) -> None:
        """Raise the TeamError of a process that has failed or is gone."""
        watch = getattr(self, "watch", None)
        if watch is not None and watch.failure is not None:
            raise TeamError.of(watch.failure.message, watch.failure.exit_code)

    def missing(self) -> str | None:
        """A process on this machine that has ended without leaving, in words."""
        for member in self.members:
            if member.rank != self.rank and member.state == "gone" and self._beat_of(member.rank) != _LEFT:
                return f"{member} has ended without a message: it was killed, for instance for want of memory"
        return None

    def lost(self, error: BaseException) -> TeamError:
        """What the end of a connection to another process means; waits a little for that process to say why."""
        deadline = time.monotonic() + GRACE
        while hasattr(self, "watch") and time.monotonic() < deadline:
            if self.watch.failure is not None:
                return TeamError.of(self.watch.failure.message, self.watch.failure.exit_code)
            with suppress(RuntimeError):
                if (missing := self.missing()) is not None:
                    return TeamError(missing)
            time.sleep(0.1)
        reason = " ".join(str(error).split())[:200]
        return TeamError(f"the connection to another process of this job broke ({reason}): see its output")

    def tell(self, message: str, exit_code: int) -> Failure:
        """Tell the others why this process ends; returns what the first process to fail has told."""
        failure = Failure(self.rank, message, exit_code, self.rank)
        with suppress(RuntimeError):
            failure = announce(self.store, failure)
        return failure

    def close(self) -> None:
        """Leave: the others do not miss this process."""
        self.watch.end()
        with suppress(RuntimeError):
            self.store.set(f"beat/{self.rank}", _LEFT)

    def _beat_of(self, rank: int) -> str:
        return self.store.get(f"beat/{rank}").decode()


def announce(store: Any, failure: Failure) -> Failure:
    """Write a failure into the store unless there is one; returns the one that is there."""
    if store.add("failures", 1) == 1:
        store.set("failure", json.dumps(asdict(failure)))
        return failure
    return Failure(**json.loads(store.get("failure")))


class _Watch(threading.Thread):
    """Shows signs of life and looks for those of others; ends the process where its main thread cannot."""

    def __init__(self, link: Link, store: Any) -> None:
        super().__init__(daemon=True, name="octet-watch")
        self.link = link
        self.store = store
        self.failure: Failure | None = None
        self._ended = threading.Event()
        others = range(1, link.size) if link.rank == 0 else (0,)
        self._ticks = dict.fromkeys(others, 0)  # of this thread, since the last sign of life
        self._beats = dict.fromkeys(others, "")

    def run(self) -> None:
        number = 0
        while not self._ended.wait(BEAT):
            number += 1
            try:
                self.store.set(f"beat/{self.link.rank}", str(number))
                found = self._look()
            except RuntimeError as error:
                message = f"the store of this job is gone, and with it its first process ({str(error)[:200]})"
                found = Failure(0, message, EXIT_INPUT, self.link.rank)
            if found is not None and not self._ended.is_set():
                self._end_process(found)
                return

    def end(self) -> None:
        """Stop looking, and wait for the thread: Python aborts if it returns from the store while Python ends."""
        self._ended.set()
        self.join(GRACE)

    def _look(self) -> Failure | None:
        """The failure that another process has told, or of one that is silent."""
        if self.store.add("failures", 0):
            return Failure(**json.loads(self.store.get("failure")))
        for rank in self._ticks:
            member = self.link.members[rank]
            state = member.state  # looked at first: a process that leaves says so before it ends
            beat = self.store.get(f"beat/{rank}").decode()
            if beat == _LEFT:
                continue
            self._ticks[rank] = 0 if beat != self._beats[rank] else self._ticks[rank] + 1
            self._beats[rank] = beat
            silent = self._ticks[rank] * BEAT
            if silent >= PATIENCE or (state == "gone" and silent):
                return announce(self.store, self._failure_of(member, state, silent))
        return None

    def _failure_of(self, member: Member, state: str, silent: float) -> Failure:
        means = {"stopped": "it was stopped by a signal", "gone": "it has ended"}
        reason = means.get(state, "its machine is lost, or it hangs")
        message = f"{member} has shown no sign of life for {silent:.0f} s: {reason}"
        return Failure(member.rank, message, EXIT_INPUT, self.link.rank)

    def _end_process(self, failure: Failure) -> None:
        """Let the main thread end with the failure; where it is stuck in a call, end the process."""
        self.failure = failure
        _kill_stopped(self.link.members[failure.rank])
        if self._ended.wait(GRACE) or failure.rank == self.link.rank:
            return
        if failure.speaker == self.link.rank:
            print(f"error: {failure.message}", file=sys.stderr, flush=True)
        os._exit(failure.exit_code)


def _kill_stopped(member: Member) -> None:
    """End a process of this job on this machine that was stopped: it could not end by itself."""
    if member.host == socket.gethostname() and member.state == "stopped":
        with suppress(OSError):
            os.kill(member.pid, signal.SIGKILL)


def _process_state(pid: int) -> tuple[str, int]:
    """A process's state as Linux writes it, and when it started; ("?", 0) where the system does not tell."""
    if not Path("/proc/self/stat").exists():
        return "?", 0
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, IndexError, ValueError):
        return "", 0
