"""Signals in a loader's worker processes.

Ctrl-C, and a scheduler's signals, reach the whole process group. The main process finishes its step and saves, for
which it needs its workers: they leave such signals to it, and end when it tells them to, or dies.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


@contextmanager
def holding_signals() -> Iterator[None]:
    """Handle signals that come in the block at its end; workers that start in it have SIGTERM blocked.

    Python drops an exception that a handler raises within a fork, and prints it with a traceback. Other threads than
    this one receive signals that it has blocked, so blocking alone does not hold them. A worker with SIGTERM blocked is
    not ended before it can tell who sent the signal.
    """
    came: list[int] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in (*IGNORED, signal.SIGTERM):
            if callable(signal.getsignal(number)):
                handlers[number] = signal.signal(number, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for held in came:
            signal.raise_signal(held)


def leave_signals_to_parent() -> None:
    """Called by a worker at its start."""
    parent = os.getppid()
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    # the parent itself ends a worker by SIGTERM, so that one must tell who sends it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before
            os._exit(1)


def _end_with(parent: int) -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
            os._exit(0)
