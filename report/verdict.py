"""Did the model lose accuracy: one sentence per shipped row, with the interval over images and whether it is noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.intervals import LEVEL, Interval, interval, paired_interval
from core.rows import FLOAT, ResultRow, find_row, shipped_rows
from report.data import reference_engine
from report.tables import MASK_AP, MEGABYTE, MISSING, finite, score_heading

LEGEND = (
    f"Intervals: {LEVEL:.0%}, percentiles of the score over bootstrap samples of the images. Differences are paired: "
    "both rows use the same samples. A difference whose interval contains 0 may be noise."
)


@dataclass(frozen=True)
class Verdict:
    """The sentence on one row compared with the float row.

    Attributes:
        row: its name.
        text: the sentence.
        state: "noise", "better", "worse", or "unknown" where there is no interval.
        remark: where the images also chose the model; empty otherwise.
    """

    row: str
    text: str
    state: str
    remark: str = ""


def verdicts(rows: Sequence[ResultRow], chosen: Mapping[str, str]) -> list[Verdict]:
    """One verdict per shipped row that was measured, that of the fastest engine first; none without the float row.

    Args:
        rows: the table.
        chosen: row name -> what to add where the weights were chosen on the evaluation images.
    """
    base, lead = find_row(rows, FLOAT), best_quantized_engine(rows)
    if base is None or finite(base.value) is None:
        return []
    return [
        _verdict(row, base, score_heading(rows), chosen.get(row.name, ""))
        for row in sorted(shipped_rows(rows), key=lambda row: row is not lead)
        if finite(row.value) is not None
    ]


def format_verdicts(rows: Sequence[ResultRow], chosen: Mapping[str, str]) -> str:
    """The verdicts for a terminal, one line each; empty where there are none."""
    return "\n".join(f"{item.text} {item.remark}".rstrip() for item in verdicts(rows, chosen))


def best_quantized_engine(rows: Sequence[ResultRow]) -> ResultRow | None:
    """Return the quantized engine with the lowest median latency, or the first that ran where none was timed."""
    engines = [row for row in rows if row.key.is_quantized_engine and row.not_run is None]
    timed = [row for row in engines if row.latency_ms_median]
    return min(timed, key=lambda row: row.latency_ms_median or 0.0) if timed else next(iter(engines), None)


def gains(rows: Sequence[ResultRow]) -> list[str]:
    """What each quantized engine gained in speed and size, as sentences; none for one that was not timed."""
    found = []
    for row in rows:
        if not row.key.is_quantized_engine or not row.latency_ms_median:
            continue
        base, batch = reference_engine(rows, row), row.extras.get("batch", 1)
        text = f"{row.name} takes {row.latency_ms_median:.2f} ms for a batch of {batch}"
        if base is not None and base.latency_ms_median:
            factor = base.latency_ms_median / row.latency_ms_median
            text += f": {factor:.2f} times as fast as {base.name} ({base.latency_ms_median:.2f} ms)"
        if row.size_bytes:
            text += f". Its size is {row.size_bytes / MEGABYTE:.2f} MB"
            if base is not None and base.size_bytes:
                text += f", {row.size_bytes / base.size_bytes:.0%} of {base.size_bytes / MEGABYTE:.2f} MB"
        found.append(f"{text}.")
    return found


def class_table(rows: Sequence[ResultRow]) -> dict[str, Any]:
    """AP of every class, one column per row that has it; mask AP for segmentation. No lines without figures."""
    key = "per_class_ap_mask" if any(MASK_AP in row.extras for row in rows) else "per_class_ap"
    measured = [row for row in rows if row.extras.get(key)]
    classes = dict.fromkeys(name for row in measured for name in row.extras[key])
    lines = []
    for name in classes:
        values = [finite(row.extras[key].get(name)) for row in measured]
        lines.append([name, *(MISSING if value is None else f"{value:.4f}" for value in values)])
    return {"keys": ("Class", *(row.name for row in measured)), "lines": lines}


def difference_interval(row: ResultRow, base: ResultRow) -> Interval | None:
    """Paired interval of a row's score less that of another row; None where one has no draws."""
    return paired_interval(row.draws, base.draws) if row.draws else None


def score_interval(row: ResultRow) -> Interval | None:
    """Interval of a row's score; None where it has no draws."""
    return interval(row.draws)


def interval_text(found: Interval | None, *, signed: bool = False) -> str:
    """`0.5512 to 0.5989`, or `-0.0031 to +0.0122`; empty without an interval."""
    if found is None:
        return ""
    low, high = (f"{value:+.4f}" if signed else f"{value:.4f}" for value in (found.low, found.high))
    return f"{low} to {high}"


def _verdict(row: ResultRow, base: ResultRow, score: str, remark: str) -> Verdict:
    value, reference = float(row.value or 0.0), float(base.value or 0.0)
    difference = value - reference
    change = (
        "the same as"
        if round(difference, 4) == 0
        else f"{abs(difference):.4f} {'above' if difference > 0 else 'below'}"
    )
    text = f"{row.name} reaches {score} {value:.4f}, {change} the float model ({reference:.4f})."
    found = difference_interval(row, base)
    if found is None:
        return Verdict(
            row.name, f"{text} There is no interval, because the rows were not resampled.", "unknown", remark
        )
    images = row.extras.get("images")
    over = f" over {images} images" if images else ""
    text += f" {LEVEL:.0%} interval of the difference: {interval_text(found, signed=True)} (paired bootstrap{over})."
    if found.holds_zero:
        return Verdict(
            row.name, f"{text} The difference is within the noise of these images.", "noise", remark
        )
    state = "better" if difference > 0 else "worse"
    return Verdict(
        row.name, f"{text} The difference is larger than the noise of these images.", state, remark
    )
