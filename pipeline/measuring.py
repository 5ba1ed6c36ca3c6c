"""What a row is measured by: COCO figures, or the user's own metric, under one roof.

Every choice of a run (the best epoch, gates, the value that sweeps optimise) looks at one number, `value_of`. With
`metric.factory` that is the number the user's function returns; else it is COCO AP.

    def measure(predict, batches) -> float | dict[str, float]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from configs.errors import ConfigError
from data import Batch, DetectionMetrics, to_input
from data.metrics import Predict
from pipeline.factories import call_user, load_factory

SETTING = "metric.factory"
VALUE = "value"


@dataclass(frozen=True)
class CustomMetrics:
    """What a user's metric found.

    Attributes:
        value: higher is better.
        figures: everything else that it returned; `ap50`, `precision` and `recall` go to the columns of that name.
    """

    value: float
    figures: dict[str, float] = field(default_factory=dict)


Metrics = DetectionMetrics | CustomMetrics


def measure_custom(
    reference: str, predict: Predict, batches: Iterable[Batch], device: torch.device
) -> CustomMetrics:
    """Call the user's metric.

    The function is given `predict`, which takes the images of a batch as they come (uint8 [B, 3, S, S]) and returns for
    each a float32 tensor [N, 6] on the CPU (x1, y1, x2, y2 in input pixels, score, class), and the letterboxed
    batches of the validation split, once. It returns a number, or a dictionary of numbers with the key `value`.

    Args:
        reference: `package.module:function`.
        predict: float images on `device` to detections.
        batches: validation batches.
        device: where `predict` wants its images.

    Raises:
        ConfigError: the function fails, or returns no finite number.
    """
    function = load_factory(SETTING, reference)

    def detect(images: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            return [found.float().cpu() for found in predict(to_input(images, device))]

    result = call_user(SETTING, reference, "the metric", function, detect, batches)
    figures = result if isinstance(result, Mapping) else {VALUE: result}
    if VALUE not in figures:
        raise ConfigError(
            f"{SETTING}={reference}: it returned the keys {', '.join(map(str, figures)) or 'none'}; expected "
            f"one called {VALUE!r}, the number to maximise"
        )
    numbers = {str(name): _number(reference, str(name), figure) for name, figure in figures.items()}
    return CustomMetrics(numbers.pop(VALUE), numbers)


def _number(reference: str, name: str, figure: Any) -> float:
    try:
        number = float(figure)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{SETTING}={reference}: {name} is a {type(figure).__name__}; expected a number"
        ) from error
    if not math.isfinite(number):
        raise ConfigError(f"{SETTING}={reference}: {name} is {number}; expected a finite number")
    return number


def value_of(metrics: Metrics) -> float:
    """The one number that decides: higher is better."""
    return metrics.ap if isinstance(metrics, DetectionMetrics) else metrics.value


def row_value(row: Mapping[str, Any]) -> float | None:
    """The same number, out of a row of the table; None where it was not measured."""
    value = row["extras"].get("metric", row["ap"])
    return None if value is None else float(value)


def measure_name(reference: str | None) -> str:
    """What that number is called in messages, given `metric.factory`."""
    return "AP" if reference is None else "metric"


def row_figures(metrics: Metrics) -> dict[str, Any]:
    """Figures of a row; a user's metric stands under `metric` among the extras, and AP stays empty."""
    if isinstance(metrics, DetectionMetrics):
        return metrics.as_dict()
    return {"metric": metrics.value, **metrics.figures}


def describe(metrics: Metrics) -> str:
    """The figures in one line, for the log."""
    if isinstance(metrics, DetectionMetrics):
        return (
            f"AP {metrics.ap:.4f}  AP50 {metrics.ap50:.4f}  P {metrics.precision:.3f}  R {metrics.recall:.3f}"
        )
    figures = {"metric": metrics.value, **metrics.figures}
    return "  ".join(f"{name} {figure:.4f}" for name, figure in figures.items())
