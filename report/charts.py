"""Charts as plain Plotly descriptions (traces and layout), which `report.html` passes to the inlined plotly.js.

Colours are left out on purpose: the page gives every series its colour from its own light or dark palette.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.names import listing
from core.rows import ResultRow
from report.data import ReportData
from report.tables import finite, score_heading
from report.verdict import interval_text, score_interval

MAX_POINTS = 2000  # per line; more cannot be told apart on a screen
MAX_BARS = 40
LEAST_SPAN = 0.1  # of the axis of a score
SECTIONS = (
    "results",
    "operating",
    "training",
    "sensitivity",
    "histograms",
    "placement",
    "autotune",
    "time",
)  # of the page, in this order
CURVES = (  # kind, label, what a key starts with; the last entry that fits takes the key
    ("loss", "Loss", ("",)),
    ("gradient", "Gradient norm", ("gradient",)),
    ("ap", "Validation AP", ("ap", "validation")),
    ("share", "Share of weights", ("share_",)),
    ("rate", "Learning rate", ("learning_rate", "lr")),
)
_NOT_DRAWN = frozenset({"step", "epoch", "stage", "seconds", "time"})


@dataclass(frozen=True)
class Chart:
    """One chart and its Plotly description.

    Attributes:
        section: the part of the page that shows it, one of SECTIONS.
        key: unique name in the page.
        title: its heading.
        description: what a screen reader says.
        traces: Plotly traces.
        layout: Plotly layout.
    """

    section: str
    key: str
    title: str
    description: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]


def plain(text: object) -> str:
    """Escape text for Plotly, which reads a few HTML tags in labels: names stay names."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and finite(value) is not None


def thin(points: list[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Keep at most about `limit` points, evenly, and always the last."""
    step = -(-len(points) // limit)
    return points if step <= 1 else [*points[:-1:step], points[-1]]


def accuracy_chart(rows: Sequence[ResultRow]) -> Chart | None:
    """The deciding score over median latency, with its interval: up and to the left is better.

    The axis of the score is at least LEAST_SPAN high, so that a difference of 0.001 does not look like a fall.
    """
    shown = [
        (row, score)
        for row in rows
        if (score := finite(row.value)) is not None and finite(row.latency_ms_median) is not None
    ]
    if len(shown) < 2:
        return None
    heading = score_heading(rows)
    traces: list[dict[str, Any]] = []
    ends: list[float] = []
    for row, score in shown:
        inside = score_interval(row)
        low, high = (score, score) if inside is None else (min(inside.low, score), max(inside.high, score))
        ends += [low, high]
        batch = row.extras.get("batch")
        lines = [row.name, f"{row.latency_ms_median:.2f} ms" + (f", batch {batch}" if batch else "")]
        lines.append(f"{heading} {score:.4f}" + (f" ({interval_text(inside)})" if inside else ""))
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": plain(row.name),
                "x": [row.latency_ms_median],
                "y": [score],
                "error_y": {
                    "type": "data", "symmetric": False, "array": [high - score], "arrayminus": [score - low],
                    "thickness": 1.5, "width": 5, "visible": inside is not None,
                },
                "hovertemplate": "<br>".join(map(plain, lines)) + "<extra></extra>",
                "marker": {"size": 12},
                "cliponaxis": False,
            }
        )  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "median latency [ms]"}, "rangemode": "tozero"},
        "yaxis": {
            "title": {"text": heading},
            "tickformat": ".3f",
            "range": _score_range(min(ends), max(ends)),
        },
        "showlegend": True,
    }
    description = f"{heading} with its 95% interval, and median latency, of every timed row."
    return Chart("results", "accuracy", "Accuracy over latency", description, traces, layout)


def _score_range(low: float, high: float) -> list[float]:
    """An axis that holds both ends and is at least LEAST_SPAN high."""
    middle, half = (low + high) / 2, max(LEAST_SPAN, 1.2 * (high - low)) / 2
    return [round(middle - half, 6), round(middle + half, 6)]


def curve_charts(records: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return one chart per training stage and entry of CURVES that has figures."""
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        stages.setdefault(str(record.get("stage", "training")), []).append(record)
    charts: list[Chart] = []
    for number, (stage, items) in enumerate(stages.items()):
        kinds: dict[str, list[str]] = {}
        for name in dict.fromkeys(key for item in items for key, value in item.items() if _is_number(value)):
            if name not in _NOT_DRAWN:
                kind = next(kind for kind, _, starts in reversed(CURVES) if name.startswith(starts))
                kinds.setdefault(kind, []).append(name)
        charts += [
            _lines(f"{kind}-{number}", f"{label}: {stage}", label[0].lower() + label[1:], items, kinds[kind])
            for kind, label, _ in CURVES
            if kind in kinds
        ]
    return charts


def _lines(
    key: str, title: str, label: str, items: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> Chart:
    traces: list[dict[str, Any]] = []
    for name in names:
        points = thin([(item["step"], item[name]) for item in items if _is_number(item.get(name))])
        few = len(points) <= 30
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if few else "lines",
                "name": plain(name),
                "x": [x for x, _ in points],
                "y": [y for _, y in points],
                "hovertemplate": f"step %{{x}}<br>{plain(name)} %{{y:.5g}}<extra></extra>",
            }
        )
    layout = {
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": label}},
        "showlegend": len(names) > 1,
    }
    return Chart("training", key, title, f"{title}, over training steps.", traces, layout)


def stage_chart(stages: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Where the time went."""
    if not stages:
        return None
    names = [plain(stage["name"]) for stage in stages]
    seconds = [finite(float(stage["seconds"])) for stage in stages]
    bars = _bars(names, seconds, "seconds")
    return Chart("time", "stages", "Time per stage", "Seconds that each stage took.", *bars)


def sensitivity_chart(
    items: Sequence[Mapping[str, Any]] | None,
    placement: Sequence[Mapping[str, Any]] | None = None,
    model: Mapping[str, Any] | None = None,
) -> Chart | None:
    """The units that lose most when quantized; the hover says what a unit holds and what it costs in float."""
    if not items:
        return None
    ranked = sorted(items, key=lambda item: -(finite(float(item["score"])) or 0.0))[:MAX_BARS]
    names = [plain(item["unit"]) for item in ranked]
    scores = [finite(float(item["score"])) for item in ranked]
    shown = f"The {len(ranked)} most sensitive of {len(items)} units."
    traces, layout = _bars(names, scores, "score")
    layers_of = {str(item["name"]): item["layers"] for item in placement or () if item.get("layers")}
    traces[0]["text"] = [_unit_text(item, layers_of.get(str(item["unit"]), ()), model) for item in ranked]
    traces[0] |= {"hovertemplate": "%{text}<extra></extra>", "textposition": "none"}
    return Chart("sensitivity", "sensitivity", "Sensitivity", shown, traces, layout)


def _unit_text(item: Mapping[str, Any], layers: Sequence[str], model: Mapping[str, Any] | None) -> str:
    """Lines of the hover: unit, score and its parts, layers, and the multiply-accumulates that would run in float."""
    lines = [str(item["unit"])]
    lines += [f"{name}: {value:.4g}" for name, value in item.items() if _is_number(value)]
    if layers:
        lines.append("layers: " + listing(layers, 4))
    if layers and model is not None:
        macs = sum(int(layer["macs"]) for layer in model["layers"] if layer["name"] in layers)
        share = macs / max(int(model["macs"]), 1)
        lines.append(f"kept float: {macs:,} MACs, {share:.2%} of the network, leave INT8")
    return "<br>".join(map(plain, lines))


def _bars(
    names: list[str], values: list[float | None], label: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return traces and layout of horizontal bars, the first name on top."""
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": values,
        "y": names,
        "hovertemplate": f"%{{y}}<br>%{{x:.5g}} {label}<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": label}},
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
        "height": 120 + 22 * len(names),
        "showlegend": False,
    }
    return [trace], layout


def placement_chart(items: Sequence[Mapping[str, Any]] | None) -> Chart | None:
    """Scales of the quantizers in graph order, activations and weights apart."""
    scaled = [item for item in items or () if _is_number(item.get("scale")) and item["scale"] > 0]
    if not scaled:
        return None
    traces = []
    for kind in dict.fromkeys(str(item["kind"]) for item in scaled):
        members = [item for item in scaled if str(item["kind"]) == kind]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": plain(kind),
                "x": list(range(1, len(members) + 1)),
                "y": [item["scale"] for item in members],
                "text": [plain(item["name"]) for item in members],
                "hovertemplate": "%{text}<br>scale %{y:.4g}<extra></extra>",
            }
        )
    layout = {
        "xaxis": {"title": {"text": "quantizer, in graph order"}},
        "yaxis": {"title": {"text": "scale"}, "type": "log"},
        "showlegend": len(traces) > 1,
    }
    description = "Scale of every quantizer, in the order of the graph."
    return Chart("placement", "placement", "Scales", description, traces, layout)


def calibration_chart(convergence: Mapping[str, Any] | None) -> Chart | None:
    """What the scales of fewer calibration images would cost on all of them."""
    if convergence is None or len(convergence["images"]) < 2:
        return None
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": list(convergence["images"]),
            "y": [finite(float(share)) for share in convergence[key]],
            "hovertemplate": f"%{{x}} images<br>{name} %{{y:.2%}}<extra></extra>",
        }
        for name, key in (("largest of all quantizers", "largest"), ("median", "median"))
    ]
    layout = {
        "xaxis": {"title": {"text": "calibration images"}, "type": "log", "dtick": math.log10(2)},
        "yaxis": {
            "title": {"text": "additional squared error"},
            "tickformat": ".0%",
            "rangemode": "tozero",
        },
        "showlegend": True,
    }
    description = (
        "Additional squared error of the tensors with the scales that fewer calibration images give."
    )
    return Chart("placement", "calibration", "Calibration", description, traces, layout)


def f1_chart(rows: Sequence[ResultRow]) -> Chart | None:
    """F1 over the confidence threshold, one line per row."""
    traces: list[dict[str, Any]] = []
    for row in rows:
        if row.operating_point is not None:
            curve = list(row.operating_point.f1_curve)
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": plain(row.name),
                    "x": [index / (len(curve) - 1) for index in range(len(curve))],
                    "y": curve,
                    "hovertemplate": f"{plain(row.name)}<br>confidence %{{x:.2f}}<br>F1 %{{y:.4f}}<extra></extra>",
                }
            )
    if not traces:
        return None
    layout = {
        "xaxis": {"title": {"text": "confidence"}, "range": [0, 1]},
        "yaxis": {"title": {"text": "F1"}, "rangemode": "tozero"},
        "showlegend": True,
    }
    description = "F1 of all classes together over the confidence threshold, for every row."
    return Chart("operating", "f1", "F1 over the confidence threshold", description, traces, layout)


def all_charts(data: ReportData) -> list[Chart]:
    """Return every chart that the data can fill."""
    charts = [
        accuracy_chart(data.rows),
        f1_chart(data.rows),
        *curve_charts(data.curves),
        sensitivity_chart(data.sensitivity, data.placement, data.model),
        placement_chart(data.placement),
        calibration_chart(data.calibration),
        stage_chart(data.stages),
    ]
    return [chart for chart in charts if chart is not None]
