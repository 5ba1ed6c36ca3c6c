"""The end of a run as a terminal sees it: the table on standard output, and exit codes for signals."""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

from pipeline.run import Run
from report import Row, format_table

EXIT_TERMINATED = 143


def print_result(run: Run) -> None:
    """Print the result table and where the report lies."""
    rows = [Row(**row) for row in run.rows()]
    if rows:
        print(format_table(rows))
    if run.path("report.html").exists():
        print(f"report: {run.path('report.html')}")


def quit_on_termination() -> None:
    """Turn SIGTERM into an ordinary exit with code 143, so that files being written are cleaned up."""

    def leave(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(EXIT_TERMINATED)

    signal.signal(signal.SIGTERM, leave)
