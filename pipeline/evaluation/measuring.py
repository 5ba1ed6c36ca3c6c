"""What a row is measured by: COCO figures, or the user's own metric, under one roof.

Every choice of a run (the best epoch, gates, the value that sweeps optimise) looks at one number, `value_of`. With
`metric.factory` that is the number the user's function returns; else it is COCO AP, for a segmentation network that of
the masks (which judges the boxes, too, since masks are cut to them).

    def measure(predict, batches) -> float | dict[str, float]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from core.errors import ConfigError
from data import Batch, DetectionMetrics, Instances, Predict, to_input
from pipeline.user_code.factories import call_user, load_factory

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

    The function is given `predict`, which takes the images of a batch as they come (uint8 [B, 3, H, W]) and returns for
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
            return [
                (found.detections if isinstance(found, Instances) else found).float().cpu()
                for found in predict(to_input(images, device))
            ]

    result = call_user(SETTING, reference, "the metric", function, detect, batches)
    figures = result if isinstance(result, Mapping) else {VALUE: result}
    if VALUE not in figures:
        raise ConfigError(
            f"{SETTING}={reference}: it returned the keys {', '.join(map(str, figures)) or 'none'}; expected "
            f"one called {VALUE!r}, the number to maximize"
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
    """The one number that decides, higher is better: the user's metric, else mask AP where there are masks, else AP."""
    if isinstance(metrics, CustomMetrics):
        return metrics.value
    return metrics.ap if metrics.ap_mask is None else metrics.ap_mask


def measure_name(reference: str | None, task: str) -> str:
    """What that number is called in messages, given `metric.factory` and the network's task."""
    if reference is not None:
        return "metric"
    return "mask AP" if task == "segment" else "AP"


def row_figures(metrics: Metrics) -> dict[str, Any]:
    """Figures of a row; a user's metric stands under `metric` among the extras, and AP stays empty."""
    if isinstance(metrics, DetectionMetrics):
        return metrics.as_dict()
    return {"metric": metrics.value, **metrics.figures}


def describe(metrics: Metrics) -> str:
    """The figures in one line, for the log."""
    if isinstance(metrics, DetectionMetrics):
        masks = "" if metrics.ap_mask is None else f"mask AP {metrics.ap_mask:.4f}  "
        return (
            f"{masks}AP {metrics.ap:.4f}  AP50 {metrics.ap50:.4f}  P {metrics.precision:.3f}  "
            f"R {metrics.recall:.3f}"
        )
    figures = {"metric": metrics.value, **metrics.figures}
    return "  ".join(f"{name} {figure:.4f}" for name, figure in figures.items())
