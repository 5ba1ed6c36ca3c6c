"""Overlap of boxes, and the class-wise suppression of boxes that overlap a better one.

The operator is torchvision's compiled one, loaded without torchvision's Python package: importing that package imports
torch._dynamo as well, which takes longer than torch itself (benchmarks/startup.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_OFFSET_VALUES = {"cpu": 4_000, "cuda": 100_000}
"""Coordinates up to which all classes go through one call, as in `torchvision.ops.batched_nms`."""


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union [N, M] of boxes [N, 4] and [M, 4], xyxy in the same unit; NaN for two empty boxes."""
    left_top = torch.maximum(first[:, None, :2], second[None, :, :2])
    right_bottom = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    sides = (right_bottom - left_top).clamp(min=0)
    intersection = sides[..., 0] * sides[..., 1]
    return intersection / (_area(first)[:, None] + _area(second)[None, :] - intersection)


def suppress_by_class(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float) -> Tensor:
    """Indices of the boxes that overlap no better box of their own class by more than `iou`, by descending score.

    The same result as `torchvision.ops.batched_nms`: few boxes are moved apart by class and suppressed in one call,
    many are suppressed class by class.

    Args:
        boxes: float [N, 4], xyxy.
        scores: float [N].
        labels: int64 [N], class indices.
        iou: 0..1.
    """
    if not len(boxes):
        return torch.empty(0, dtype=torch.int64, device=boxes.device)
    nms = _operator()
    if boxes.numel() <= MAX_OFFSET_VALUES.get(boxes.device.type, MAX_OFFSET_VALUES["cuda"]):
        offsets = labels.to(boxes) * (boxes.max() + 1)
        return nms(boxes + offsets[:, None], scores, iou)
    is_kept = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        (members,) = (labels == label).nonzero(as_tuple=True)
        is_kept[members[nms(boxes[members], scores[members], iou)]] = True
    (kept,) = is_kept.nonzero(as_tuple=True)
    return kept[scores[kept].sort(descending=True).indices]


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


@cache
def _operator() -> Callable[[Tensor, Tensor, float], Tensor]:
    """The compiled NMS of torchvision: (boxes, scores, iou) -> indices."""
    if not hasattr(torch.ops.torchvision, "nms"):
        for library in _libraries():
            with contextlib.suppress(OSError):  # built for another torch: the import below says so
                torch.ops.load_library(library)
    if not hasattr(torch.ops.torchvision, "nms"):
        import torchvision  # noqa: F401  registers the operator, wherever it keeps its library
    operator: Any = torch.ops.torchvision.nms
    return operator


def _libraries() -> list[Path]:
    """Files with torchvision's compiled operators: `_C.so`, or `_C_stable.so` since 0.29."""
    found = find_spec("torchvision")
    folders = found.submodule_search_locations or () if found else ()
    return [path for folder in folders for path in sorted(Path(folder).glob("_C*.so"))]
