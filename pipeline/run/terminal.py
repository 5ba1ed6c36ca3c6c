"""The end of a run, or of a sweep, as a terminal sees it: tables on standard output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from configs.sweep import SweepJob
from core.files import write_json
from pipeline.run.directory import Run
from report import format_operating, format_table, format_verdicts

NEXT = ("See what it detects", "Continue this run")


def print_result(
    run: Run, commands: Sequence[Mapping[str, str]] = (), chosen: Mapping[str, str] | None = None
) -> None:
    """Print the result table, whether accuracy was lost, where the report is, and what to do next.

    Args:
        run: the run.
        commands: of `pipeline.run.commands.next_commands`; the first of `NEXT` that is among them is printed.
        chosen: of `pipeline.stages.report.chosen_rows`.
    """
    rows = run.rows()
    if rows:
        print(format_table(rows))
    if table := format_operating(rows):
        print(f"\n{table}")
    if sentences := format_verdicts(rows, chosen or {}):
        print(f"\n{sentences}")
    if run.path("report.html").exists():
        print(f"report: {run.path('report.html')}")
    found = {item["title"]: item["command"] for item in commands}
    for title in (title for title in NEXT if title in found):
        print(f"next: {found[title]}")
        break


def report_sweep(jobs: Sequence[SweepJob]) -> None:
    """Print one line per job of a sweep: what differed, and the AP of every row; keep it as sweep.json in their folder.

    A job that failed has its exit code and its message, too.
    """
    parts = [set(job.overrides.split(",")) for job in jobs]
    common = set.intersection(*parts)
    found = [{row.name: row.ap for row in Run(Path(job.directory)).rows()} for job in jobs]
    columns = list(dict.fromkeys(name for row in found for name in row))
    table = Table("job", *columns, "exit code", box=SIMPLE_HEAD)
    records = []
    for job, row in zip(jobs, found, strict=True):
        differing = ",".join(part for part in job.overrides.split(",") if part not in common)
        figures = [row.get(name) for name in columns]
        shown = ["-" if figure is None else f"{figure:.4f}" for figure in figures]
        table.add_row(differing, *shown, "-" if job.exit_code is None else str(job.exit_code))
        name = Path(job.directory).name
        records.append(
            {"job": differing, "directory": name, "ap": row, "exit_code": job.exit_code, "error": job.error}
        )
    Console(width=140).print(table)
    for job in jobs:
        if job.has_failed:
            print(f"job {job.number} failed: {job.error or 'it was ended from outside'}")
    write_json(Path(jobs[0].directory).parent / "sweep.json", records)
