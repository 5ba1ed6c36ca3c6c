"""Writing files whole or not at all.

Every artifact goes through this module. The content is written to a temporary file in the same folder, flushed to disk
(fsync), and renamed over the target; then the folder is flushed, so that the new name survives a power failure. A
reader sees the old file or the new one, never a part, and a full disk leaves the old one in place.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.errors import WriteError

MODE = 0o644  # a temporary file is private; artifacts are to be shared


@contextmanager
def written_atomically(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Give one temporary path for each target; all of them replace their targets when the block ends well.

    For writers that want a path of their own (safetensors, torch.save, OpenVINO). Files that belong together are
    given together: no target is replaced before every temporary file is complete and on disk. The temporary names keep
    the targets' endings.

    Raises:
        WriteError: a folder or a file cannot be written; every target is as it was before.
    """
    temporary: list[Path] = []
    try:
        for path in paths:
            temporary.append(_temporary_beside(path))
        yield tuple(temporary)
        for part in temporary:
            part.chmod(MODE)
            _flush(part)
        for part, path in zip(temporary, paths, strict=True):
            part.replace(path)
        for folder in dict.fromkeys(path.parent for path in paths):
            _flush(folder)
    except WriteError:
        raise
    except OSError as error:
        raise _refused(
            f"{paths[0]} cannot be written", error, "free some space or choose another folder"
        ) from error
    finally:
        for part in temporary:
            part.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes to a file, whole or not at all; makes the folder.

    Raises:
        WriteError: the file cannot be written; it is as it was before.
    """
    with written_atomically(path) as (part,):
        part.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to a file, whole or not at all; makes the folder.

    Raises:
        WriteError: the file cannot be written; it is as it was before.
    """
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write plain data as indented JSON, whole or not at all.

    Raises:
        WriteError: the file cannot be written; it is as it was before.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def make_folder(path: Path) -> bool:
    """Make a folder and its parents; returns whether it is new.

    Raises:
        WriteError: it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()
    except FileExistsError as error:
        if path.is_dir():
            return False
        raise WriteError(f"{path} cannot be made: a file is in its place") from error
    except OSError as error:
        raise _refused(f"{path} cannot be made", error) from error
    return True


def replace_link(link: Path, target: str) -> None:
    """Point a symbolic link at `target`, in one step: the link exists all the time.

    Raises:
        WriteError: the folder takes no symbolic links, or `link` is a folder.
    """
    fresh = link.with_name(f".{link.name}-{os.getpid()}")
    try:
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target)
        fresh.replace(link)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise WriteError(f"the link {link} cannot be made ({error.strerror or error})") from error


def _temporary_beside(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:60]}.", suffix=path.suffix)
    except OSError as error:
        raise _refused(f"{path} cannot be written", error) from error
    os.close(handle)
    return Path(name)


def _refused(what: str, error: OSError, remedy: str = "choose a folder that can be written") -> WriteError:
    if isinstance(error, PermissionError) and hasattr(os, "getuid"):
        remedy = (
            f"user {os.getuid()} may not write there. Choose another folder, or run as the owner of this one (in a "
            'container: docker run --user "$(id -u)")'
        )
    return WriteError(f"{what} ({error.strerror or error}): {remedy}")


def _flush(path: Path) -> None:
    """Bring a file or a folder's names to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
