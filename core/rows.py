"""Rows of the result table: what was measured, by which engine, and the figures.

A row's key is typed (kind, runtime, precision). Its name, such as `engine:openvino:int8`, is for readers and for files;
no program has to take it apart again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from core.choices import QUANTIZED
from core.operating_point import OperatingPoint


class RowKind(StrEnum):
    """What a row measured, in the order of the table."""

    FLOAT = "float"  # the float network in torch
    PTQ = "ptq"  # calibrated
    MIXED = "mixed"  # calibrated, with the groups in float that the accuracy budget asked for
    QAT = "qat"  # fine-tuned
    ENGINE = "engine"  # an engine of some runtime


ROWS = "rows"  # folder of a run directory
_ORDER = tuple(RowKind)


@dataclass(frozen=True)
class RowKey:
    """What a row measured.

    Attributes:
        kind: the model, or an engine.
        runtime: of an engine: `openvino`, `onnxruntime`, `tensorrt`, ...
        precision: of an engine: `int8`, `fp8`, `fp32`, `bf16`, ...
    """

    kind: RowKind
    runtime: str | None = None
    precision: str | None = None

    @property
    def name(self) -> str:
        """`float`, or `engine:openvino:int8`."""
        return ":".join(part for part in (self.kind, self.runtime, self.precision) if part)

    @property
    def path(self) -> str:
        """Path of the row in a run directory."""
        return f"{ROWS}/{self.name.replace(':', '-')}.json"

    @property
    def is_quantized_engine(self) -> bool:
        """Whether this is an engine of a quantized graph, INT8 or FP8."""
        return self.kind is RowKind.ENGINE and self.precision in QUANTIZED


FLOAT, PTQ, MIXED, QAT = (RowKey(kind) for kind in _ORDER[:-1])


def engine_key(runtime: str, precision: str) -> RowKey:
    """Key of an engine's row."""
    return RowKey(RowKind.ENGINE, runtime, precision)


@dataclass(frozen=True)
class ResultRow:
    """One row of the result table; None where something was not measured.

    Attributes:
        key: what was measured.
        ap: COCO AP over IoU 0.50 to 0.95, 0..1.
        ap50: COCO AP at IoU 0.50, 0..1.
        precision: at the best-F1 confidence and IoU 0.5, 0..1.
        recall: at the same point, 0..1.
        latency_ms_median: milliseconds per batch.
        latency_ms_p99: milliseconds per batch, 99th percentile.
        images_per_second: throughput.
        size_bytes: what is shipped, on disk.
        extras: further named figures, such as {"ap_small": 0.31}.
        operating_point: what users see at their confidence threshold.
        draws: `value` on images drawn with replacement, the same draws for every row; see `core.intervals`.
    """

    key: RowKey
    ap: float | None = None
    ap50: float | None = None
    precision: float | None = None
    recall: float | None = None
    latency_ms_median: float | None = None
    latency_ms_p99: float | None = None
    images_per_second: float | None = None
    size_bytes: int | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    operating_point: OperatingPoint | None = None
    draws: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        key: RowKey,
        figures: Mapping[str, Any],
        operating_point: OperatingPoint | None = None,
        draws: tuple[float, ...] = (),
    ) -> ResultRow:
        """Make a row of figures by name; those without a column become extras."""
        extras = {name: value for name, value in figures.items() if name not in FIGURES}
        return cls(
            key,
            **{name: figures.get(name) for name in FIGURES},
            extras=extras,
            operating_point=operating_point,
            draws=draws,
        )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ResultRow:
        """Read back what `as_dict` gave, or what a version without operating points or draws gave.

        Raises:
            KeyError, TypeError, ValueError: it is not a row.
        """
        key = RowKey(RowKind(content["kind"]), content["runtime"], content["engine_precision"])
        point = content.get("operating_point")
        return cls(
            key,
            **{name: content[name] for name in FIGURES},
            extras=dict(content["extras"]),
            operating_point=None if point is None else OperatingPoint.from_dict(point),
            draws=tuple(math.nan if value is None else float(value) for value in content.get("draws") or ()),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        key = self.key
        identity = {
            "name": key.name,
            "kind": str(key.kind),
            "runtime": key.runtime,
            "engine_precision": key.precision,
        }
        point = None if self.operating_point is None else self.operating_point.as_dict()
        figures = {name: getattr(self, name) for name in FIGURES}
        draws = [value if math.isfinite(value) else None for value in self.draws]
        return {**identity, **figures, "extras": dict(self.extras), "operating_point": point, "draws": draws}

    @property
    def name(self) -> str:
        """The key's name."""
        return self.key.name

    @property
    def value(self) -> float | None:
        """The one number that decides, higher is better; None where it was not measured.

        The user's metric where there is one, else mask AP for a network with masks, else AP.
        """
        value = self.extras.get("metric", self.extras.get("ap_mask", self.ap))
        return None if value is None else float(value)

    @property
    def not_run(self) -> str | None:
        """What to print instead of a latency: "built for SM86, SM89; not run here"; None for any other row."""
        built = self.extras.get("built_for")
        if not built or self.latency_ms_median is not None:
            return None
        return f"built for {', '.join(built)}; not run here"


FIGURES = tuple(
    item.name for item in fields(ResultRow) if item.name not in {"key", "extras", "operating_point", "draws"}
)


def sorted_rows(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Rows in the order of the table: float, ptq, mixed, qat, then engines, quantized ones first."""
    return sorted(
        rows, key=lambda row: (_ORDER.index(row.key.kind), not row.key.is_quantized_engine, row.key.name)
    )


def find_row(rows: Sequence[ResultRow], key: RowKey) -> ResultRow | None:
    """The row with that key, or None."""
    return next((row for row in rows if row.key == key), None)


def shipped_rows(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """What a run ships: every quantized engine that ran, or the last quantized model in torch where none did."""
    engines = [row for row in rows if row.key.is_quantized_engine and row.not_run is None]
    if engines:
        return engines
    models = [row for key in (QAT, MIXED, PTQ) if (row := find_row(rows, key)) is not None]
    return models[:1]
