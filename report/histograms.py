"""Charts of weights and inputs of layers on their grids, before and after fine-tuning."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from report.charts import Chart, plain

LABELS = {"before": "calibrated", "after": "fine-tuned"}
MOST_LINES = 16  # codes whose places are drawn; of a finer grid the two ends


def histogram_charts(items: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return two charts per layer: its weights, and its inputs."""
    return [
        chart
        for number, item in enumerate(items)
        for kind, title in (("weights", "Weights"), ("inputs", "Inputs"))
        if (chart := _chart(f"{kind}-{number}", f"{title}: {item['layer']}", item[kind])) is not None
    ]


def _chart(key: str, title: str, part: Mapping[str, Any]) -> Chart | None:
    edges = part["edges"]
    middles = [round((low + high) / 2, 3) for low, high in itertools.pairwise(edges)]
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "line": {"shape": "hvh"},
            "name": plain(label),
            "x": middles,
            "y": [share or None for share in part[name]],  # a logarithm has no 0
            "hovertemplate": f"{plain(label)}<br>%{{x:.4g}} steps<br>%{{y:.3%}} of the values<extra></extra>",
        }
        for name, label in LABELS.items()
        if name in part
    ]
    if not traces:
        return None
    layout = {
        "xaxis": {"title": {"text": f"value in steps of its scale ({plain(part['grid'])})"}},
        "yaxis": {"title": {"text": "share of the values"}, "type": "log", "tickformat": ".0e", "dtick": 1},
        "showlegend": len(traces) > 1,
        "shapes": [
            {
                "type": "line",
                "x0": place,
                "x1": place,
                "yref": "paper",
                "y0": 0,
                "y1": 1,
                "line": {"width": 1, "dash": "dot"},
            }
            for place in _places(part["low"], part["high"])
        ],
    }
    description = (
        f"{title}: histogram in steps of the scale; dotted lines are ends of the grid, or all codes."
    )
    return Chart("histograms", key, title, description, traces, layout)


def _places(low: float, high: float) -> list[float]:
    codes = round(high - low) + 1
    return [low + code for code in range(codes)] if codes <= MOST_LINES else [low, high]
