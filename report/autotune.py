"""The stage `autotune` in the reports: its Pareto front as a chart, and the plans that were built again as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from report.charts import Chart, plain
from report.tables import MISSING

HEADINGS = (
    "Plan", "Units", "Latency, sum of costs [ms]", "Latency, built again [ms]", "AP loss, estimated",
    "AP loss, measured", "AP", "Layers not as planned", "Chosen",
)  # fmt: skip
TITLE = "Autotune"
FRONT = "front"


def caption(content: Mapping[str, Any]) -> str:
    """What the figures are of."""
    return f"Plans for {content['subject']}, latency {content['latency']}"


def plan_lines(content: Mapping[str, Any]) -> list[list[str]]:
    """One line of text cells for each plan that was built again, see HEADINGS."""
    lines = []
    for plan in content["confirmed"]:
        differing = plan.get("layers_not_as_planned")
        lines.append(
            [
                title_of(plan["name"], content),
                units_text(plan["units"]),
                f"{plan['expected_milliseconds']:.3f}",
                f"{plan['milliseconds']:.3f}",
                f"{plan['estimated_ap_loss']:.4f}",
                f"{plan['measured_ap_loss']:.4f}",
                f"{plan['ap']:.4f}",
                MISSING if differing is None else f"{len(differing)} of {plan['layers']}",
                "yes" if plan.get("is_chosen") else "",
            ]
        )
    return lines


def charts(content: Mapping[str, Any] | None) -> list[Chart]:
    """AP loss over latency: the front, the plans with one precision, the chosen one, and what was measured."""
    if content is None or not content["front"]:
        return []
    points = content["front"]
    texts = [f"{units_text(point['units'])}" for point in points]
    traces = [
        _trace("front", points, "milliseconds", "estimated_ap_loss", texts, mode="lines+markers"),
    ]
    plans = content["confirmed"]
    for plan in plans:
        if plan["name"] != FRONT:
            name = title_of(plan["name"], content)
            traces.append(
                _trace(name, [plan], "expected_milliseconds", "estimated_ap_loss", [name], symbol="diamond")
            )
    chosen = [plan for plan in plans if plan.get("is_chosen")]
    texts = [units_text(plan["units"]) for plan in chosen]
    traces.append(
        _trace(
            "chosen",
            chosen,
            "expected_milliseconds",
            "estimated_ap_loss",
            texts,
            symbol="circle-open",
            size=20,
        )
    )
    texts = [f"{title_of(plan['name'], content)}: AP {plan['ap']:.4f}" for plan in plans]
    traces.append(
        _trace(
            "measured AP loss", plans, "milliseconds", "measured_ap_loss", texts, symbol="x-thin-open", size=9
        )
    )
    layout = {
        "xaxis": {"title": {"text": f"{content['latency']} latency [ms], {plain(content['subject'])}"}},
        "yaxis": {"title": {"text": "estimated AP loss"}, "tickformat": ".4f"},
        "showlegend": True,
    }
    description = (
        "Estimated loss of AP over the latency of the plans on the Pareto front, with the plans of one precision, the "
        "chosen plan, and the measured losses of those that were built again."
    )
    return [Chart("autotune", "front", "Pareto front", description, traces, layout)]


def _trace(
    name: str,
    items: Sequence[Mapping[str, Any]],
    x: str,
    y: str,
    texts: list[str],
    mode: str = "markers",
    symbol: str = "circle",
    size: int = 10,
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": mode,
        "name": plain(name),
        "x": [item[x] for item in items],
        "y": [item[y] for item in items],
        "text": [plain(text) for text in texts],
        "hovertemplate": "%{text}<br>%{x:.3f} ms<br>AP loss %{y:.4f}<extra></extra>",
        "marker": {"size": size, "symbol": symbol, "line": {"width": 2}},
        "cliponaxis": False,
    }


def title_of(name: str, content: Mapping[str, Any]) -> str:
    """`all INT8` for `all int8`; float units of an estimate for a GPU run in FP16."""
    if name == FRONT:
        return "on the front"
    precision = name.removeprefix("all ")
    if precision == "float":
        return "all FP16" if content.get("gpu") else "all float"
    return f"all {precision.upper()}"


def units_text(units: Mapping[str, int]) -> str:
    """`12 INT8, 133 float`."""
    return ", ".join(
        f"{count} {name if name == 'float' else name.upper()}" for name, count in sorted(units.items())
    )
