"""Render the one-file HTML report: styles, pictures, data and plotly.js are all inside, nothing is fetched.

Every text comes through Jinja2 with autoescape on. The only parts put in as they are: this package's own style and
script, plotly.js, and JSON in which `<`, `>` and `&` are written as escapes, so that no name can end a script.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from core.errors import ReportError
from core.rows import FLOAT, ResultRow, find_row, shipped_rows
from report import activations, autotune, operating
from report.charts import SECTIONS, Chart, all_charts
from report.data import ReportData, reference_engine
from report.graph import HEIGHT, WIDTH, draw
from report.histograms import histogram_charts
from report.panels import drawn_panel
from report.tables import (
    LAYER_HEADINGS,
    LEGEND,
    MISSING,
    cell_text,
    columns_for,
    finite,
    layer_lines,
    model_facts,
    score_heading,
    seconds_text,
    table_cells,
)
from report.verdict import LEGEND as VERDICT_LEGEND
from report.verdict import (
    best_quantized_engine,
    class_table,
    difference_interval,
    gains,
    interval_text,
    score_interval,
    verdicts,
)

TEMPLATES = Path(__file__).resolve().parent / "templates"


def chart_page(template: str, charts: Sequence[Chart], **content: object) -> str:
    """Return a page with its style, its charts and what draws them.

    Args:
        template: name of a file in TEMPLATES that extends base.html.j2.
        charts: to be drawn, each in the section that it names.
        content: further variables of the template.

    Raises:
        ReportError: plotly, whose plotly.js is inlined, is not installed.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        charts={section: [chart for chart in charts if chart.section == section] for section in SECTIONS},
        style=_own_file("style.css"),
        script=_own_file("charts.js"),
        plotly_js=Markup(_plotly_js()) if charts else "",
        chart_json=chart_json(charts) if charts else "",
        text=cell_text,
        heading=lambda key: str(key).replace("_", " "),
        **content,
    )


def render_html(data: ReportData) -> str:
    """Return the whole page of a run; errors as for `chart_page`."""
    charts = [*all_charts(data), *histogram_charts(data.histograms), *autotune.charts(data.autotune)]
    graph = graph_view(data)
    return chart_page(
        "report.html.j2",
        charts,
        data=data,
        columns=columns_for(data.rows),
        cells=table_cells(data.rows),
        legend=LEGEND,
        tiles=headline(data.rows),
        verdicts=verdicts(data.rows, data.chosen),
        verdict_legend=VERDICT_LEGEND,
        gains=gains(data.rows),
        absent=absent_parts(data, charts),
        classes=class_table(data.rows),
        intervals=interval_table(data.rows),
        extras=extra_table(data.rows),
        operating=operating_view(data.rows),
        activation=activations.view(data.activation),
        autotune={
            "title": autotune.TITLE,
            "caption": autotune.caption(data.autotune) if data.autotune else "",
            "plans": {
                "keys": autotune.HEADINGS,
                "lines": autotune.plan_lines(data.autotune) if data.autotune else [],
            },
        },
        sensitivity=free_lines(
            sorted(data.sensitivity or (), key=lambda item: -float(item["score"])), ("unit", "score")
        ),
        placement=free_lines(data.placement or (), ("name", "kind")),
        facts=model_facts(data.model) if data.model is not None else {},
        layers={"keys": LAYER_HEADINGS, "lines": layer_lines(data.model) if data.model is not None else []},
        findings=free_lines(data.findings, ("name", "hazard", "remedy")),
        fixed_point=free_lines(data.fixed_point, ("name", "values", "differing", "largest_step")),
        total_seconds=sum(float(stage["seconds"]) for stage in data.stages),
        graph=graph,
        graph_file=(data.graph or {}).get("file"),
        graph_json=safe_json(graph["details"]) if graph else "",
        graph_script=_own_file("graph.js"),
        box_size=(WIDTH, HEIGHT),
        panels=[drawn_panel(panel, data.class_names) for panel in data.detections],
        changed={key: data.configuration.get(key) for key in data.changed},
        seconds=seconds_text,
    )


def _own_file(name: str) -> Markup:
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def _plotly_js() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ReportError(
            "plotly is missing: report.html needs its plotly.js; pip install plotly."
        ) from error
    return str(get_plotlyjs())


def chart_json(charts: Iterable[Chart]) -> Markup:
    """Return the charts as JSON that is safe inside a script element, whatever the names in it hold."""
    content = [{"key": chart.key, "traces": chart.traces, "layout": chart.layout} for chart in charts]
    return safe_json(content)


def safe_json(content: object) -> Markup:
    """Return JSON that is safe inside a script element, whatever the names in it hold."""
    text = json.dumps(content, allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def operating_view(rows: Sequence[ResultRow]) -> dict[str, Any]:
    """Return the section on the user's confidence threshold: title, caption, legend, and its two tables."""
    return {
        "title": operating.TITLE,
        "caption": operating.caption(rows),
        "legend": operating.LEGEND,
        "rows": {"keys": operating.HEADINGS, "lines": operating.operating_lines(rows)},
        "classes": {"keys": operating.CLASS_HEADINGS, "lines": operating.class_lines(rows)},
    }


def absent_parts(data: ReportData, charts: Iterable[Chart]) -> list[tuple[str, str]]:
    """Return (part of the page, why it is not there) for every optional part without data."""
    keys = {chart.key for chart in charts}
    reasons = (
        (
            "Accuracy over latency",
            "accuracy" in keys,
            "fewer than two measured rows were timed (stage engine)",
        ),
        (
            "Operating point",
            "f1" in keys,
            "no row was measured at a threshold; a metric of your own has none",
        ),
        ("AP of every class", bool(class_table(data.rows)["lines"]), "no row has COCO figures"),
        (
            "Intervals",
            bool(interval_table(data.rows)["lines"]),
            "no row was resampled; a metric of your own is not",
        ),
        ("Which layers matter", "sensitivity" in keys, "the stage sensitivity did not run"),
        ("Weights and inputs", bool(data.histograms), "the stage calibrate did not run"),
        ("What runs where", data.graph is not None, "the stage export did not run"),
        (
            "Detections side by side",
            bool(data.detections),
            "there are no validation images or no float model",
        ),
        ("Training", bool(data.curves), "nothing was trained or fine-tuned in this run"),
        ("Scales", "placement" in keys, "the stage calibrate did not run"),
        ("Calibration", "calibration" in keys, "fewer than two numbers of calibration images were compared"),
    )
    return [(part, reason) for part, is_there, reason in reasons if not is_there]


def graph_view(data: ReportData) -> dict[str, Any] | None:
    """Return the graph with its boxes in their places; None where the run has no exported graph."""
    if not data.graph:
        return None
    layers = {str(layer["name"]): layer for layer in (data.model or {}).get("layers", ())}
    scored = ((str(item["unit"]), finite(float(item["score"]))) for item in data.sensitivity or ())
    return draw(data.graph, layers, {unit: score for unit, score in scored if score is not None})


def free_lines(items: Iterable[Mapping[str, Any]], first: Sequence[str]) -> dict[str, Any]:
    """Return {"keys": column names, `first` leading, "lines": values}: the union of all items' keys."""
    listed = list(items)
    keys = list(dict.fromkeys([*first, *(key for item in listed for key in item)]))
    return {"keys": keys, "lines": [[cell_text(item.get(key)) for key in keys] for item in listed]}


def extra_table(rows: Sequence[ResultRow]) -> dict[str, Any]:
    """Return the rows' further figures as a table; no lines where there are none."""
    return free_lines([{"row": row.name, **row.extras} for row in rows if row.extras], ("row",))


def interval_table(rows: Sequence[ResultRow]) -> dict[str, Any]:
    """Return the intervals of every row that was resampled as a table; no lines where there are none."""
    base = find_row(rows, FLOAT)
    score = score_heading(rows)
    lines = []
    for row in rows:
        inside = score_interval(row)
        if inside is None or row.value is None:
            continue
        pair = None if base is None or base is row else difference_interval(row, base)
        noise = MISSING if pair is None else "yes" if pair.holds_zero else "no"
        lines.append(
            [
                row.name,
                f"{row.value:.4f}",
                interval_text(inside),
                interval_text(pair, signed=True) or MISSING,
                noise,
            ]
        )
    return {"keys": ("Row", score, "Interval", "Difference to float", "Noise"), "lines": lines}


def headline(rows: Sequence[ResultRow]) -> list[dict[str, str]]:
    """Return the few figures a reader looks for first, each as label, value and remark, written as in the table."""
    columns = columns_for(rows)
    cells = {
        name: {column.key: cell for column, cell in zip(columns, line, strict=True)}
        for name, line in table_cells(rows)
    }
    score = columns[0]
    base, shipped = find_row(rows, FLOAT), best_quantized_engine(rows)
    tiles: list[tuple[str, str, str]] = []
    if base is not None:
        tiles.append((f"Float {score.heading}", cells[base.name][score.key].text, "the reference"))
    result = shipped or next(iter(shipped_rows(rows)), None)
    if result is not None:
        cell = cells[result.name][score.key]
        against = f"{cell.difference} against float, " if cell.difference else ""
        grid = (result.key.precision or "quantized").upper() if shipped else "Quantized"
        tiles.append((f"{grid} {score.heading}", cell.text, against + result.name))
    if shipped is not None:
        rival = reference_engine(rows, shipped)
        cell, size = (cells[shipped.name][key] for key in ("latency_ms_median", "size_bytes"))
        if rival is not None and cell.difference:
            latency = cells[rival.name]["latency_ms_median"].text
            tiles.append(("Speed", cell.difference, f"{cell.text} ms against {latency} ms, {rival.name}"))
        of = f"{size.difference} of {(rival or FLOAT).name}" if size.difference else shipped.name
        tiles.append(("Size", size.text if size.text == MISSING else f"{size.text} MB", of))
    return [
        dict(zip(("label", "value", "remark"), tile, strict=True)) for tile in tiles if tile[1] != MISSING
    ]
