"""What users of a detector see at their confidence threshold, as typed fields of a row.

AP sums over all thresholds and does not change when every score is halved. Whoever draws the boxes above one threshold
notices that at once. These figures are measured at that threshold, and compared with the float model's detections.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

AGREEMENT_IOU = 0.9  # a float detection is found again by a box of its class that overlaps it as much
LEAST_MATCHED = 0.99  # share of the float detections that a drop-in replacement finds again
MOST_SHIFT = 0.01  # mean score shift that a drop-in replacement stays below


@dataclass(frozen=True)
class Agreement:
    """Detections of a model and those of the float model, both above one threshold; None where there are none.

    Attributes:
        reference: detections of the float model.
        matched: share of them that are found again: same class, IoU at least 0.9; 0..1.
        faded: share of them that are there, but with a score at the threshold or below; 0..1.
        score_shift: mean score less that of the float model over the matched detections, -1..1.
        score_change: mean magnitude of these differences, 0..1.
    """

    reference: int
    matched: float | None
    faded: float | None
    score_shift: float | None
    score_change: float | None

    @property
    def is_drop_in(self) -> bool | None:
        """Whether users would not notice the change from the float model; None where that finds nothing."""
        if self.matched is None:
            return None
        shift = self.score_shift
        return self.matched >= LEAST_MATCHED and shift is not None and abs(shift) < MOST_SHIFT

    def describe(self, other: str = "float") -> str:
        """The figures in one line; `other` is the model that was compared with."""
        if self.matched is None:
            return f"no detections of {other} to find again"
        shift = "" if self.score_shift is None else f", scores {self.score_shift:+.4f}"
        verdict = "drop-in" if self.is_drop_in else "not drop-in"
        return (
            f"{self.matched:.1%} of the {self.reference} detections of {other} found again{shift}: {verdict}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {**asdict(self), "drop_in": self.is_drop_in}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Agreement:
        """Read back what `as_dict` gave; raises KeyError where it is something else."""
        return cls(**{item.name: content[item.name] for item in fields(cls)})


@dataclass(frozen=True)
class PointFigures:
    """Figures of one class, or of all classes together; None where there is nothing to divide by.

    Attributes:
        objects: in the images; crowd regions are not counted.
        detections: above the threshold; those in crowd regions are not counted.
        precision: share of the detections that are right (IoU at least 0.5), 0..1.
        recall: share of the objects that are found, 0..1.
        f1: 2 P R / (P + R), 0..1.
        agreement: with the float model; None where it was not compared.
    """

    objects: int
    detections: int
    precision: float | None
    recall: float | None
    f1: float | None
    agreement: Agreement | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        agreement = None if self.agreement is None else self.agreement.as_dict()
        return {item.name: getattr(self, item.name) for item in fields(self)} | {"agreement": agreement}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PointFigures:
        """Read back what `as_dict` gave; raises KeyError where it is something else."""
        found = {item.name: content[item.name] for item in fields(cls)}
        agreement = found.pop("agreement")
        return cls(**found, agreement=None if agreement is None else Agreement.from_dict(agreement))


@dataclass(frozen=True)
class OperatingPoint:
    """A row at the user's confidence threshold.

    Attributes:
        confidence: the threshold: scores above it count, 0..1.
        overall: all classes together, each object and detection counted once.
        classes: by class name.
        f1_curve: F1 of all classes together at the thresholds 0, 1/n, ... 1.
        best_confidence: the lowest threshold with the highest value of the curve, 0..1.
    """

    confidence: float
    overall: PointFigures
    classes: Mapping[str, PointFigures]
    f1_curve: tuple[float, ...]
    best_confidence: float

    def describe(self) -> str:
        """The figures in one line, for the log."""
        figures = self.overall
        text = f"at confidence {self.confidence:g}: " + "  ".join(
            f"{name} {'-' if value is None else f'{value:.3f}'}"
            for name, value in (("P", figures.precision), ("R", figures.recall), ("F1", figures.f1))
        )
        return text if figures.agreement is None else f"{text}; {figures.agreement.describe()}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {
            "confidence": self.confidence,
            "best_confidence": self.best_confidence,
            "overall": self.overall.as_dict(),
            "classes": {name: figures.as_dict() for name, figures in self.classes.items()},
            "f1_curve": list(self.f1_curve),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> OperatingPoint:
        """Read back what `as_dict` gave; raises KeyError where it is something else."""
        return cls(
            confidence=content["confidence"],
            overall=PointFigures.from_dict(content["overall"]),
            classes={name: PointFigures.from_dict(part) for name, part in content["classes"].items()},
            f1_curve=tuple(content["f1_curve"]),
            best_confidence=content["best_confidence"],
        )
