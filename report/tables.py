"""The result table as data, for the terminal and as Markdown; one place decides how a figure is written."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from core.rows import FLOAT, ResultRow, find_row
from report.data import reference_engine

MISSING = "-"
METRIC = "metric"  # the extra that holds a user's own measure
MASK_AP = "ap_mask"  # the extra that holds the AP of masks
MEDIAN = "latency_ms_median"
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Cell:
    """One figure and its difference to the reference.

    Attributes:
        text: the figure, MISSING where there is none.
        difference: against the reference, empty where there is none: "-0.0012" or "2.10x".
        better: whether the difference is an improvement; None where it is neither.
    """

    text: str
    difference: str = ""
    better: bool | None = None


@dataclass(frozen=True)
class Column:
    """A column: heading, unit, and how a row's figure is written and compared."""

    key: str
    heading: str
    unit: str
    cell: Callable[[ResultRow, Sequence[ResultRow]], Cell]


def finite(value: float | None) -> float | None:
    """Return the value, or None where it is absent, NaN or infinite."""
    return None if value is None or not math.isfinite(value) else value


def cell_text(value: object) -> str:
    """Write any value in a cell: floats with six digits, yes and no, lists with commas, MISSING for None."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {cell_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(cell_text(item) for item in value)
    return str(value)


def seconds_text(seconds: float) -> str:
    """Write a duration in seconds."""
    return f"{float(seconds):.1f}"


def _figure(row: ResultRow, key: str) -> float | None:
    """Return a row's figure of that name; `metric` and `ap_mask` are extras."""
    return finite(row.extras.get(key) if key in (METRIC, MASK_AP) else getattr(row, key))


def signed(value: float, decimals: int = 4) -> str:
    """A difference with its sign; one that rounds to zero is `+0.0000`."""
    return f"{round(value, decimals) or 0.0:+.{decimals}f}"


def _score(key: str, decimals: int = 4) -> Callable[[ResultRow, Sequence[ResultRow]], Cell]:
    """Write a 0..1 score, with its difference to the float row."""

    def cell(row: ResultRow, rows: Sequence[ResultRow]) -> Cell:
        value, base = _figure(row, key), find_row(rows, FLOAT)
        if value is None:
            return Cell(MISSING)
        reference = _figure(base, key) if base is not None and base is not row else None
        if reference is None:
            return Cell(f"{value:.{decimals}f}")
        difference = value - reference
        rounded = round(difference, decimals)
        return Cell(
            f"{value:.{decimals}f}", signed(difference, decimals), None if rounded == 0 else rounded > 0
        )

    return cell


def _ratio(
    key: str, decimals: int, *, larger_is_better: bool
) -> Callable[[ResultRow, Sequence[ResultRow]], Cell]:
    """Write a speed, with the factor gained over the float engine of the same runtime."""

    def cell(row: ResultRow, rows: Sequence[ResultRow]) -> Cell:
        value, base = finite(getattr(row, key)), reference_engine(rows, row)
        if value is None:
            return Cell(row.not_run or MISSING if key == MEDIAN else MISSING)
        reference = finite(getattr(base, key)) if base is not None else None
        if not reference or not value:
            return Cell(f"{value:.{decimals}f}")
        gain = value / reference if larger_is_better else reference / value
        return Cell(f"{value:.{decimals}f}", f"{gain:.2f}x", None if round(gain, 2) == 1 else gain > 1)

    return cell


def _size(row: ResultRow, rows: Sequence[ResultRow]) -> Cell:
    """Write the size in megabytes, with its share of the float engine's or the float row's."""
    if row.size_bytes is None:
        return Cell(MISSING)
    base = reference_engine(rows, row) or find_row(rows, FLOAT)
    text = f"{row.size_bytes / MEGABYTE:.2f}"
    if base is None or base is row or not base.size_bytes:
        return Cell(text)
    share = row.size_bytes / base.size_bytes
    return Cell(text, f"{share:.0%}", None if round(share, 2) == 1 else share < 1)


COLUMNS = (
    Column("ap", "AP", "", _score("ap")),
    Column("ap50", "AP50", "", _score("ap50")),
    Column("precision", "Precision", "", _score("precision")),
    Column("recall", "Recall", "", _score("recall")),
    Column(MEDIAN, "Median", "ms", _ratio(MEDIAN, 2, larger_is_better=False)),
    Column("latency_ms_p99", "p99", "ms", _ratio("latency_ms_p99", 2, larger_is_better=False)),
    Column(
        "images_per_second", "Throughput", "images/s", _ratio("images_per_second", 1, larger_is_better=True)
    ),
    Column("size_bytes", "Size", "MB", _size),
)
METRIC_COLUMN = Column(METRIC, "Metric", "", _score(METRIC))
MASK_COLUMN = Column(MASK_AP, "Mask AP", "", _score(MASK_AP))
BRIEF = (METRIC, MASK_AP, "ap", MEDIAN)  # columns whose differences the terminal shows
LEGEND = (
    "AP, AP50, mask AP, metric, precision and recall: difference to the float row. Latency and throughput: factor "
    "gained over the float engine of the same runtime. Size: share of that engine, or of the float row."
)


def columns_for(rows: Sequence[ResultRow]) -> tuple[Column, ...]:
    """Return the columns of a table, the deciding score first.

    COLUMNS; with masks, mask AP and no AP50; with a user's metric, that metric and no AP that nobody measured.
    """
    if any(MASK_AP in row.extras for row in rows):
        return (MASK_COLUMN, *(column for column in COLUMNS if column.key != "ap50"))
    if not any(METRIC in row.extras for row in rows):
        return COLUMNS
    absent = {key for key in ("ap", "ap50") if all(getattr(row, key) is None for row in rows)}
    return (METRIC_COLUMN, *(column for column in COLUMNS if column.key not in absent))


def score_heading(rows: Sequence[ResultRow]) -> str:
    """Name of the deciding score: AP, Mask AP or Metric."""
    return columns_for(rows)[0].heading


def table_cells(rows: Sequence[ResultRow]) -> list[tuple[str, list[Cell]]]:
    """Return (row name, one Cell per entry of `columns_for`) for every row."""
    columns = columns_for(rows)
    return [(row.name, [column.cell(row, rows) for column in columns]) for row in rows]


def _heading(column: Column) -> str:
    return f"{column.heading} [{column.unit}]" if column.unit else column.heading


def _text(cell: Cell) -> str:
    return f"{cell.text} ({cell.difference})" if cell.difference else cell.text


def format_table(rows: Sequence[ResultRow], width: int = 120) -> str:
    """Return the result table for a terminal, as plain text without colours.

    Differences are shown where they matter most (`BRIEF`), so that the table fits 120 characters.

    Args:
        rows: The rows to show; differences are taken to the row "float".
        width: Characters per line at most; names are folded where they do not fit.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold")
    columns = columns_for(rows)
    brief = set(BRIEF) - ({"ap"} if MASK_COLUMN in columns else set())
    for column in columns:
        is_text = column.key == MEDIAN and any(row.not_run for row in rows)  # longer than any figure
        heading = Text(f"{column.heading}\n{column.unit}".rstrip())
        table.add_column(heading, justify="right", no_wrap=not is_text, width=15 if is_text else None)
    for row_name, cells in table_cells(rows):
        texts = [
            _text(cell) if column.key in brief else cell.text
            for column, cell in zip(columns, cells, strict=True)
        ]
        table.add_row(Text(row_name), *(Text(text) for text in texts))
    return _plain(table, width)


def text_table(headings: Sequence[str], lines: Sequence[Sequence[str]], width: int) -> str:
    """Return a table for a terminal, as plain text; columns after the first are right-aligned."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(Text(headings[0]), overflow="fold")
    for heading in headings[1:]:
        table.add_column(Text(heading), justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*(Text(text) for text in line))
    return _plain(table, width)


def _plain(table: Table, width: int) -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().strip("\n").splitlines())


def escape_markdown(text: object) -> str:
    """Make text harmless inside a Markdown table cell or line: no markup, no HTML, no line break."""
    escaped = "".join(f"\\{letter}" if letter in "\\`*_[]|#~" else letter for letter in str(text))
    return " ".join(escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())


def markdown_table(headings: Sequence[str], lines: Sequence[Sequence[object]], numbers_from: int = 1) -> str:
    """Return a Markdown table; columns from `numbers_from` on are right-aligned."""
    marks = ["---:" if index >= numbers_from else "---" for index in range(len(headings))]
    body = [headings, marks] + [[escape_markdown(value) for value in line] for line in lines]
    return "\n".join("| " + " | ".join(str(value) for value in line) + " |" for line in body)


def markdown_results(rows: Sequence[ResultRow]) -> str:
    """Return the result table as Markdown."""
    headings = ["", *(_heading(column) for column in columns_for(rows))]
    return markdown_table(
        headings, [[name, *(_text(cell) for cell in cells)] for name, cells in table_cells(rows)]
    )


def model_facts(model: Mapping[str, Any]) -> dict[str, str]:
    """Return what a network costs as label -> text: parameters, multiply-accumulates by precision, strides."""
    shares = ", ".join(f"{share:.1%} {precision}" for precision, share in model["shares"].items())
    return {
        "Parameters": f"{model['parameters']:,}",
        "Multiply-accumulates per image": f"{model['macs']:,}",
        "of these": shares or MISSING,
        "Input pixels per cell of each output map": ", ".join(map(str, model["strides"])) or MISSING,
    }


LAYER_HEADINGS = ("Layer", "Precision", "MACs", "Share", "Parameters", "Kind", "Output")


def layer_lines(model: Mapping[str, Any], first: int | None = None) -> list[list[str]]:
    """Return one line per weighted layer, under LAYER_HEADINGS.

    Args:
        model: as `ReportData.model`.
        first: only so many, those with the most multiply-accumulates; None gives all in the order they run.
    """
    layers = list(model["layers"])
    if first is not None:
        layers = sorted(layers, key=lambda layer: -int(layer["macs"]))[:first]
    total = max(int(model["macs"]), 1)
    return [
        [
            str(layer["name"]),
            str(layer["precision"]),
            f"{layer['macs']:,}",
            f"{layer['macs'] / total:.2%}",
            f"{layer['parameters']:,}",
            str(layer["kind"]),
            " x ".join(map(str, layer["output"])),
        ]
        for layer in layers
    ]
