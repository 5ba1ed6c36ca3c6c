"""The record of what each stage of a run read and wrote: state.json.

{"format": 2, "stages": {"calibrate": {"status": "done", "seconds": 12.3,
"settings": {"quant.observer": "mse", ...}, "reads": {"float.safetensors": "<sha256>", ...},
"writes": {"ptq.safetensors": "<sha256>", ...}}}}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from core.errors import RunError, StateError
from core.files import hash_file, write_json

FORMAT = 2
STATE = "state.json"
DONE, STARTED = "done", "started"

Hashes = dict[str, str | None]


@dataclass(frozen=True)
class Inputs:
    """What a stage depends on: settings by dotted key, and hashes of files and data by name (None: absent)."""

    settings: Mapping[str, Any]
    reads: Mapping[str, str | None]

    def changes(self, now: Inputs) -> list[str]:
        """What is different now, in words."""
        keys = dict.fromkeys([*self.settings, *now.settings])
        changes = [
            f"{key} is {_shown(now.settings.get(key))}, was {_shown(self.settings.get(key))}"
            for key in keys
            if self.settings.get(key) != now.settings.get(key)
        ]
        for name in dict.fromkeys([*self.reads, *now.reads]):
            before, after = self.reads.get(name), now.reads.get(name)
            if before != after:
                changes.append(
                    f"{name} is new"
                    if before is None
                    else f"{name} is gone"
                    if after is None
                    else f"{name} has changed"
                )
        return changes


@dataclass(frozen=True)
class Record:
    """One stage's entry.

    Attributes:
        status: `done`, or `started` for a stage that was stopped.
        inputs: what it read.
        outputs: hashes of what it wrote; until it is done, of what it announced.
        seconds: how long it took.
    """

    status: str
    inputs: Inputs
    outputs: Mapping[str, str | None] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def is_done(self) -> bool:
        """Whether the stage has finished."""
        return self.status == DONE

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the file."""
        return {
            "status": self.status,
            "seconds": round(self.seconds, 3),
            "settings": dict(self.inputs.settings),
            "reads": dict(self.inputs.reads),
            "writes": dict(self.outputs),
        }


class Ledger:
    """The records of a run directory, kept in its state.json.

    Args:
        directory: the run directory; the file need not exist yet.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / STATE

    def records(self) -> dict[str, Record]:
        """All records, in the order in which the stages last finished or started.

        Raises:
            RunError: it is of a run that another version of Octet made.
            StateError: the file is damaged.
        """
        if not self.path.exists():
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise RunError(
                    f"{self.path.parent} was made by another version of Octet and cannot be resumed; nothing in it was "
                    "changed. Start a new run (leave resume=true out), with weights=FILE of this one if you like: "
                    f"{self.path.parent / 'float.safetensors'}"
                )
            return {name: _record(entry) for name, entry in content["stages"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, RunError):
                raise
            raise StateError(
                f"{self.path} is damaged ({error}): remove it to run all stages of this run again"
            ) from error

    def get(self, stage: str) -> Record | None:
        """The record of a stage, None where it never started."""
        return self.records().get(stage)

    def start(self, stage: str, inputs: Inputs) -> None:
        """Note that a stage has started."""
        self._put(stage, Record(STARTED, inputs))

    def announce(self, stage: str, outputs: Mapping[str, str]) -> None:
        """Note what a stage that runs is about to write: where it is killed, its file is not taken for the user's."""
        record = self.get(stage)
        if record is not None and not record.is_done:
            self._put(stage, replace(record, outputs={**record.outputs, **outputs}))

    def finish(self, stage: str, inputs: Inputs, outputs: Mapping[str, str | None], seconds: float) -> None:
        """Note that a stage has finished."""
        self._put(stage, Record(DONE, inputs, outputs, seconds))

    def _put(self, stage: str, record: Record) -> None:
        records = {name: entry for name, entry in self.records().items() if name != stage}
        stages = {name: entry.as_dict() for name, entry in {**records, stage: record}.items()}
        write_json(self.path, {"format": FORMAT, "stages": stages})


def _record(entry: Mapping[str, Any]) -> Record:
    inputs = Inputs(entry["settings"], entry["reads"])
    return Record(str(entry["status"]), inputs, entry["writes"], float(entry["seconds"]))


def hash_files(directory: Path, patterns: Iterable[str]) -> Hashes:
    """Hashes of a directory's files by name; a plain name that is absent gives None, a pattern gives what matches."""
    names = find_files(directory, patterns)
    return {name: hash_file(directory / name) if (directory / name).is_file() else None for name in names}


def find_files(directory: Path, patterns: Iterable[str]) -> list[str]:
    """Names of a directory's files: every plain name, and what matches each pattern."""
    names: dict[str, None] = {}
    for pattern in patterns:
        matching = (
            sorted(path for path in directory.glob(pattern) if path.is_file()) if "*" in pattern else ()
        )
        names |= dict.fromkeys(path.relative_to(directory).as_posix() for path in matching)
        names |= {} if "*" in pattern else {pattern: None}
    return list(names)


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
