"""Sweeps over many slow, independent measurements: each result is one small file, written whole.

So a sweep that was killed continues with what is missing, and several processes or machines can share one directory.
A worker locks an item before it measures it, so that no two work on the same; a lock ends with its owner (see
core/locks.py), and whoever waits for the item measures it then. Every measurement is deterministic, so the outcome is
the same for one worker, for many, and after any number of kills.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from core.files import write_text
from core.locks import FileLock

PAUSE = 0.2  # seconds between two looks at an item that another worker measures


class Sweep:
    """One sweep's directory.

    Args:
        directory: where results are stored; the name should say what was measured (a hash of model and data).
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def run(self, items: Sequence[str], measure: Callable[[str], float]) -> Iterator[tuple[str, float]]:
        """Measure what is missing; yields (item, value) for every item as it becomes known."""
        return self.run_groups([[item] for item in items], lambda group: {group[0]: measure(group[0])})

    def run_groups(
        self, groups: Sequence[Sequence[str]], measure: Callable[[list[str]], Mapping[str, float]]
    ) -> Iterator[tuple[str, float]]:
        """As `run`, where the items of a group are measured together: those of them that are missing."""
        later = []
        for group in groups:
            values = self._measured(group, measure)
            yield from values.items()
            later += [item for item in group if item not in values]
        for item in later:
            while not (values := self._measured([item], measure)):
                time.sleep(PAUSE)
            yield from values.items()

    def known(self, item: str) -> float | None:
        """What was measured; None for an item that is missing, or whose file is damaged."""
        try:
            return float(self.read(item))
        except (ValueError, TypeError):
            return None

    def read(self, item: str) -> Any:
        """What was kept for an item; None where it is missing, or its file is damaged."""
        try:
            return json.loads(self._path(item).read_text(encoding="utf-8"))["value"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, item: str, value: Any) -> None:
        """Keep a result: a number, or other plain data."""
        write_text(self._path(item), json.dumps({"item": item, "value": value}) + "\n")

    def _measured(
        self, items: Sequence[str], measure: Callable[[list[str]], Mapping[str, float]]
    ) -> dict[str, float]:
        """The known values and the measured ones; without those that another worker is measuring."""
        values = self._all_known(items)
        with ExitStack() as locks:
            mine = []
            for item in items:
                lock = FileLock(self._path(item).with_suffix(".lock"))
                if item not in values and lock.acquire():
                    locks.callback(lock.release)
                    mine.append(item)
            values |= self._all_known(mine)  # another worker may have finished them meanwhile
            missing = [item for item in mine if item not in values]
            for item, value in (measure(missing) if missing else {}).items():
                values[item] = float(value)
                self.keep(item, values[item])
        return values

    def _all_known(self, items: Sequence[str]) -> dict[str, float]:
        return {item: value for item in items if (value := self.known(item)) is not None}

    def _path(self, item: str) -> Path:
        return self.directory / f"{_safe(item)}.json"


def _safe(item: str) -> str:
    """A file name for an item; different items get different names."""
    return "".join(c if c.isalnum() or c in "._-" else f"%{ord(c):x}" for c in item)
