"""Writing files whole or not at all.

Every artifact goes through this module. The content is written to a temporary file in the same folder, flushed to disk
(fsync), and renamed over the target; then the folder is flushed, so that the new name survives a power failure. A
reader sees the old file or the new one, never a part, and a full disk leaves the old one in place.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.errors import DataError, OctetError, WriteError
from core.failures import known_failure, write_failure

LATEST = "latest"  # in the folder of an experiment's runs: points to the newest
MODE = 0o644  # a writer's file may be private; artifacts are to be shared
MAX_NAME_BYTES = 1024
LITTLE_BYTES = 65536
_TEMPORARY = ".writing-"


@contextmanager
def written_atomically(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Give one temporary path for each target; all of them replace their targets when the block ends well.

    For writers that need a path (safetensors, torch.save, OpenVINO). Files that belong together are
    given together: no target is replaced before every temporary file is complete and on disk. The temporary files have
    the targets' names, in a hidden folder next to them; other files that a writer leaves there are removed.

    Raises:
        WriteError: a folder or a file cannot be written; every target is as it was before.
    """
    folders: dict[Path, Path] = {}
    try:
        parts = tuple(_temporary_for(path, folders) for path in paths)
        yield parts
        for part in parts:
            part.chmod(MODE)
            _flush(part)
        for part, path in zip(parts, paths, strict=True):
            part.replace(path)
        for folder in folders:
            _flush(folder)
    except OctetError:
        raise
    except Exception as error:
        if isinstance(error, OSError) or known_failure(error) is not None or _is_full(folders):
            raise write_failure(paths[0], error) from error
        raise
    finally:
        for temporary in folders.values():
            shutil.rmtree(temporary, ignore_errors=True)


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


def rename(path: Path, target: Path) -> None:
    """Give a complete file another name in the same folder, replacing what has that name; on disk when this returns.

    Raises:
        WriteError: the folder cannot be written.
    """
    try:
        path.replace(target)
        _flush(target.parent)
    except OSError as error:
        raise write_failure(target, error) from error


def hash_file(path: Path | str) -> str:
    """SHA-256 of a file's content.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}): check the path and its permissions"
        ) from error


def make_folder(path: Path) -> bool:
    """Make a folder and its parents; returns whether it is new.

    Raises:
        WriteError: it cannot be made.
    """
    try:
        _make_on_disk(path.parent)
        path.mkdir()
        _flush(path.parent)
    except FileExistsError as error:
        if path.is_dir():
            return False
        raise WriteError(
            f"{path} cannot be created: a file with this name exists; choose another path"
        ) from error
    except OSError as error:
        raise write_failure(path, error) from error
    return True


def check_writable(folder: Path) -> None:
    """Find out, without writing anything, that a folder can be made and written into; it may exist already.

    Raises:
        WriteError: it cannot: a file is in the way, the disk is read-only, the name is too long.
    """
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:
        raise write_failure(folder, error) from error
    if not existing.is_dir():
        raise WriteError(f"{folder} cannot be created: {existing} is a file; choose another path")
    if not os.access(existing, os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(existing).f_flag & os.ST_RDONLY else errno.EACCES
        raise write_failure(folder, OSError(code, os.strerror(code)))


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of writers that were killed; nobody may be writing below the folder."""
    for temporary in folder.rglob(f"{_TEMPORARY}*"):
        shutil.rmtree(temporary, ignore_errors=True)


def point_to(link: Path, target: str) -> None:
    """Point a symbolic link at `target` in the same folder, atomically: the link always exists.

    Where the file system takes no symbolic links, a text file holds the name instead; `followed` understands both.

    Raises:
        WriteError: the folder cannot be written, or `link` is a folder.
    """
    check_link(link)
    fresh = link.with_name(f".{link.name}-{os.getpid()}")
    try:
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target)
        fresh.replace(link)
    except OSError:
        fresh.unlink(missing_ok=True)
        write_text(link, f"{target}\n")


def check_link(link: Path) -> None:
    """Find out whether a link can be made at a path.

    Raises:
        WriteError: a folder has this name.
    """
    if link.is_dir() and not link.is_symlink():
        raise WriteError(f"{link} is a folder, but is to point to the newest run: rename or remove it")


def followed(path: Path) -> Path:
    """The path with every text file that `point_to` wrote replaced by the folder that it names.

    Example: where `runs/demo/latest` is a text file that holds `2026-01-31_10-00-00`, `runs/demo/latest/model.onnx` is
    `runs/demo/2026-01-31_10-00-00/model.onnx`.
    """
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        found /= part
        if found.name == LATEST and found.is_file() and found.stat().st_size < MAX_NAME_BYTES:
            found = found.parent / found.read_text(encoding="utf-8", errors="replace").strip()
    return found


def _temporary_for(path: Path, folders: dict[Path, Path]) -> Path:
    """A path for a file that will replace `path`, in a temporary folder; one folder for all files of a folder."""
    try:
        if path.parent not in folders:
            _make_on_disk(path.parent)
            folders[path.parent] = Path(tempfile.mkdtemp(dir=path.parent, prefix=_TEMPORARY))
    except OSError as error:
        raise write_failure(path, error) from error
    return folders[path.parent] / path.name


def _make_on_disk(folder: Path) -> None:
    """Make a folder and its parents, and bring their names to disk."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        _flush(path.parent)


def _is_full(folders: dict[Path, Path]) -> bool:
    """Whether a disk is full: the message of a writer need not state it."""
    return any(shutil.disk_usage(folder).free < LITTLE_BYTES for folder in folders)


def _flush(path: Path) -> None:
    """Bring a file or a folder's names to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
