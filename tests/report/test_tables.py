"""Figures and differences of the result table, worked out by hand."""

from __future__ import annotations

import math

import pytest

from core.rows import ResultRow
from report import format_table
from report.tables import columns_for, escape_markdown, markdown_results, signed, table_cells
from tests.report.sample import make_row, sample_rows


def cells_of(name: str, rows: list[ResultRow]) -> dict[str, tuple[str, str, bool | None]]:
    keys = ("ap", "ap50", "precision", "recall", "median", "p99", "speed", "size")
    line = dict(table_cells(rows))[name]
    return {key: (cell.text, cell.difference, cell.better) for key, cell in zip(keys, line, strict=True)}


def test_scores_are_compared_with_the_float_row() -> None:
    cells = cells_of("ptq", sample_rows())
    assert cells["ap"] == ("0.5973", "-0.0011", False)
    assert cells["precision"] == ("0.8200", "-0.0100", False)
    assert cells["recall"] == ("0.8400", "+0.0000", None)
    assert cells_of("qat", sample_rows())["ap"] == ("0.5991", "+0.0007", True)


def test_speed_is_compared_with_the_float_engine_of_the_same_runtime() -> None:
    rows = [*sample_rows(), make_row("engine:onnxruntime:f32", latency_ms_median=5.0)]
    cells = cells_of("engine:openvino:int8", rows)
    assert cells["median"] == ("10.00", "2.00x", True)
    assert cells["speed"] == ("100.0", "2.00x", True)
    assert cells["size"] == ("2.00", "25%", True)


def test_a_slower_engine_is_worse() -> None:
    rows = [
        make_row("engine:openvino:f32", latency_ms_median=10.0),
        make_row("engine:openvino:int8", latency_ms_median=20.0),
    ]
    assert cells_of("engine:openvino:int8", rows)["median"] == ("20.00", "0.50x", False)


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_was_not_measured_is_a_dash(value: float | None) -> None:
    cells = cells_of("float", [make_row("float", ap=value, latency_ms_median=value)])
    assert cells["ap"] == ("-", "", None)
    assert cells["median"] == ("-", "", None)


def test_the_reference_has_no_difference_to_itself() -> None:
    assert cells_of("float", sample_rows())["ap"] == ("0.5984", "", None)


def test_terminal_table_fits_and_keeps_every_name() -> None:
    text = format_table(sample_rows())
    lines = text.splitlines()
    assert max(len(line) for line in lines) <= 120
    for row in sample_rows():
        assert sum(line.split()[:1] == [row.name] for line in lines) == 1
    assert "0.5973 (-0.0011)" in text
    assert "\x1b" not in text


def test_terminal_table_shows_markup_in_a_name_as_it_is() -> None:
    assert "[red]x" in format_table([make_row("engine:[red]x:int8")])


def test_markdown_table_has_one_line_per_row_and_equal_columns() -> None:
    lines = markdown_results(sample_rows()).splitlines()
    assert len(lines) == 2 + len(sample_rows())
    assert {line.count("|") for line in lines} == {10}


def test_markdown_escapes_what_would_break_a_table() -> None:
    assert escape_markdown("a|b\n<i>*c*") == "a\\|b &lt;i&gt;\\*c\\*"


def test_a_metric_of_the_users_takes_the_place_of_ap() -> None:
    rows = [
        make_row("float", extras={"metric": 0.75}),
        make_row("engine:openvino:int8", extras={"metric": 0.5}),
    ]
    keys = [column.key for column in columns_for(rows)]
    assert keys[0] == "metric"
    assert not {"ap", "ap50"} & set(keys)
    line = next(line for line in format_table(rows).splitlines() if "int8" in line)
    assert "0.5000 (-0.2500)" in line
    assert "0.5000 (-0.2500)" in markdown_results(rows)
    assert columns_for([make_row("float", ap=0.5)])[0].key == "ap"


def test_a_difference_that_rounds_to_zero_has_no_minus() -> None:
    assert [signed(value) for value in (-0.00004, 0.0, -0.0, 0.00004, -0.00006, 0.0012)] == [
        "+0.0000", "+0.0000", "+0.0000", "+0.0000", "-0.0001", "+0.0012",
    ]  # fmt: skip
