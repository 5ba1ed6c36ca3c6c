"""Sweeps over many slow, independent measurements: each result is one small file, written whole.

So a sweep that was killed goes on with what is missing, and several processes or machines can share one directory.
A worker claims an item before it measures it, so that two do not work on the same; a claim whose owner died is simply
measured by whoever comes last. Every measurement is deterministic, so the outcome is the same for one worker, for
many, and after any number of kills.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from core.files import write_text


class Sweep:
    """One sweep's directory.

    Args:
        directory: where results lie; the name should tell what was measured (a hash of model and data).
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def run(self, items: Sequence[str], measure: Callable[[str], float]) -> Iterator[tuple[str, float]]:
        """Measure what is missing; yields (item, value) for every item as it becomes known."""
        later = []
        for item in items:
            if not self._path(item).exists() and not self._claim(item):
                later.append(item)
                continue
            yield item, self._value(item, measure)
        for item in later:
            yield item, self._value(item, measure)

    def _value(self, item: str, measure: Callable[[str], float]) -> float:
        path = self._path(item)
        if not path.exists():
            write_text(path, json.dumps({"item": item, "value": measure(item)}) + "\n")
        self._claim_path(item).unlink(missing_ok=True)
        return float(json.loads(path.read_text())["value"])

    def _claim(self, item: str) -> bool:
        try:
            os.close(os.open(self._claim_path(item), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    def _path(self, item: str) -> Path:
        return self.directory / f"{_safe(item)}.json"

    def _claim_path(self, item: str) -> Path:
        return self.directory / f"{_safe(item)}.claim"


def _safe(item: str) -> str:
    """A file name for an item; different items get different names."""
    return "".join(c if c.isalnum() or c in "._-" else f"%{ord(c):x}" for c in item)
