"""The page of one run, or of several side by side, from their report.json alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.errors import ReportError
from core.files import write_text
from core.rows import ResultRow
from report.compare import render_comparison
from report.data import ReportData
from report.html import render_html
from report.panels import DetectionPanel

FORMAT = 2  # of report.json; 1 held the tables alone
JSON, HTML, COMPARISON = "report.json", "report.html", "comparison.html"
PLAIN = (  # fields of ReportData that are plain data, in the order of the file
    "versions", "build", "machine", "model", "findings", "fixed_point", "notes", "chosen", "gates", "commands",
    "hashes", "configuration", "changed", "sensitivity", "placement", "calibration", "curves",
    "histograms", "class_names", "graph", "autotune",
    "activation",
)  # fmt: skip


def build_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of one run, or of several side by side.

    Args:
        runs: run directories, or their report.json.
        output: where to write it; None takes report.html of the run, or comparison.html in the current folder.

    Returns:
        The page.

    Raises:
        ReportError: a run has no report.json, or it cannot be read.
        OSError: the page cannot be written.
    """
    paths = [run / JSON if run.is_dir() else run for run in runs]
    content = [(_title(path), read_report(path)) for path in paths]
    titles = [title for title, _ in content]
    repeated = next((title for title in titles if titles.count(title) > 1), None)
    if repeated is not None:
        raise ReportError(f"the run {repeated} was named twice: name each run once.")
    if output is None:
        output = paths[0].with_name(HTML) if len(paths) == 1 else Path(COMPARISON)
    write_text(output, render(content))
    return output


def render(runs: Sequence[tuple[str, ReportData]]) -> str:
    """Return the page of (title, content) of each run."""
    if len(runs) == 1:
        return render_html(runs[0][1])
    return render_comparison(runs)


def read_report(path: Path) -> ReportData:
    """Read a report.json.

    Raises:
        ReportError: it is absent, damaged, or of a version of Octet that did not keep all of the page in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(
            f"{path} cannot be read ({error.strerror or error}): expected a run in which the stage report ran."
        ) from error
    except ValueError as error:
        raise ReportError(
            f"{path} is not valid JSON ({error}): run the stage report of this run again."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ReportError(
            f"{path} was written by another version of Octet: run the stage report of this run again "
            "(resume=true stages=[report])."
        )
    try:
        data = _data(content)
        data.check()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(f"{path} is damaged ({error}): run the stage report of this run again.") from error
    return data


def _data(content: dict[str, Any]) -> ReportData:
    return ReportData(
        experiment=str(content["experiment"]),
        weights=content["weights"],
        image_size=content["image_size"],
        rows=[ResultRow.from_dict(row) for row in content["rows"]],
        stages=content["stages"],
        detections=[DetectionPanel.from_dict(panel) for panel in content["detections"]],
        **{name: content[name] for name in PLAIN if name in content},  # parts of later versions may be absent
    )


def _title(path: Path) -> str:
    folder = path.resolve().parent
    return "/".join(part for part in (folder.parent.name, folder.name) if part)
