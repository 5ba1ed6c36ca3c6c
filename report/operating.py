"""The section "Would users notice": rows at the user's confidence threshold, as tables for every report.

The figures are those of `core.operating_point`.
"""

from __future__ import annotations

from collections.abc import Sequence

from core.operating_point import AGREEMENT_IOU, LEAST_MATCHED, MOST_SHIFT, PointFigures
from core.rows import ResultRow
from report.tables import MISSING, markdown_table, signed, text_table

TITLE = "Would users notice"
HEADINGS = (
    "Row", "Precision", "Recall", "F1", "Best F1", "at", "Found again", "Faded", "Score shift", "Drop-in",
)  # fmt: skip
BRIEF = (
    "Row",
    "Precision",
    "Recall",
    "F1",
    "Found again",
    "Score shift",
    "Drop-in",
)  # of the terminal's table
CLASS_HEADINGS = (
    "Row", "Class", "Objects", "Detections", "Precision", "Recall", "F1", "Found again", "Faded", "Score shift",
)  # fmt: skip
LEGEND = (
    "Found again: share of the float model's detections above the threshold that the row has above it, too (same "
    f"class, IoU at least {AGREEMENT_IOU}). Faded: share that is there with a lower score. Score shift: mean change of "
    f"the scores of those found again. Drop-in: at least {LEAST_MATCHED:.0%} found again, shift below {MOST_SHIFT}."
)


def caption(rows: Sequence[ResultRow]) -> str:
    """Where the figures were taken; empty where no row was measured at a threshold."""
    thresholds = {row.operating_point.confidence for row in rows if row.operating_point is not None}
    shown = ", ".join(f"{value:g}" for value in sorted(thresholds))
    return f"At confidence {shown}, IoU 0.5" if thresholds else ""


def operating_lines(rows: Sequence[ResultRow]) -> list[list[str]]:
    """Return one line per measured row, under HEADINGS."""
    lines = []
    for row in rows:
        point = row.operating_point
        if point is None:
            continue
        precision, recall, f1, again, faded, shift = _figures(point.overall)
        agreement = point.overall.agreement
        verdict = None if agreement is None else agreement.is_drop_in
        drop_in = MISSING if verdict is None else "yes" if verdict else "no"
        best = f"{max(point.f1_curve):.4f}"
        lines.append(
            [
                row.name,
                precision,
                recall,
                f1,
                best,
                f"{point.best_confidence:.2f}",
                again,
                faded,
                shift,
                drop_in,
            ]
        )
    return lines


def class_lines(rows: Sequence[ResultRow]) -> list[list[str]]:
    """Return one line per measured row and class, under CLASS_HEADINGS."""
    return [
        [row.name, name, str(figures.objects), str(figures.detections), *_figures(figures)]
        for row in rows
        if row.operating_point is not None
        for name, figures in row.operating_point.classes.items()
    ]


def format_operating(rows: Sequence[ResultRow], width: int = 120) -> str:
    """Return the short table for a terminal, with its caption; empty where no row was measured at a threshold."""
    lines = operating_lines(rows)
    if not lines:
        return ""
    columns = [HEADINGS.index(heading) for heading in BRIEF]
    table = text_table(("", *BRIEF[1:]), [[line[column] for column in columns] for line in lines], width)
    return f"{caption(rows)}:\n{table}"


def markdown_operating(rows: Sequence[ResultRow]) -> list[str]:
    """Return the parts of the section for report.md; none where no row was measured at a threshold."""
    lines = operating_lines(rows)
    if not lines:
        return []
    return [
        f"## {TITLE}",
        f"{caption(rows)}.",
        markdown_table(HEADINGS, lines),
        LEGEND,
        "### By class",
        markdown_table(CLASS_HEADINGS, class_lines(rows), numbers_from=2),
    ]


def _figures(figures: PointFigures) -> list[str]:
    """Precision, recall, F1, found again, faded, score shift."""
    agreement = figures.agreement
    again, faded, shift = (
        (None, None, None)
        if agreement is None
        else (agreement.matched, agreement.faded, agreement.score_shift)
    )
    scores = [
        MISSING if value is None else f"{value:.4f}"
        for value in (figures.precision, figures.recall, figures.f1)
    ]
    shares = [MISSING if value is None else f"{value:.2%}" for value in (again, faded)]
    return [*scores, *shares, MISSING if shift is None else signed(shift)]
