"""How long a run will still take, from the times of an earlier run of the same experiment.

Stages differ too much to be predicted from each other, so the estimate needs a run in the same folder whose stages had
the same settings. Without one there is none. The time that the stages of this run have taken so far, compared with the
earlier run, scales the rest: another machine, or a busy one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from core.errors import OctetError
from pipeline.run.directory import CONFIG, Run

Settings = Mapping[str, Mapping[str, Any]]  # stage -> setting -> value


class Estimate:
    """Seconds left of a run.

    Args:
        run: this run.
        settings: the settings of each of its stages, by name.
    """

    def __init__(self, run: Run, settings: Settings) -> None:
        self.source, self.earlier = _find_earlier(run, settings)
        self._taken: dict[str, float] = {}

    def note(self, stage: str, seconds: float) -> None:
        """A stage of this run has taken so long."""
        self._taken[stage] = seconds

    def left(self, stages: Iterable[str]) -> float | None:
        """Seconds for these stages; None if no earlier run allows it."""
        if self.source is None:
            return None
        known = [name for name in self._taken if name in self.earlier]
        before = sum(self.earlier[name] for name in known)
        ratio = sum(self._taken[name] for name in known) / before if before > 0 else 1.0
        return ratio * sum(self.earlier[name] for name in stages)

    def describe(self, stages: Iterable[str]) -> str:
        """Text for the line of a stage: "", or for instance ", about 4 min left (as in runs/demo/first)"."""
        seconds = self.left(stages)
        return "" if seconds is None else f", about {duration(seconds)} left (as in {self.source})"


def duration(seconds: float) -> str:
    """Seconds as a reader says them.

    Example: `duration(200)` is `"3 min"`, `duration(42)` is `"42 s"`, `duration(9000)` is `"2 h 30 min"`.
    """
    if seconds < 59.5:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _find_earlier(run: Run, settings: Settings) -> tuple[Path | None, dict[str, float]]:
    """The newest run in the same folder that has done all these stages with these settings."""
    own = run.directory.resolve()
    others = [path.parent for path in own.parent.glob(f"*/{CONFIG}") if path.parent.resolve() != own]
    for path in sorted(others, key=lambda other: other.stat().st_mtime, reverse=True):
        try:
            records = Run(path).ledger.records()
        except OctetError:
            continue  # of another version
        fitting = (
            name in records and records[name].is_done and dict(records[name].inputs.settings) == dict(chosen)
            for name, chosen in settings.items()
        )
        if all(fitting):
            return path, {name: records[name].seconds for name in settings}
    return None, {}
