"""Boxes land where they should, and what cannot be drawn is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import ReportError
from report import draw_detections, paint_detections
from report.charts import curve_charts, thin

NAMES = ("cell", "dot")


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_a_box_is_drawn_on_its_edges_and_nowhere_else() -> None:
    image = np.full((400, 400, 3), 100, dtype=np.uint8)
    drawn = pixels(draw_detections(image, [[100, 200, 300, 350, 0.5, 0]], NAMES))
    changed = (drawn != 100).any(axis=2)
    assert changed[350, 100:301].all()
    assert changed[200:351, 100].all()
    assert changed[200:351, 300].all()
    assert not changed[220:340, 110:290].any()
    assert not changed[360:].any()
    assert (image == 100).all()


def test_a_torch_tensor_and_no_detection_at_all_are_fine() -> None:
    image = np.zeros((400, 320, 3), dtype=np.uint8)
    assert (pixels(draw_detections(image, torch.zeros(0, 6), NAMES)) == image).all()
    assert draw_detections(image, torch.tensor([[0, 0, 9, 9, 0.5, 1.0]]), NAMES).startswith(b"\x89PNG")


def test_a_small_picture_is_enlarged_with_its_boxes() -> None:
    image = np.full((160, 200, 3), 100, dtype=np.uint8)
    drawn = pixels(draw_detections(image, [[50, 60, 150, 140, 0.5, 0]], NAMES))
    assert drawn.shape == (320, 400, 3)
    changed = (drawn[200:] != 100).any(axis=2)  # below the label
    assert np.flatnonzero(changed.any(axis=0))[[0, -1]].tolist() == [100, 300]
    assert np.flatnonzero(changed.any(axis=1))[-1] + 200 == 280


@pytest.mark.parametrize(
    ("image", "detections", "message"),
    [
        (np.zeros((9, 9, 3), dtype=np.float32), [], "float32"),
        (np.zeros((9, 9), dtype=np.uint8), [], "expected uint8"),
        (np.zeros((9, 9, 3), dtype=np.uint8), [[1, 2, 3, 4, 0.5]], r"expected \[N, 6\]"),
        (np.zeros((9, 9, 3), dtype=np.uint8), [[1, 2, 3, 4, 0.5, 2]], "class index 2"),
        (np.zeros((9, 9, 3), dtype=np.uint8), [[1, 2, float("nan"), 4, 0.5, 0]], "NaN"),
    ],
)
def test_what_cannot_be_drawn_is_refused(image: np.ndarray, detections: list, message: str) -> None:
    with pytest.raises(ReportError, match=message):
        draw_detections(image, detections, NAMES)


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    points = [(float(step), 0.0) for step in range(10_001)]
    kept = thin(points, limit=100)
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert 90 <= len(kept) <= 102
    assert thin(points[:50], limit=100) == points[:50]


def test_losses_validation_and_shares_are_drawn_apart() -> None:
    first = {
        "stage": "finetune",
        "step": 1,
        "epoch": 0,
        "learning_rate": 0.1,
        "box": 2.0,
        "gradient_norm": 90.0,
    }
    last = {**first, "step": 2, "validation": 0.6, "share_oscillating": 0.03, "share_frozen": 0.01}
    charts = {chart.title: [trace["name"] for trace in chart.traces] for chart in curve_charts([first, last])}
    assert charts == {
        "Loss: finetune": ["box"],
        "Gradient norm: finetune": ["gradient_norm"],
        "Validation AP: finetune": ["validation"],
        "Share of weights: finetune": ["share_oscillating", "share_frozen"],
        "Learning rate: finetune": ["learning_rate"],
    }


def test_masks_tint_their_pixels_and_the_surest_lies_on_top() -> None:
    image = np.full((400, 500, 3), 100, np.uint8)
    low, high = np.zeros((2, 400, 500), bool)
    low[100:300, 100:300] = True
    high[200:300, 200:300] = True
    boxes = [[200, 200, 300, 300, 0.9, 1], [100, 100, 300, 300, 0.5, 0]]
    drawn = paint_detections(image, boxes, NAMES, [high, low])
    orange, blue = np.array([230, 159, 0]), np.array([86, 180, 233])
    once = 0.55 * 100 + 0.45 * orange
    assert np.abs(drawn[150, 150] - once).max() <= 1
    assert np.abs(drawn[250, 250] - (0.55 * once + 0.45 * blue)).max() <= 1
    assert (drawn[350, 400] == 100).all()
    assert (image == 100).all()
    for masks in ([high], [high, low[:, :-1]]):
        with pytest.raises(ReportError, match="masks of"):
            paint_detections(image, boxes, NAMES, masks)
