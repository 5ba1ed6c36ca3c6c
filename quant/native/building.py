"""Builds the native kernels, each at its first use, with the machine's C compiler, and keeps it for the user.

A shared library is code, so the folder that keeps it must belong to the user, and nobody else may write into it.
Otherwise, or where it cannot be written, each process builds the library for itself in a private temporary folder.

The name of a kept library is a hash of what it depends on: source, flags, compiler, processor. A hash of the content is
its end, so that a damaged file is noticed before it is loaded, and built again. Files appear whole or not at all: any
number of processes may build at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from core.errors import KernelError, WriteError
from core.files import write_bytes
from core.machine import CPU_INFO

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("fake_quantize.c")
STATISTICS = Path(__file__).with_name("statistics.c")
GRADIENTS = Path(__file__).with_name("gradients.c")
HEADERS = tuple(Path(__file__).with_name(name) for name in ("blocks.h", "silu.h"))
COMPILERS = ("cc", "gcc", "clang")
FLAGS = (
    "-std=gnu11", "-O3", "-march=native", "-fPIC", "-shared",
    "-ffp-contract=off",  # products and sums are rounded one by one, as torch's operators do
    "-fno-math-errno", "-fno-trapping-math",  # no value depends on these two; loops become vector instructions
)  # fmt: skip
SECONDS = 120  # for the compiler, which takes less than one
_DIGEST = hashlib.sha256().digest_size


def load_library(source: Path | None = None, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """A kernel's library: the kept one, or a new one.

    Args:
        source: the C file; None for that of fake quantization.
        flags: of the compiler, in addition to `FLAGS`.

    Raises:
        KernelError: it cannot be built or loaded here; the message says why, and what to do about it.
    """
    source = source or SOURCE
    command, flags = compiler(), (*FLAGS, *flags)
    name = f"{source.stem}-{_key(command, flags, source)}.so"
    folder = private_cache_folder()
    if folder is not None:
        library = _kept(folder / name)
        if library is not None:
            return library
    with tempfile.TemporaryDirectory(prefix="octet-kernel-") as temporary:  # of mode 0700
        built = Path(temporary) / name
        _compile(command, flags, source, built)
        if folder is not None:
            content = built.read_bytes()
            try:
                write_bytes(folder / name, content + hashlib.sha256(content).digest())
            except WriteError as error:
                log.info("the kernel is not kept for other processes: %s", error)
        return _opened(built)


def compiler() -> list[str]:
    """The command of the C compiler: `$CC`, or the first of cc, gcc and clang.

    Raises:
        KernelError: there is none.
    """
    given = shlex.split(os.environ.get("CC", ""))
    found = next((path for name in (given[:1] or COMPILERS) if (path := shutil.which(name))), None)
    if found is None:
        wanted = (
            f"$CC is {given[0]!r}, which is not a program" if given else "no C compiler (cc, gcc or clang)"
        )
        raise KernelError(
            f"the native kernel cannot be built: {wanted}. Install one (Debian, Ubuntu: apt-get install gcc), or use "
            "quant.kernel=auto"
        )
    return [found, *given[1:]]


def cache_folder() -> Path:
    """Where the user's libraries are kept: `octet` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path("~/.cache").expanduser()) / "octet"


def private_cache_folder() -> Path | None:
    """The cache folder, made if it is new; None where it cannot be used, or where others may write into it."""
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        log.info("the kernel is not kept in %s: %s", folder, error.strerror)
        return None
    if not stat.S_ISDIR(found.st_mode) or not _is_private(found):
        log.warning(
            "the kernel is not kept in %s: it is not a folder of user %d that nobody else may write into "
            "(chmod go-w)",
            folder,
            os.geteuid(),
        )
        return None
    return folder


def _is_private(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _key(command: list[str], flags: tuple[str, ...], source: Path) -> str:
    """Hash of all that the library depends on."""
    try:
        version = subprocess.run(
            [command[0], "--version"], capture_output=True, timeout=SECONDS, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise _failure(command, error) from error
    text = CPU_INFO.read_text() if CPU_INFO.is_file() else ""
    processor = re.findall(
        r"^(?:model name|flags|CPU part|Features)\s*:.*$", text.split("\n\n")[0], re.MULTILINE
    )
    files = [path.read_bytes() for path in (source, *HEADERS)]
    parts = (files, flags, command, version, platform.machine(), processor)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _kept(path: Path) -> ctypes.CDLL | None:
    """The library of an earlier process; None where there is none, or it is not whole, or not the user's own."""
    try:
        found = path.lstat()
        content = path.read_bytes()
    except OSError:
        return None
    is_whole = content[-_DIGEST:] == hashlib.sha256(content[:-_DIGEST]).digest()
    if not (stat.S_ISREG(found.st_mode) and _is_private(found) and is_whole):
        log.warning("%s is damaged or not the user's own: it is built again", path)
        return None
    return _opened(path)


def _compile(command: list[str], flags: tuple[str, ...], source: Path, path: Path) -> None:
    try:
        subprocess.run(
            [*command, *flags, f"-I{HEADERS[0].parent}", str(source), "-o", str(path)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise _failure(command, error) from error


def _failure(command: list[str], error: Exception) -> KernelError:
    output = str(getattr(error, "stderr", None) or error).strip().splitlines()
    reason = next((line for line in output if "error" in line), output[0] if output else "no output")
    return KernelError(
        f"the native kernel cannot be built: {shlex.join(command)} says {reason!r}. Set CC to another C compiler, or "
        "use quant.kernel=auto"
    )


def _opened(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(
            f"the native kernel cannot be loaded: {error}. Where its folder forbids programs (noexec), set "
            "XDG_CACHE_HOME and TMPDIR to others, or use quant.kernel=auto"
        ) from error
