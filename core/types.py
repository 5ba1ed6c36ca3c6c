"""Types of functions and data that several packages pass to each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

TaskLoss = Callable[[Any, Any, tuple[int, int]], dict[str, Tensor]]
"""(raw maps, targets, (height, width) of the images in pixels) -> named scalar terms, already weighted."""

TrainingBatch = tuple[Tensor, Any]
"""Images [B, C, H, W] float, and targets in the task loss's own form."""
