"""What the jobs of a `-m` sweep leave for its end: one small file each, whatever process or machine ran them.

Hydra's launchers for joblib and submitit run jobs in other processes; nothing that a job keeps in memory comes back. So
each job notes its start and its end below the sweep's directory, and the process that started the sweep reads them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback

from core.files import write_json

JOBS = ".jobs"
_started: list[Path] = []  # directories of the sweeps that this process has started


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep.

    Attributes:
        number: from 0.
        overrides: its settings as Hydra writes them, `KEY=VALUE,KEY=VALUE`.
        directory: its run directory.
        exit_code: 0, or as of a single run; None for a job that was ended from outside, or still runs.
        error: why it failed.
    """

    number: int
    overrides: str
    directory: str
    exit_code: int | None = None
    error: str | None = None

    @property
    def has_failed(self) -> bool:
        """Whether there is no result."""
        return self.exit_code != 0


class JobRecord:
    """The record of the job that Hydra runs in this process, written at once."""

    def __init__(self) -> None:
        hydra = HydraConfig.get()
        number = int(hydra.job.num)
        self.path = Path(hydra.sweep.dir) / JOBS / f"{number}.json"
        self.job = SweepJob(number, hydra.job.override_dirname, hydra.runtime.output_dir)
        write_json(self.path, asdict(self.job))

    def end(self, exit_code: int, error: str | None = None) -> None:
        """Note how the job ended."""
        write_json(self.path, asdict(replace(self.job, exit_code=exit_code, error=error)))


class NoteSweep(Callback):
    """Tells this process where the sweep that it starts will lie; configs/config.yaml names it to Hydra."""

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        """Called by Hydra before the first job."""
        _started.append(Path(str(config.hydra.sweep.dir)))


def take_jobs() -> list[SweepJob]:
    """The jobs of the sweep that this process has started, by number."""
    paths = [path for directory in _started for path in (directory / JOBS).glob("*.json")]
    _started.clear()
    return sorted((SweepJob(**json.loads(path.read_text())) for path in paths), key=lambda job: job.number)
