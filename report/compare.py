"""Several runs side by side: what each ships, what differs between them, and whether that is noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from core.intervals import paired_interval
from core.rows import FLOAT, ResultRow, find_row, shipped_rows
from report.charts import Chart, accuracy_chart, plain
from report.data import ReportData, reference_engine
from report.html import chart_page, free_lines
from report.tables import MEGABYTE, MISSING, cell_text, finite, score_heading, signed
from report.verdict import best_quantized_engine, interval_text, score_interval, verdicts

Runs = Sequence[tuple[str, ReportData]]
VALIDATION = "val split"  # among the hashes
HEADINGS = (
    "Run", "Shipped row", "Score", "Interval", "Float", "Difference to the first run", "Noise", "Median ms", "Speed-up",
    "Size MB", "Found again",
)  # fmt: skip


def render_comparison(runs: Runs) -> str:
    """Return the page of several runs, each as (title, content)."""
    titles = [title for title, _ in runs]
    charts = [chart for chart in (_chart(runs),) if chart is not None]
    return chart_page(
        "compare.html.j2",
        charts,
        titles=titles,
        summary={"keys": HEADINGS, "lines": [_line(title, data, runs[0][1]) for title, data in runs]},
        verdicts=[(title, verdicts(data.rows, data.chosen)) for title, data in runs],
        remarks=_remarks(runs),
        rows=_rows(runs),
        settings=_differing(runs, lambda data: data.configuration),
        environment=_differing(runs, lambda data: {**data.build, **data.machine, **data.versions}),
        hashes=_differing(runs, lambda data: data.hashes),
        findings=[(title, free_lines(data.findings, ("name", "hazard", "remedy"))) for title, data in runs],
    )


def shipped(data: ReportData) -> ResultRow | None:
    """The row that a run is judged by: its fastest quantized engine, else its last quantized model."""
    return best_quantized_engine(data.rows) or next(iter(shipped_rows(data.rows)), None)


def is_paired(one: ReportData, other: ReportData) -> bool:
    """Whether both were measured on the same images, so that their draws are pairs."""
    digest = one.hashes.get(VALIDATION)
    limits = [data.configuration.get("data.limit_val") for data in (one, other)]
    return digest is not None and digest == other.hashes.get(VALIDATION) and limits[0] == limits[1]


def _line(title: str, data: ReportData, first: ReportData) -> list[str]:
    row, base = shipped(data), find_row(data.rows, FLOAT)
    if row is None:
        return [title, *[MISSING] * (len(HEADINGS) - 1)]
    rival = reference_engine(data.rows, row)
    speed = MISSING
    if rival is not None and rival.latency_ms_median and row.latency_ms_median:
        speed = f"{rival.latency_ms_median / row.latency_ms_median:.2f}x"
    agreement = None if row.operating_point is None else row.operating_point.overall.agreement
    again = None if agreement is None else agreement.matched
    return [
        title,
        row.name,
        _figure(row.value),
        interval_text(score_interval(row)) or MISSING,
        _figure(None if base is None else base.value),
        *_difference(row, data, first),
        _figure(row.latency_ms_median, 2),
        speed,
        _figure(None if row.size_bytes is None else row.size_bytes / MEGABYTE, 2),
        MISSING if again is None else f"{again:.2%}",
    ]


def _figure(value: float | None, decimals: int = 4) -> str:
    value = finite(value)
    return MISSING if value is None else f"{value:.{decimals}f}"


def _difference(row: ResultRow, data: ReportData, first: ReportData) -> tuple[str, str]:
    """Difference to the shipped row of the first run with its interval, and whether it may be noise."""
    other = shipped(first)
    if data is first or other is None or row.value is None or other.value is None:
        return MISSING, MISSING
    text = signed(row.value - other.value)
    pair = paired_interval(row.draws, other.draws) if row.draws and is_paired(data, first) else None
    if pair is None:
        return text, MISSING
    return f"{text} ({interval_text(pair, signed=True)})", "yes" if pair.holds_zero else "no"


def _remarks(runs: Runs) -> list[str]:
    """What a reader must know before comparing figures."""
    first = runs[0][1]
    found = []
    for title, data in runs[1:]:
        if not is_paired(data, first):
            found.append(
                f"{title} was measured on other images than {runs[0][0]}: the scores are not comparable."
            )
        if data.machine != first.machine:
            found.append(
                f"{title} was timed on another machine, or with other threads: compare speed-ups, not milliseconds."
            )
        if score_heading(data.rows) != score_heading(first.rows):
            found.append(
                f"{title} is scored by {score_heading(data.rows)}, {runs[0][0]} by {score_heading(first.rows)}."
            )
    return found


def _rows(runs: Runs) -> dict[str, Any]:
    """Score of every row, one column per run."""
    names = dict.fromkeys(row.name for _, data in runs for row in data.rows)
    lines = []
    for name in names:
        found = [next((row for row in data.rows if row.name == name), None) for _, data in runs]
        lines.append([name, *(_figure(None if row is None else row.value) for row in found)])
    return {"keys": ("Row", *(title for title, _ in runs)), "lines": lines}


def _differing(runs: Runs, content: Any) -> dict[str, Any]:
    """Keys whose values are not the same in all runs, one column per run."""
    parts: list[Mapping[str, Any]] = [content(data) for _, data in runs]
    keys = dict.fromkeys(key for part in parts for key in part)
    lines = []
    for key in keys:
        values = [cell_text(part.get(key)) for part in parts]
        if len(set(values)) > 1:
            lines.append([key, *values])
    return {"keys": ("", *(title for title, _ in runs)), "lines": lines}


def _chart(runs: Runs) -> Chart | None:
    """Accuracy over latency of all timed rows, one colour per run."""
    timed = [
        (title, row)
        for title, data in runs
        for row in data.rows
        if row.latency_ms_median and row.value is not None
    ]
    chart = accuracy_chart([row for _, row in timed])
    if chart is None:
        return None
    places = {title: number for number, (title, _) in enumerate(runs)}
    traces = []
    for trace, (title, row) in zip(chart.traces, timed, strict=True):
        symbol = "circle" if row.key.is_quantized_engine else "circle-open"
        marker = {**trace["marker"], "symbol": symbol}
        series = places[title]
        hover = f"{plain(title)}<br>{trace['hovertemplate']}"
        name = f"{plain(title)}: {trace['name']}"
        traces.append({**trace, "name": name, "hovertemplate": hover, "marker": marker, "series": series})
    return replace(chart, traces=traces)
