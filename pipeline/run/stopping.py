"""How a run stops when it is asked to: it finishes the step, saves, and prints how to continue.

SIGINT (Ctrl-C) ends with exit code 130, SIGTERM with 143, SIGHUP with 129, and SIGUSR1, by which SLURM announces the
end of a job's time (`sbatch --signal=USR1@120`), with 75, the code for "try again" (EX_TEMPFAIL). A second signal ends
the process at once.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from core.errors import EXIT_HANGUP, EXIT_INTERRUPTED, EXIT_REQUEUE, EXIT_TERMINATED

EXIT_CODES = {
    signal.SIGINT: EXIT_INTERRUPTED,
    signal.SIGTERM: EXIT_TERMINATED,
    signal.SIGHUP: EXIT_HANGUP,
    signal.SIGUSR1: EXIT_REQUEUE,
}
ECHO = 1.0  # seconds: a launcher may send the signal that the process group got once more


class Stopped(SystemExit):
    """The run was asked to stop, and has saved what it had; `code` is the exit code."""

    def __init__(self, number: int) -> None:
        super().__init__(EXIT_CODES[signal.Signals(number)])
        self.name = signal.Signals(number).name


class Stopping:
    """The signals of this process.

    Attributes:
        requested: the signal that was received, None before.
        is_deferred: whether a signal is only noted, for `check` to act on; else it raises `Stopped` where it comes.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self.is_deferred = False
        self._time = 0.0
        self._pid = os.getpid()

    def watch(self) -> None:
        """Receive the signals from now on."""
        self.requested, self.is_deferred, self._pid = None, False, os.getpid()
        for number in EXIT_CODES:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self._receive)

    def check(self) -> None:
        """Stop where a signal was received.

        Raises:
            Stopped: one was.
        """
        if self.requested is not None:
            raise Stopped(self.requested)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a child that has not set its own handlers yet
            return
        now = time.monotonic()
        if self.requested is not None:
            if now - self._time > ECHO:
                os.write(2, b"Stopped immediately; the states saved before are kept.\n")
                os._exit(EXIT_CODES[signal.Signals(number)])
            return
        self.requested, self._time = number, now
        if self.is_deferred:
            os.write(2, b"Stopping after this step; a second signal stops immediately.\n")
        else:
            self.check()


STOPPING = Stopping()
