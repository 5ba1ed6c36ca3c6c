"""Write the three reports of a run: JSON for programs, Markdown for a pull request, HTML for readers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.files import write_text
from report import activations, autotune
from report.build import FORMAT, PLAIN, render
from report.data import ReportData
from report.operating import markdown_operating
from report.tables import (
    LAYER_HEADINGS,
    LEGEND,
    cell_text,
    escape_markdown,
    finite,
    layer_lines,
    markdown_results,
    markdown_table,
    model_facts,
    seconds_text,
)
from report.verdict import verdicts

MOST_EXPENSIVE = 20  # layers listed in report.md; the other reports have all


@dataclass(frozen=True)
class ReportPaths:
    """Paths of the reports."""

    json: Path
    markdown: Path
    html: Path


def write_report(run_dir: Path, data: ReportData) -> ReportPaths:
    """Write report.json, report.md and report.html into the run directory, each whole or not at all.

    Raises:
        ReportError: the data cannot be shown (a row named twice, a picture that is not a JPEG, a missing key), or
            plotly is not installed; JSON and Markdown are written before HTML.
        OSError: the directory cannot be written.
    """
    data.check()
    paths = ReportPaths(run_dir / "report.json", run_dir / "report.md", run_dir / "report.html")
    write_text(paths.json, json.dumps(to_json(data), indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    write_text(paths.markdown, to_markdown(data))
    write_text(paths.html, render([(run_dir.name, data)]))
    return paths


def to_json(data: ReportData) -> dict[str, Any]:
    """Return the content of report.json, all that the page shows; NaN and infinity become null."""
    return {
        "format": FORMAT,
        "experiment": data.experiment,
        "weights": data.weights,
        "image_size": data.input_size.plain,
        "rows": [_plain(row.as_dict()) for row in data.rows],
        "stages": [
            {"name": str(stage["name"]), "seconds": _plain(float(stage["seconds"]))} for stage in data.stages
        ],
        **{name: _plain(getattr(data, name)) for name in PLAIN},
        "detections": [panel.as_dict() for panel in data.detections],
    }


def _plain(value: Any) -> Any:
    """Return the value as JSON knows it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return finite(value)
    if value is None or isinstance(value, str | int | bool):
        return value
    return str(value)


def to_markdown(data: ReportData) -> str:
    """Return report.md."""
    weights = escape_markdown(data.weights) if data.weights else "trained in this run"
    parts = [
        f"# {escape_markdown(data.experiment)}",
        f"Weights: {weights}. Input: {data.input_size.text} pixels.",
        *([f"**Misses a limit:** {escape_markdown(text)}" for text in data.gates or ()]),
        *(
            [
                f"- {escape_markdown(f'{item.text} {item.remark}')}"
                for item in verdicts(data.rows, data.chosen)
            ]
        ),
        markdown_results(data.rows),
        LEGEND,
        *markdown_operating(data.rows),
    ]
    if data.notes:
        parts += ["## Notes", "\n".join(f"- {escape_markdown(note)}" for note in data.notes)]
    parts += _model_parts(data)
    parts += _choice_parts(data)
    if data.findings:
        lines = [[item["name"], item["hazard"], item["remedy"]] for item in data.findings]
        parts += ["## Graph check", markdown_table(["Where", "Hazard", "Remedy"], lines, numbers_from=3)]
    if data.fixed_point:
        worst = sorted(data.fixed_point, key=lambda item: -item["differing"] / item["values"])[:10]
        lines = [[i["name"], f"{i['differing'] / i['values']:.4%}", i["largest_step"]] for i in worst]
        parts += [
            "## Codes that differ from torch: the ten first",
            markdown_table(["Tensor", "Share", "Largest step"], lines),
        ]
    if data.sensitivity:
        ranked = sorted(data.sensitivity, key=lambda item: -float(item["score"]))[:20]
        lines = [[item["unit"], cell_text(float(item["score"]))] for item in ranked]
        parts += ["## Sensitivity: the twenty first", markdown_table(["Unit", "Score"], lines)]
    if data.commands:
        lines = [[item["title"], item["command"]] for item in data.commands]
        parts += ["## What next", markdown_table(["", "Command"], lines, numbers_from=2)]
    if data.stages:
        lines = [[stage["name"], seconds_text(stage["seconds"])] for stage in data.stages]
        parts += ["## Time per stage", markdown_table(["Stage", "Seconds"], lines)]
    for title, content in (("Machine", data.machine), ("Versions", data.versions)):
        if content:
            lines = [[key, cell_text(value)] for key, value in content.items()]
            parts += [f"## {title}", markdown_table(["", ""], lines, numbers_from=2)]
    return "\n\n".join(parts) + "\n"


def _choice_parts(data: ReportData) -> list[str]:
    """What was measured to choose the activation, and the plans of autotune."""
    parts = []
    if data.activation:
        parts += [
            f"## {activations.TITLE}",
            f"{escape_markdown(activations.caption(data.activation))}.",
            markdown_table(
                activations.headings(data.activation), activations.activation_lines(data.activation)
            ),
        ]
    if data.autotune:
        parts += [
            f"## {autotune.TITLE}",
            f"{escape_markdown(autotune.caption(data.autotune))}.",
            markdown_table(list(autotune.HEADINGS), autotune.plan_lines(data.autotune), numbers_from=2),
        ]
    return parts


def _model_parts(data: ReportData) -> list[str]:
    """The network's figures, and its most expensive layers."""
    if data.model is None:
        return []
    facts = [[label, text] for label, text in model_facts(data.model).items()]
    layers = layer_lines(data.model, first=MOST_EXPENSIVE)
    return [
        "## Model",
        markdown_table(["", ""], facts, numbers_from=2),
        f"### The {len(layers)} layers with the most multiply-accumulates",
        markdown_table(LAYER_HEADINGS, layers, numbers_from=2),
    ]
