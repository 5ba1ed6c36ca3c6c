"""AP on images drawn with replacement, against pycocotools on data sets in which each drawn image is written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from core.intervals import interval, paired_interval
from data.metrics.coco import ENGINES, average, coco_matches, coco_precision
from data.metrics.detection import Detections, compute_metrics, resample_score
from data.metrics.resampling import draw_images, resample_ap

NUM_IMAGES = 7


def small_case(seed: int) -> tuple[dict[str, Any], np.ndarray]:
    """A COCO dictionary with crowds; detections [M, 7] (image, x, y, w, h, score, category), no two scores equal."""
    random = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    rows = []
    for image in range(1, NUM_IMAGES + 1):
        for _ in range(random.integers(0, 6)):
            category = int(random.integers(1, 3))
            x, y, w, h = *random.uniform(0, 100, 2), *random.uniform(20, 60, 2)
            crowd = int(random.random() < 0.15)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": category, "bbox": [x, y, w, h],
                 "area": w * h, "iscrowd": crowd}
            )  # fmt: skip
            for _ in range(random.integers(0, 4)):
                dx, dy = random.normal(0, 5, 2)
                rows.append([image, x + dx, y + dy, w, h, random.random(), category])
    categories = [{"id": number, "name": f"class{number}"} for number in (1, 2, 3)]  # nothing of the third
    images = [{"id": number, "width": 200, "height": 200} for number in range(1, NUM_IMAGES + 1)]
    return {"images": images, "annotations": annotations, "categories": categories}, np.array(rows)


def written_out(
    truth: dict[str, Any], rows: np.ndarray, counts: np.ndarray
) -> tuple[dict[str, Any], np.ndarray]:
    """The data set of a draw: every image as often as it was drawn, under an id of its own."""
    images, annotations, found = [], [], [np.zeros((0, 7))]
    for image, count in zip(truth["images"], counts.tolist(), strict=True):
        for _ in range(count):
            number = len(images) + 1
            images.append({**image, "id": number})
            for entry in truth["annotations"]:
                if entry["image_id"] == image["id"]:
                    annotations.append({**entry, "id": len(annotations) + 1, "image_id": number})
            mine = rows[rows[:, 0] == image["id"]].copy()
            mine[:, 0] = number
            found.append(mine)
    return {**truth, "images": images, "annotations": annotations}, np.concatenate(found)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", range(3))
def test_weighted_matches_give_the_ap_of_the_drawn_data_set(engine: str, seed: int) -> None:
    truth, rows = small_case(seed)
    weights = draw_images(NUM_IMAGES, num_draws=12, seed=seed)
    found = resample_ap(coco_matches(truth, rows, list(range(1, NUM_IMAGES + 1)), engine), weights)
    for value, counts in zip(found, weights, strict=True):
        drawn, detections = written_out(truth, rows, counts)
        ids = [image["id"] for image in drawn["images"]]
        expected = average(coco_precision(drawn, detections, ids, "pycocotools")[..., 0])
        assert value == pytest.approx(expected, abs=1e-9)
    assert len(set(found.round(6))) > 6


def test_one_draw_of_every_image_is_the_ap_itself() -> None:
    truth, rows = small_case(5)
    ids = list(range(1, NUM_IMAGES + 1))
    found = resample_ap(coco_matches(truth, rows, ids, "hotcoco"), np.ones((1, NUM_IMAGES), np.int64))
    assert found[0] == pytest.approx(average(coco_precision(truth, rows, ids, "hotcoco")[..., 0]), abs=1e-9)


def test_draws_are_paired_and_hold_as_many_images() -> None:
    weights = draw_images(NUM_IMAGES)
    assert weights.shape == (1000, NUM_IMAGES)
    assert (weights.sum(axis=1) == NUM_IMAGES).all()
    assert (weights == draw_images(NUM_IMAGES)).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(NUM_IMAGES), abs=0.15)


def test_the_score_of_a_row_lies_in_its_interval() -> None:
    truth, rows = small_case(6)
    ids = list(range(1, NUM_IMAGES + 1))
    per_image = [rows[rows[:, 0] == number][:, 1:].copy() for number in ids]
    for part in per_image:
        part[:, 2:4] += part[:, :2]
        part[:, 5] -= 1
    found = Detections(per_image, ids)
    draws = resample_score(found, truth)
    inside = interval(draws)
    assert inside is not None
    assert len(draws) == 1000
    assert inside.low < compute_metrics(found.rows, ids, truth).ap < inside.high


def test_percentiles_and_pairs() -> None:
    random = np.random.default_rng(0)
    draws, other = random.normal(0.5, 0.1, (2, 400)).tolist()
    found = interval(draws)
    assert found is not None
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])))
    difference = paired_interval(draws, other)
    expected = np.percentile(np.subtract(draws, other), [2.5, 97.5])
    assert difference is not None
    assert (difference.low, difference.high) == pytest.approx(tuple(expected))
    assert difference.holds_zero
    assert not found.holds_zero
    assert paired_interval(draws, other[1:]) is None
    assert interval([]) is None
    assert interval([0.2, float("nan")]).low == 0.2  # type: ignore[union-attr]
