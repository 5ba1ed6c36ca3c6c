"""Untrusted model files run in a child process with limits on memory and processor time.

An engine's libraries are written in C++ and take whatever a graph asks for: a graph of 200 bytes can ask for a tensor
of 16 GB, or for a loop that never ends. Nothing in the file tells so beforehand. So the commands that open model files
run in a child (`run_confined`), which limits its memory once it knows the file (`confine`) and says when it works with
the model (`limited_time`). The parent ends it where that takes too long, and says why it ended. Inside the pipeline,
whose stages run graphs that they have just written, nothing is limited.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from core.errors import EXIT_INPUT, DeployError

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

BASE_BYTES = 1536 * 2**20  # for libraries, pictures and drawing
BYTES_PER_FILE_BYTE = 8  # weights as read, as planned and as packed
BYTES_PER_INPUT_BYTE = 64  # activations
BYTES_PER_THREAD = 16 * 2**20
BASE_SECONDS = 9  # for loading, and for each call
SECONDS_PER_MEBIBYTE = 0.5  # of the model file
TRUST_HELP = (
    "run the Python code that a run's config.yaml names, and lift the limits on models: for files of your own"
)
WORD = "for a model of your own, --trust lifts the limits"

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
TICK = 0.25  # seconds between two looks at the child
_STATE = struct.Struct(
    "ddd"
)  # seconds that are allowed (0: any), begin on the clock, processor time used at the begin
LATE = f"The model took longer than one of its size can need: it may be damaged or made to hang; {WORD}"

_is_child = False
_shared: mmap.mmap | None = None
_seconds = 0.0


def run_confined(main: Callable[[], int]) -> int:
    """Run a command in a child process that `confine` may limit; returns its exit code.

    Where the system cannot fork, the command runs in this process, without limits.
    """
    global _is_child, _shared
    if resource is None or not hasattr(os, "fork"):
        return main()
    sys.stdout.flush()
    sys.stderr.flush()
    _shared = mmap.mmap(-1, _STATE.size)
    child = os.fork()
    if not child:
        _is_child = True
        _end_with_parent()
        os._exit(_run_child(main))
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells the child as well
    previous_end = signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    try:
        code, is_late = _wait(child, _shared)
    finally:
        signal.signal(signal.SIGINT, previous)
        signal.signal(signal.SIGTERM, previous_end)
        _shared.close()
        _shared = None
    if code >= 0:
        return code
    if -code in (signal.SIGINT, signal.SIGTERM):
        return 128 - code
    print(f"error: {LATE if is_late else _end_of_child(-code)}", file=sys.stderr)
    return EXIT_INPUT


def _wait(child: int, shared: mmap.mmap) -> tuple[int, bool]:
    """Wait for the child; returns its exit code (negative: a signal), and whether it was ended for its time."""
    handle = os.pidfd_open(child) if hasattr(os, "pidfd_open") else None
    is_late = False
    try:
        while True:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status), is_late
            allowed, begin, used = _STATE.unpack(shared[: _STATE.size])
            if allowed and time.monotonic() - begin > allowed and _processor_seconds(child) - used > allowed:
                is_late = True
                os.kill(child, signal.SIGKILL)
            if handle is None:
                time.sleep(TICK)
            else:
                select.select([handle], [], [], TICK)
    finally:
        if handle is not None:
            os.close(handle)


def _processor_seconds(process: int) -> float:
    """Processor time that a process has used, as far as the system tells; infinity where it does not."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("inf")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def confine(paths: Sequence[Path], input_bytes: int = 0, trust: bool = False, effort: int = 1) -> None:
    """Limit this process to what the model files at `paths` can honestly need; does nothing outside `run_confined`.

    Args:
        paths: model files.
        input_bytes: of one batch of images; 0 where it is not known yet.
        trust: lift all limits.
        effort: how many times the time of loading is allowed, and up to four times the memory: for compilers.
    """
    global _seconds
    if not _is_child:
        return
    infinity = resource.RLIM_INFINITY
    if trust:
        _seconds = 0.0
        resource.setrlimit(resource.RLIMIT_DATA, (infinity, infinity))
        return
    size = sum(_size_of(path) for path in paths)
    cores = os.cpu_count() or 1
    allowed = BASE_BYTES + BYTES_PER_FILE_BYTE * size + BYTES_PER_INPUT_BYTE * input_bytes
    allowed = min(effort, 4) * allowed + BYTES_PER_THREAD * cores
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + allowed, infinity))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    scale = max(1.0, input_bytes / (3 * 640 * 640 * 4))
    _seconds = (BASE_SECONDS + SECONDS_PER_MEBIBYTE * size / 2**20) * scale * effort


@contextmanager
def limited_time() -> Iterator[None]:
    """Limit the time of what is done with a model: loading it, or one call. Within another one it does nothing.

    Only time in which the processor works counts, so that a busy machine does not look like a model that hangs.
    """
    if _shared is None or not _seconds or _STATE.unpack(_shared[: _STATE.size])[0]:
        yield
        return
    _shared[: _STATE.size] = _STATE.pack(_seconds, time.monotonic(), time.process_time())
    try:
        yield
    finally:
        _shared[: _STATE.size] = bytes(_STATE.size)


def _end_with_parent() -> None:
    """Let this process end when its parent is killed, where the system can (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _run_child(main: Callable[[], int]) -> int:
    """The command's exit code; everything that it printed is written out."""
    try:
        code = main()
    except SystemExit as error:  # argparse
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except MemoryError:
        print(f"error: {_out_of_memory()}", file=sys.stderr)
        code = EXIT_INPUT
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        return 141
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = 141
    return code


def _end_of_child(number: int) -> str:
    """What the signal that ended the child means for the user."""
    if number in (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS):
        return (
            f"The model ended the process that ran it ({signal.Signals(number).name}), as running out of memory or a "
            f"damaged file does; {WORD}"
        )
    return f"The process that ran the model was ended by {signal.Signals(number).name}"


def _out_of_memory() -> str:
    return str(DeployError(f"The model asks for more memory than one of its size can need; {WORD}"))


def _size_of(path: Path) -> int:
    """Bytes of a model, with the weights that are stored in separate files."""
    files = [path, path.with_suffix(".bin"), Path(f"{path}.data"), path.with_suffix(".data")]
    try:
        return sum(file.stat().st_size for file in dict.fromkeys(files) if file.is_file())
    except (OSError, ValueError):
        return 0


def _data_bytes() -> int:
    """Private writable memory of this process, as RLIMIT_DATA counts it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
    except (OSError, StopIteration, ValueError):
        return 4 * 2**30
