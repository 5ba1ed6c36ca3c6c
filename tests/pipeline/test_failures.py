"""Full and read-only disks, folders without symbolic links: a message with a remedy, and no half-written file."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from core.command import path_argument, reports_errors
from core.errors import DataError, RunError, WriteError
from core.failures import known_failure
from core.files import followed, point_to, write_text, written_atomically
from pipeline.run.directory import Run

# what the libraries say on a disk of 256 KB (seen with torch 2.15, safetensors 0.8 and OpenVINO 2026.2)
WRITER_ERRORS = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError(errno.EROFS, "Read-only file system", "x"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534"),
    RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    RuntimeError("basic_ios::clear: iostream error"),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_half(error: Exception, *paths: Path) -> None:
    """A writer that fails when half of its files are there."""
    with written_atomically(*paths) as parts:
        parts[0].write_text("half")
        parts[0].with_name(".tmpYzy2Uw").write_text("half")
        raise error


@pytest.mark.parametrize("error", WRITER_ERRORS, ids=lambda error: str(error)[:40])
def test_a_writer_that_fails_leaves_everything_as_it_was(tmp_path: Path, error: Exception) -> None:
    """Whatever a writer leaves beside its file goes as well: safetensors and OpenVINO write more than one."""
    (tmp_path / "model.bin").write_text("old")
    with pytest.raises(WriteError, match=r"model\.bin cannot be written \(.+\): ") as caught:
        write_half(error, tmp_path / "model.bin", tmp_path / "model.xml")
    assert caught.value.exit_code == 3
    assert contents(tmp_path) == {"model.bin": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]


def test_a_defect_in_a_writer_stays_a_defect(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        write_half(KeyError("a defect"), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_writer_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(WriteError, match="free some space"):
        write_half(ValueError("words that no list has"), tmp_path / "x")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_device_as_the_system_reports_it() -> None:
    with pytest.raises(OSError, match="No space left on device") as caught:
        Path("/dev/full").write_text("x" * 100_000)
    assert isinstance(known_failure(caught.value), WriteError)


@pytest.mark.parametrize("write", [save_file, torch.save])
def test_real_writers_that_meet_a_file_in_place_of_a_folder(
    tmp_path: Path, write: Callable[..., None]
) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(WriteError, match=r"cannot be written"),
        written_atomically(tmp_path / "file/model") as (part,),
    ):
        write({"a": torch.zeros(2)}, part)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "rows/x.json"),
            WriteError,
            "rows/x.json.*free some space",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "x"),
            WriteError,
            "choose a folder that can be written",
        ),
        (OSError(errno.EACCES, "Permission denied", "x"), DataError, "x cannot be used.*permissions"),
        (OSError(errno.EIO, "Input/output error", "x"), DataError, "check the disk"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "),
            DataError,
            "id 7 .*Bus error",
        ),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), DataError, "id 7, 8 ended"),
        (RuntimeError("Too many open files. Communication with the workers"), DataError, "ulimit -n"),
    ],
)
def test_commands_end_with_code_3_and_no_traceback(
    error: Exception, kind: type, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @reports_errors
    def main(arguments: object) -> int:
        raise error

    assert isinstance(known_failure(error), kind)
    assert main([]) == 3
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert re.search(words, printed), printed


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape mismatch"),
        FileNotFoundError(errno.ENOENT, "x", "y"),
        BrokenPipeError(32, "p"),
        KeyError(),
    ],
)
def test_defects_keep_their_traceback(error: Exception) -> None:
    assert known_failure(error) is None


# ------------------------------------------------------------------------------------------- without symbolic links
@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without symbolic links, such as Google Drive's."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refuse)


@pytest.mark.usefixtures("no_links")
def test_latest_is_a_text_file_where_there_are_no_symbolic_links(tmp_path: Path) -> None:
    first = Run.create(None, "demo", tmp_path)
    second = Run.create(None, "demo", tmp_path)
    latest = tmp_path / "demo/latest"
    assert latest.read_text() == f"{second.directory.name}\n"
    assert not list((tmp_path / "demo").glob(".*"))
    with pytest.raises(RunError, match="not a run directory"):
        Run.open(latest)
    write_text(second.path("config.yaml"), "")
    assert Run.open(latest).directory == second.directory.resolve()
    assert first.directory != second.directory


@pytest.mark.usefixtures("no_links")
def test_readers_follow_the_text_file(tmp_path: Path) -> None:
    (tmp_path / "one/engines").mkdir(parents=True)
    (tmp_path / "one/engines/model.xml").write_text("graph")
    point_to(tmp_path / "latest", "one")
    assert path_argument(str(tmp_path / "latest/engines/model.xml")).read_text() == "graph"
    assert path_argument(str(tmp_path / "latest")) == tmp_path / "one"
    assert followed(tmp_path / "one/engines") == tmp_path / "one/engines"
    assert followed(Path("relative/latest")) == Path("relative/latest")  # nothing there: left alone


def test_a_link_replaces_the_text_file_and_the_other_way_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    point_to(tmp_path / "latest", "one")
    assert (tmp_path / "latest").is_symlink()
    with monkeypatch.context() as patched:
        patched.setattr(os, "symlink", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EPERM, "no")))
        point_to(tmp_path / "latest", "two")
    assert not (tmp_path / "latest").is_symlink()
    assert followed(tmp_path / "latest") == tmp_path / "two"
    point_to(tmp_path / "latest", "three")
    assert (tmp_path / "latest").is_symlink()


def test_a_start_that_cannot_write_its_settings_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.plan(None, "demo", tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(WriteError, match=r"config\.yaml cannot be written.*free some space"):
        run.make("experiment: demo")
    assert list((tmp_path / "demo").iterdir()) == []
