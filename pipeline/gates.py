"""Gates that the user set on the result, and the one value that a sweep optimises; both look at what is shipped."""

from __future__ import annotations

import math
from collections.abc import Sequence

from configs.schema import Config
from core.errors import GateError
from core.rows import FLOAT, ResultRow, find_row, shipped_rows
from pipeline.evaluation.measuring import measure_name


def shipped_value(rows: Sequence[ResultRow]) -> float:
    """The lowest AP (or user's metric) of all that is shipped, else that of the float row; NaN without any."""
    float_row = find_row(rows, FLOAT)
    values = [
        row.value for row in shipped_rows(rows) or ([float_row] if float_row else []) if row.value is not None
    ]
    return min(values, default=math.nan)


def missed_gates(config: Config, rows: Sequence[ResultRow], task: str) -> list[str]:
    """Hold every row that is shipped (all INT8 engines, or the quantized model) against the gates.

    Returns:
        One sentence part per row and gate that it misses, with the figures.
    """
    measure = measure_name(config.metric.factory, task)
    reference = find_row(rows, FLOAT)
    missed = []
    for row in shipped_rows(rows):
        if row.value is None:
            continue
        if config.min_ap is not None and row.value < config.min_ap:
            missed.append(f"{row.name} reaches {measure} {row.value:.4f}, below min_ap={config.min_ap}")
        if config.max_ap_drop is None or reference is None or reference.value is None:
            continue
        drop = reference.value - row.value
        if drop > config.max_ap_drop:
            missed.append(
                f"{row.name} loses {drop:.4f} {measure} against float ({reference.value:.4f}), more than "
                f"max_ap_drop={config.max_ap_drop}"
            )
    return missed


def check_gates(config: Config, rows: Sequence[ResultRow], task: str) -> None:
    """Raise GateError where a shipped row misses a gate; the message has the figures of `missed_gates`."""
    missed = missed_gates(config, rows, task)
    if missed:
        raise GateError(
            f"{'; '.join(missed)}: fine-tune longer, or leave sensitive layers float (quant.float_patterns)"
        )
