"""The end of a run, or of a sweep, as a terminal sees it: tables on standard output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from core.files import write_json
from pipeline.run.directory import Run
from report import format_operating, format_table

NEXT = ("See what it detects", "Continue this run")


def print_result(run: Run, commands: Sequence[Mapping[str, str]] = ()) -> None:
    """Print the result table, where the report is, and what to do next.

    Args:
        run: the run.
        commands: of `pipeline.run.commands.next_commands`; the first of `NEXT` that is among them is printed.
    """
    rows = run.rows()
    if rows:
        print(format_table(rows))
    if table := format_operating(rows):
        print(f"\n{table}")
    if run.path("report.html").exists():
        print(f"report: {run.path('report.html')}")
    found = {item["title"]: item["command"] for item in commands}
    for title in (title for title in NEXT if title in found):
        print(f"next: {found[title]}")
        break


def report_sweep(jobs: Sequence[tuple[str, Path]]) -> None:
    """Print one line per job of a sweep: what differed, and the AP of every row; keep it as sweep.json in their folder.

    Args:
        jobs: (overrides, run directory) of each job.
    """
    parts = [set(overrides.split(",")) for overrides, _ in jobs]
    common = set.intersection(*parts)
    found = [{row.name: row.ap for row in Run(directory).rows()} for _, directory in jobs]
    columns = list(dict.fromkeys(name for row in found for name in row))
    table = Table("job", *columns, box=SIMPLE_HEAD)
    records = []
    for (overrides, directory), row in zip(jobs, found, strict=True):
        differing = ",".join(part for part in overrides.split(",") if part not in common)
        figures = [row.get(name) for name in columns]
        shown = ["-" if figure is None else f"{figure:.4f}" for figure in figures]
        table.add_row(differing, *shown)
        records.append({"job": differing, "directory": directory.name, "ap": row})
    Console(width=140).print(table)
    write_json(jobs[0][1].parent / "sweep.json", records)
