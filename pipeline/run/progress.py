"""Progress: a rich bar with an estimate on a terminal, one plain line per task elsewhere; the packages' logs."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from core.names import printable

Item = TypeVar("Item")
console = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """Write one line of progress to standard error."""
    console.print(printable(text), markup=False, soft_wrap=True)


def mute(silent: bool) -> None:
    """Keep this process from writing progress, or let it again: one of a team is enough."""
    console.quiet = silent


class _PackageLog(logging.Handler):
    """Says what the packages log, each line once: a file opened again by another stage is not repeated."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self.said:
            self.said.add(text)
            say(text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}")


_package_log = _PackageLog()


def show_package_logs() -> None:
    """From now on, let a run's output hold what the packages log: what was dropped, kept, assumed or left out."""
    _package_log.said.clear()
    for package in ("models", "data", "quant", "training", "deploy"):
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO)
        logger.addHandler(_package_log)


def track(items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
    """Yield the items and show how far along they are.

    Args:
        items: what to iterate.
        label: name of the task.
        total: number of items.
    """
    started = time.perf_counter()
    if not sys.stderr.isatty():
        yield from items
        say(f"{label}: {total} in {time.perf_counter() - started:.1f} s")
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield from progress.track(items, total=total, description=label)
    say(f"{label}: {total} in {time.perf_counter() - started:.1f} s")
