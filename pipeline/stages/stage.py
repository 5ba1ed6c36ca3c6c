"""What a stage is: what it reads, what it writes, and when it has to run again.

A stage declares the settings, data splits and artifacts it reads and the artifacts it writes. When it has finished,
state.json holds the values and hashes of all of them. It is done as long as they are the same; otherwise it runs again
and says what has changed. So a resumed run may have other settings: whatever depends on them is made anew, nothing
else is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import Config
from core.files import hash_file
from pipeline.job import Job
from pipeline.run.directory import Run
from pipeline.run.ledger import Inputs, find_files, hash_files
from pipeline.run.progress import say

PREVIOUS = "previous"  # folder of a run: what a stage had written before it ran again
NOT_COMPARED = frozenset({"data.workers", "data.cache_dir", "quant.kernel"})  # no result depends on them


@dataclass(frozen=True)
class Stage:
    """One stage of the main job.

    Attributes:
        name: as in the setting `stages`, or of a step that stages need and that nobody has to name (`load`).
        function: does the work; reads and writes what is declared here and nothing else.
        settings: dotted keys that the result depends on, whole sections included; or a function that gives them.
        ignored: keys below these that it does not depend on.
        splits: splits of the data that it reads; or a function that names them.
        files: settings that name files, whose content counts.
        machine: facts of the machine that the result depends on, by name.
        needs: stages that must have run before, or a function that names them.
        reads: artifacts, or patterns of artifacts, of earlier stages; one that is absent counts as such.
        writes: artifacts, or patterns. What is there from an earlier time moves away before the stage runs again.
        editable: artifacts that the user may edit: the readers then run again, this stage does not.
        partial: artifacts that an unfinished run of the stage leaves to continue from; they outlive a stop, and are
            removed when the stage has finished, or starts with other inputs.
        adjustable: settings that may change when an unfinished stage continues.
        is_shared: whether the processes of a team work on it together.
        is_always_run: whether it runs each time it is asked for.
    """

    name: str
    function: Callable[[Job], None]
    settings: tuple[str, ...] | Callable[[Config], Sequence[str]] = ()
    ignored: tuple[str, ...] = ()
    splits: tuple[str, ...] | Callable[[Config], Sequence[str]] = ()
    files: tuple[str, ...] = ()
    machine: Callable[[Config], Mapping[str, str]] = lambda _: {}
    needs: tuple[str, ...] | Callable[[Config], Sequence[str]] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    editable: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    adjustable: tuple[str, ...] = ()
    is_shared: bool = False
    is_always_run: bool = False

    def chosen_settings(self, config: Config) -> dict[str, Any]:
        """Values of the settings that the stage depends on, by dotted key."""
        names = self.settings(config) if callable(self.settings) else self.settings
        found = {key: value for name in names for key, value in flat_settings(config, name).items()}
        ignored = NOT_COMPARED | set(self.ignored)
        kept = {key: value for key, value in found.items() if not _is_below(key, ignored)}
        plain: dict[str, Any] = json.loads(json.dumps(kept, default=str))  # as they will be read back
        return plain

    def inputs(self, job: Job) -> Inputs:
        """Values and hashes of everything that the stage reads, as it is now."""
        splits = self.splits(job.config) if callable(self.splits) else self.splits
        hashes: dict[str, str | None] = {f"{split} split": job.splits.digest(split) for split in splits}
        hashes |= self.machine(job.config)
        for name in self.files:
            path = flat_settings(job.config, name)[name]
            hashes[f"file of {name}"] = None if path is None else hash_file(path)
        return Inputs(
            self.chosen_settings(job.config), {**hashes, **hash_files(job.run.directory, self.reads)}
        )

    def outputs(self, job: Job) -> dict[str, str | None]:
        """Hashes of what the stage wrote."""
        return hash_files(job.run.directory, self.writes)

    def changes(self, job: Job, inputs: Inputs) -> list[str]:
        """Why the stage has to run (again) with these inputs; empty where it is done."""
        record = job.run.ledger.get(self.name)
        if record is None or not record.is_done:
            return ["not run yet"] if record is None else ["not finished"]
        changes = record.inputs.changes(inputs)
        outputs = self.outputs(job)
        changes += [
            f"{name} is missing" if outputs.get(name) is None else f"{name} was changed"
            for name, value in record.outputs.items()
            if outputs.get(name) != value and name not in self.editable
        ]
        return changes

    def clear(self, job: Job, inputs: Inputs) -> None:
        """Take what an earlier run of the stage left out of the way, before it runs again.

        Results move to the folder `previous`, so that a changed setting does not cost hours of work; what an unfinished
        run left is removed, unless the stage was stopped with the same inputs and can continue from it. A file that the
        user has edited is kept under another name.
        """
        record, run = job.run.ledger.get(self.name), job.run
        goes_on = record is not None and not record.is_done and self._can_go_on(record.inputs, inputs)
        needed = find_files(run.directory, self.partial) if goes_on else []
        for name, value in hash_files(run.directory, (*self.writes, *self.partial)).items():
            if value is None or name in needed:
                continue
            if name in self.editable and (record is None or record.outputs.get(name) != value):
                kept = _unused(run.path(name))
                run.path(name).rename(kept)
                say(f"{name} was edited by hand: kept as {kept.name}")
            elif record is not None and record.is_done:
                kept = run.path(f"{PREVIOUS}/{name}")
                kept.parent.mkdir(parents=True, exist_ok=True)
                run.path(name).replace(kept)
            else:
                run.path(name).unlink()

    def _can_go_on(self, before: Inputs, now: Inputs) -> bool:
        """Whether what an unfinished run left fits the inputs of now."""
        adjusted = {name: now.settings[name] for name in self.adjustable if name in now.settings}
        return not Inputs({**before.settings, **adjusted}, before.reads).changes(now)

    def tidy(self, run: Run) -> None:
        """Remove what the finished stage needed to continue from."""
        kept = set(find_files(run.directory, self.writes))
        for name in find_files(run.directory, self.partial):
            if name not in kept:
                run.path(name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # not empty
                    run.path(name).parent.rmdir()


def _unused(path: Path) -> Path:
    """`placement-edited.yaml` for `placement.yaml`, with a number where that is taken."""
    names = (f"{path.stem}-edited{number or ''}{path.suffix}" for number in itertools.count())
    return next(path.with_name(name) for name in names if not path.with_name(name).exists())


def _is_below(key: str, names: frozenset[str] | set[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def flat_settings(config: Config, name: str) -> dict[str, Any]:
    """A setting, or all settings of a section, by dotted key.

    Example: `flat_settings(config, "quant.weights")` is `{"quant.weights.bits": 8}`.
    """
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return _flatten(value, name)


def _flatten(value: Any, name: str) -> dict[str, Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found: dict[str, Any] = {}
        for item in dataclasses.fields(value):
            found |= _flatten(getattr(value, item.name), f"{name}.{item.name}")
        return found
    if isinstance(value, list):
        return {name: [_flatten(item, "") if dataclasses.is_dataclass(item) else item for item in value]}
    return {name: dict(value) if isinstance(value, Mapping) else value}
