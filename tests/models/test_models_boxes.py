"""Decode and suppression against naive loops, overlaps against torchvision."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import complete_box_iou

from models import Decode, non_max_suppression
from models.boxes import boxes_to_distances, complete_iou, distances_to_boxes


def random_boxes(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 50
    return torch.cat(
        (corner, corner + 1 + torch.rand(count, 2, generator=generator, dtype=torch.float64) * 40), dim=1
    )


def test_complete_iou_equals_torchvision() -> None:
    a, b = random_boxes(20, 0), random_boxes(30, 1)
    assert torch.allclose(complete_iou(a[:, None], b[None]), complete_box_iou(a, b), atol=1e-6)


def test_distances_are_the_inverse_of_boxes() -> None:
    boxes = random_boxes(5, 2)
    points = torch.rand(5, 2, dtype=torch.float64) * 60
    assert torch.allclose(distances_to_boxes(boxes_to_distances(boxes, points), points), boxes)


def test_decode_equals_a_loop_over_cells() -> None:
    generator = torch.Generator().manual_seed(3)
    shapes, strides, bins, classes = [(2, 3), (1, 2)], (8, 16), 16, 2
    raw = tuple(
        (
            torch.randn(1, 4 * bins, h, w, generator=generator),
            torch.randn(1, classes, h, w, generator=generator),
        )
        for h, w in shapes
    )
    rows = []
    for (box, cls), stride in zip(raw, strides, strict=True):
        for y in range(box.shape[2]):
            for x in range(box.shape[3]):
                sides = []
                for side in range(4):
                    weights = [math.exp(float(box[0, side * bins + r, y, x])) for r in range(bins)]
                    sides.append(sum(r * weight for r, weight in enumerate(weights)) / sum(weights))
                x1, y1 = (x + 0.5 - sides[0]) * stride, (y + 0.5 - sides[1]) * stride
                x2, y2 = (x + 0.5 + sides[2]) * stride, (y + 0.5 + sides[3]) * stride
                scores = [1 / (1 + math.exp(-float(cls[0, k, y, x]))) for k in range(classes)]
                rows.append([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, *scores])
    decoded = Decode(strides)(raw)
    assert decoded.shape == (1, 6, 8)
    assert torch.allclose(decoded[0].t(), torch.tensor(rows), atol=1e-4)


def test_decode_of_half_precision_is_float() -> None:
    raw = ((torch.zeros(1, 64, 2, 2, dtype=torch.bfloat16), torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16)),)
    assert Decode((8,))(raw).dtype == torch.float32


def naive_suppression(decoded: Tensor, confidence: float, limit: float, most: int) -> list[tuple[float, ...]]:
    candidates = []
    for column in decoded.t().tolist():
        cx, cy, w, h, *scores = column
        for label, score in enumerate(scores):
            if score > confidence:
                candidates.append((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2, score, float(label)))
    kept: list[tuple[float, ...]] = []
    for box in sorted(candidates, key=lambda item: -item[4]):
        if all(box[5] != other[5] or _iou(box, other) <= limit for other in kept):
            kept.append(box)
    return kept[:most]


def _iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / area


@pytest.mark.parametrize("most", [300, 7])
def test_suppression_equals_a_naive_loop(most: int) -> None:
    generator = torch.Generator().manual_seed(4)
    decoded = torch.rand(2, 4 + 3, 60, generator=generator)
    decoded[:, :4] = decoded[:, :4] * 30 + 5
    found = non_max_suppression(decoded, 0.3, 0.5, most)
    for image, detections in zip(decoded, found, strict=True):
        expected = naive_suppression(image, 0.3, 0.5, most)
        assert torch.allclose(detections, torch.tensor(expected), atol=1e-4)


def test_suppression_of_an_empty_image() -> None:
    (detections,) = non_max_suppression(torch.zeros(1, 7, 10), 0.1, 0.5)
    assert detections.shape == (0, 6)


def test_suppression_refuses_odd_arguments() -> None:
    with pytest.raises(ValueError, match=r"expected \[B, 4 \+ classes"):
        non_max_suppression(torch.zeros(1, 4, 10), 0.1, 0.5)
    with pytest.raises(ValueError, match=r"confidence=1\.5"):
        non_max_suppression(torch.zeros(1, 7, 10), 1.5, 0.5)
