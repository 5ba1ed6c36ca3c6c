"""Power cuts: every artifact, its name and its folder are on disk before `state.json` calls the stage done.

The system calls that bring it there are recorded in their order; `benchmarks/power_cut.py` cuts the power.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_stages import SmallJob

from benchmarks.kill_resume import SETTINGS
from configs import compose
from core.files import written_atomically
from pipeline.main import run_job, run_stage
from pipeline.run.ledger import STATE
from pipeline.stages.stage import Stage

Event = tuple[str, ...]


class Recorder:
    """The order of flushes, renames, and of stages that are called done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[Event] = []
        self.done: dict[str, tuple[int, dict[str, str | None]]] = {}
        self._fsync, self._replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "replace", self.replace)

    def fsync(self, handle: int) -> None:
        self._fsync(handle)
        self.events.append(("fsync", str(Path(f"/proc/self/fd/{handle}").readlink())))

    def replace(self, source: Any, target: Any) -> None:
        self._replace(source, target)
        self.events.append(("replace", str(Path(source).absolute()), str(Path(target).absolute())))
        if Path(target).name == STATE:
            for name, entry in json.loads(Path(target).read_text())["stages"].items():
                if entry["status"] == "done":
                    self.done.setdefault(name, (len(self.events) - 1, entry["writes"]))

    def index(self, event: Event, begin: int, end: int) -> int:
        return begin + self.events[begin:end].index(event)

    def unflushed(self, run: Path) -> Iterator[str]:
        """Artifacts that were not on disk when their stage was called done."""
        for stage, (end, writes) in self.done.items():
            for name, value in writes.items():
                path = str(run / name)
                renames = [i for i, e in enumerate(self.events[:end]) if e[0] == "replace" and e[2] == path]
                if value is None:
                    continue
                try:
                    renamed = renames[-1]
                    self.index(("fsync", self.events[renamed][1]), 0, renamed)
                    self.index(("fsync", str(Path(path).parent)), renamed, end)
                    for folder in Path(path).relative_to(run).parents:
                        self.index(("fsync", str((run / folder).parent)), 0, end)
                except (IndexError, ValueError):
                    yield f"{stage}: {name}"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc on this system")
def test_artifacts_and_folders_are_on_disk_before_their_stage_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    job: Any = SmallJob(tmp_path / "runs/one")

    def write(job: Any) -> None:
        job.run.write_json("deep/er/figures.json", {})
        job.run.write_lines("log.jsonl", [{}])
        with written_atomically(job.run.path("weights.safetensors")) as (part,):
            save_file({"a": torch.zeros(3)}, part)

    names = ("deep/er/figures.json", "log.jsonl", "weights.safetensors")
    run_stage(job, Stage("train", write, writes=names))
    assert set(recorder.done["train"][1]) == set(names)
    assert list(recorder.unflushed(job.run.directory)) == []


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
def test_every_stage_of_a_job_flushes_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recorder = Recorder(monkeypatch)
    stages = "[train,float,calibrate,sensitivity,finetune,export,engine,report]"
    run_job(compose([*SETTINGS[:-1], f"stages={stages}", "run_dir=run", "deploy.benchmark_seconds=0.1"]))
    written = {name for _, writes in recorder.done.values() for name, value in writes.items() if value}
    assert {"train", "calibrate", "finetune", "export", "engine", "report"} <= set(recorder.done)
    assert len(written) > 25
    assert list(recorder.unflushed(tmp_path / "run")) == []
