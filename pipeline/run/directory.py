"""The run directory: named artifacts, written whole or not at all, and what has been done so far.

runs/<experiment>/<time>/
    config.yaml          the configuration of the last start, as composed
    run.lock             while a process works in the directory: which one
    state.json           what each stage read and wrote (see ledger.py)
    float.safetensors    the float detector, folded (+ .json manifest); a custom network's weights as they are
    placement.yaml       the placement, to be read and edited
    calibration.json, ptq.safetensors
    mixed.safetensors    the calibrated model within its accuracy budget, where one was asked for
    qat.safetensors, qat.jsonl, qat.json
    train-state/, qat-state/   states to continue from, while training and fine-tuning are not finished
    model.onnx, float.onnx, engines/
    rows/<name>.json     one table row each
    report.html, report.md, report.json
    previous/            what stages had written before they ran again with other inputs
runs/<experiment>/latest -> <time>  (a text file with the name where the file system has no symbolic links)
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from core.errors import RunError, StateError, WriteError
from core.files import (
    LATEST,
    check_link,
    check_writable,
    followed,
    make_folder,
    point_to,
    remove_leftovers,
    write_json,
    write_text,
)
from core.locks import FileLock
from core.rows import ROWS, ResultRow, sorted_rows
from pipeline.run.ledger import Ledger
from pipeline.run.progress import say

CONFIG = "config.yaml"
LOCK = "run.lock"
_LOCKS: dict[Path, FileLock] = {}  # of this process, by run directory


class Run:
    """One run directory.

    Args:
        directory: an existing run directory, or one to make with `make`.
        latest: link that is to point to a new directory.
    """

    def __init__(self, directory: Path, latest: Path | None = None) -> None:
        self.directory = directory
        self.latest = latest

    @classmethod
    def plan(cls, directory: Path | None, experiment: str, root: Path = Path("runs")) -> Run:
        """Choose a run directory, without making it: the given one, or `root/<experiment>/<time>`.

        Raises:
            RunError: the given directory holds files already.
            WriteError: it cannot be made or written.
        """
        if directory is None:
            stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
            directory, latest = root / experiment / stamp, root / experiment / LATEST
            check_writable(directory)
            check_link(latest)
            return cls(directory, latest)
        check_writable(directory)
        if directory.exists() and any(directory.iterdir()):
            remedy = "add resume=true to continue it, or choose another"
            if not (directory / CONFIG).is_file():
                remedy = "it is not a run directory; choose another, or remove its content"
            raise RunError(f"run_dir={directory} exists and is not empty: {remedy}")
        return cls(directory)

    @classmethod
    def create(cls, directory: Path | None, experiment: str, root: Path = Path("runs")) -> Run:
        """Choose a run directory and make it; errors as for `plan` and `make`."""
        run = cls.plan(directory, experiment, root)
        run.make()
        return run

    def make(self, config: str | None = None) -> None:
        """Make the directory, write `config` into it as config.yaml, and point `latest` to it where it has one.

        What exists is left as it is. Where something goes wrong the new directory is removed again.

        Raises:
            WriteError: it cannot be made or written.
        """
        planned = self.directory.name
        for attempt in itertools.count():
            self.directory = self.directory.with_name(f"{planned}_{attempt}" if attempt else planned)
            is_new = make_folder(self.directory)
            if is_new or self.latest is None:
                break
        self.lock()
        try:
            if config is not None:
                self.write_text(CONFIG, config)
            if self.latest is not None:
                point_to(self.latest, self.directory.name)
        except WriteError:
            self.unlock()
            if is_new:
                shutil.rmtree(self.directory, ignore_errors=True)
            raise
        self.latest = None

    @classmethod
    def exists(cls, directory: Path) -> bool:
        """Whether there is a run directory, or a link to one."""
        return (followed(directory) / CONFIG).is_file()

    @classmethod
    def open(cls, directory: Path) -> Run:
        """Open a run directory that exists.

        Raises:
            RunError: it is not a run directory.
        """
        found = followed(directory)
        if not cls.exists(directory):
            missing = "" if found.exists() else ", it does not exist"
            raise RunError(
                f"{directory} is not a run directory{missing}: expected config.yaml in it, as train_qat.py writes it; "
                "start a run without resume=true, or name another"
            )
        return cls(found.resolve())

    def lock(self) -> None:
        """Keep other processes out of the directory until `unlock`, and remove what killed ones left half-written.

        Raises:
            RunError: another process works in it.
        """
        if self.directory.resolve() in _LOCKS:  # of this process
            return
        lock = FileLock(self.path(LOCK))
        while not lock.acquire():
            if not lock.is_watched:
                raise RunError(
                    f"{self.directory} is in use by {lock.owner or 'another process'}: wait for its end, stop it, or "
                    "choose another run_dir"
                )
            time.sleep(1.0)
        if lock.owner is not None:
            say(f"the lock of {lock.owner} is stale: taken over")
        _LOCKS[self.directory.resolve()] = lock
        remove_leftovers(self.directory)

    def unlock(self) -> None:
        """Let other processes in again."""
        if lock := _LOCKS.pop(self.directory.resolve(), None):
            lock.release()

    def path(self, name: str) -> Path:
        """Where an artifact lies (it need not exist yet)."""
        return self.directory / name

    def need(self, name: str, stage: str) -> Path:
        """Path of an artifact that must exist.

        Raises:
            RunError: it does not; the message names the stage that makes it.
        """
        path = self.path(name)
        if not path.exists():
            raise RunError(f"{path} is missing: the stage `{stage}` makes it; add it to stages")
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Write an artifact whole or not at all."""
        write_text(self.path(name), text)
        return self.path(name)

    def write_json(self, name: str, content: Any) -> Path:
        """Write plain data as JSON."""
        write_json(self.path(name), content)
        return self.path(name)

    def read_json(self, name: str) -> Any:
        """Read plain data back.

        Raises:
            StateError: the file is damaged.
        """
        return self._parsed(name, self.path(name).read_bytes())

    def write_lines(self, name: str, records: Iterable[dict[str, Any]]) -> Path:
        """Write records as JSON lines."""
        return self.write_text(name, "".join(json.dumps(record) + "\n" for record in records))

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """Read JSON lines; an artifact that is not there gives none.

        Raises:
            StateError: the file is damaged.
        """
        path = self.path(name)
        return [self._parsed(name, line) for line in path.read_bytes().splitlines()] if path.exists() else []

    def _parsed(self, name: str, content: bytes) -> Any:
        try:
            return json.loads(content)
        except ValueError as error:
            raise StateError(
                f"{self.path(name)} is damaged ({error}): remove it and resume with the stage that makes it"
            ) from error

    @property
    def ledger(self) -> Ledger:
        """What each stage read and wrote."""
        return Ledger(self.directory)

    def is_done(self, stage: str) -> bool:
        """Whether the stage has finished in this directory."""
        record = self.ledger.get(stage)
        return record is not None and record.is_done

    def stages(self) -> list[dict[str, Any]]:
        """Stages done so far: name and seconds, in order."""
        records = self.ledger.records().items()
        return [
            {"name": name, "seconds": round(record.seconds, 3)} for name, record in records if record.is_done
        ]

    def write_row(self, row: ResultRow) -> None:
        """Write one row of the result table."""
        self.write_json(row.key.path, row.as_dict())

    def rows(self) -> list[ResultRow]:
        """All rows, in the order of the table.

        Raises:
            StateError: a row's file is damaged.
        """
        rows = []
        for path in sorted(self.path(ROWS).glob("*.json")):
            try:
                rows.append(ResultRow.from_dict(json.loads(path.read_text(encoding="utf-8"))))
            except (ValueError, KeyError, TypeError) as error:
                raise StateError(
                    f"{path} is not a row of the result table ({error}): remove it and resume"
                ) from error
        return sorted_rows(rows)
