"""Overlap and class-wise suppression beside torchvision's own functions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

from models.overlaps import MAX_OFFSET_VALUES, pairwise_iou, suppress_by_class

REPOSITORY = Path(__file__).resolve().parents[2]


def random_boxes(number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes that overlap a lot, scores with equal ones among them, labels of five classes."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(number, 2, generator=generator) * 200
    boxes = torch.cat((corners, corners + 5 + torch.rand(number, 2, generator=generator) * 60), dim=1)
    scores = (torch.rand(number, generator=generator) * 500).round() / 500
    return boxes, scores, torch.randint(0, 5, (number,), generator=generator)


@pytest.mark.parametrize(
    "number", [0, 1, 300, MAX_OFFSET_VALUES["cpu"] // 4, MAX_OFFSET_VALUES["cpu"] // 4 + 1, 3000]
)
def test_suppression_is_that_of_torchvision(number: int) -> None:
    for seed in range(3):
        boxes, scores, labels = random_boxes(number, seed)
        expected = torchvision.ops.batched_nms(boxes, scores, labels, 0.5)
        assert torch.equal(suppress_by_class(boxes, scores, labels, 0.5), expected)
        assert number < 2 or 0 < len(expected) < number


def test_overlap_is_that_of_torchvision() -> None:
    first, second = random_boxes(50, 0)[0], random_boxes(70, 1)[0]
    assert torch.equal(pairwise_iou(first, second), torchvision.ops.box_iou(first, second))
    assert pairwise_iou(first[:0], second).shape == (0, 70)


def test_torchvision_can_be_imported_afterwards() -> None:
    """The library is loaded once: torchvision finds its operators registered and works as ever."""
    code = """
import sys, torch
from models.overlaps import suppress_by_class
boxes = torch.tensor([[0., 0, 10, 10], [1, 1, 11, 11], [0, 0, 10, 10]])
scores, labels = torch.tensor([0.5, 0.9, 0.8]), torch.tensor([0, 0, 1])
kept = suppress_by_class(boxes, scores, labels, 0.5)
assert "torchvision" not in sys.modules, "the Python package was imported"
import torchvision
assert torch.equal(kept, torchvision.ops.batched_nms(boxes, scores, labels, 0.5))
assert kept.tolist() == [1, 2], kept
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
