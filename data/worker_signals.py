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
def holding_sigterm() -> Iterator[None]:
    """Workers that start in the block have SIGTERM blocked: none is ended before it can tell who sent the signal."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
