"""The operating point against a plain-Python rewriting, pycocotools, and cases worked by hand."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from core.errors import DataError
from core.operating_point import Agreement, OperatingPoint
from data import Detections, measure_agreement, measure_operating_point
from tests.data.test_metrics import random_case, truth_of

IMAGES = list(range(1, 31))


def of(rows: np.ndarray) -> Detections:
    """From rows of image, x1, y1, x2, y2, score, class."""
    return Detections([rows[rows[:, 0] == image, 1:] for image in IMAGES], IMAGES)


def detections(*rows: tuple) -> Detections:
    """From (image, x1, y1, x2, y2, score, class)."""
    return of(np.array(rows, np.float64).reshape(-1, 7))


def overlap(a: list[float], b: list[float]) -> float:
    """IoU of two boxes x1, y1, x2, y2."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inside = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return inside / (sum(areas) - inside)


def jittered(rows: np.ndarray, seed: int) -> np.ndarray:
    """What a quantized model would find: moved boxes, other scores, a few detections less and a few more."""
    random = np.random.default_rng(seed)
    sides = np.tile(rows[:, 3:5] - rows[:, 1:3], 2)
    moved = rows.copy()
    moved[:, 1:5] += random.normal(0, 0.02, sides.shape) * sides
    moved[:, 5] = (moved[:, 5] + random.normal(-0.02, 0.05, len(moved))).clip(0.001, 0.999)
    kept = moved[random.random(len(moved)) > 0.05]
    return np.concatenate([kept, kept[:7] + np.array([0, 150, 150, 150, 150, 0, 0])])


# -- right and wrong: looped by hand


def counts_by_hand(
    truth: dict, rows: list[list[float]], threshold: float, label: int | None
) -> tuple[int, int, int]:
    """Right detections, counted detections, objects: each object takes the surest of the detections that prefer it."""
    objects = [
        (
            entry["image_id"],
            entry["category_id"] - 1,
            [*entry["bbox"][:2], *corner(entry["bbox"])],
            entry["iscrowd"],
        )
        for entry in truth["annotations"]
    ]
    shown = [row for row in rows if row[5] > threshold and label in (None, int(row[6]))]
    wooers: dict[int, list[int]] = {}
    for number, row in enumerate(shown):
        best, preferred = 0.0, None
        for index, (image, kind, box, crowd) in enumerate(objects):
            value = overlap(row[1:5], box)
            if image == row[0] and kind == row[6] and not crowd and value >= 0.5 and value > best:
                best, preferred = value, index
        if preferred is not None:
            wooers.setdefault(preferred, []).append(number)
    right = {max(numbers, key=lambda number: shown[number][5]) for numbers in wooers.values()}
    counted = 0
    for number, row in enumerate(shown):
        in_crowd = any(
            crowd and image == row[0] and kind == row[6] and covered(row[1:5], box) >= 0.5
            for image, kind, box, crowd in objects
        )
        counted += number in right or not in_crowd
    return len(right), counted, sum(not o[3] and label in (None, o[1]) for o in objects)


def corner(bbox: list[float]) -> tuple[float, float]:
    return bbox[0] + bbox[2], bbox[1] + bbox[3]


def covered(box: list[float], region: list[float]) -> float:
    """Share of a box that lies in a region."""
    width = min(box[2], region[2]) - max(box[0], region[0])
    height = min(box[3], region[3]) - max(box[1], region[1])
    return max(width, 0) * max(height, 0) / ((box[2] - box[0]) * (box[3] - box[1]))


@pytest.mark.parametrize(("seed", "threshold"), [(0, 0.25), (1, 0.5), (2, 0.0), (3, 0.9)])
def test_precision_recall_and_f1_are_counted(seed: int, threshold: float) -> None:
    truth, rows = random_case(seed)
    rows[:, 5] += np.random.default_rng(seed).uniform(
        0, 0.005, len(rows)
    )  # no ties: the rewriting breaks them its way
    point = measure_operating_point(of(rows), truth, threshold)
    assert set(point.classes) == {"class0", "class1", "class2"}
    for label, figures in [(None, point.overall), *enumerate(point.classes.values())]:
        right, counted, objects = counts_by_hand(truth, rows.tolist(), threshold, label)
        assert (figures.objects, figures.detections) == (objects, counted)
        assert counted > 3
        assert figures.precision == right / counted
        assert figures.recall == right / objects
        precision, recall = right / counted, right / objects
        assert figures.f1 == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-12)
        assert figures.agreement is None


def test_the_curve_holds_f1_at_every_threshold() -> None:
    truth, rows = random_case(5)
    point = measure_operating_point(of(rows), truth, 0.25)
    assert len(point.f1_curve) == 101
    for step in range(0, 101, 9):
        alone = measure_operating_point(of(rows), truth, step / 100).overall
        assert point.f1_curve[step] == pytest.approx(alone.f1, abs=1e-6)
    best = max(range(101), key=lambda step: point.f1_curve[step])
    assert point.best_confidence == best / 100
    assert 0 < best < 100


def separate_case(seed: int) -> tuple[dict, np.ndarray]:
    """Objects in a grid of cells, so that no detection overlaps two: COCO's way of matching is then ours."""
    random = np.random.default_rng(seed)
    objects, rows = [], []
    for image in IMAGES:
        for cell in range(9):
            corner = np.array([cell % 3, cell // 3]) * 66.0 + random.uniform(0, 6, 2)
            box, label = np.concatenate([corner, corner + random.uniform(20, 55, 2)]), int(random.integers(3))
            if random.random() < 0.6:
                objects.append((image, label, *box.tolist()))
            for _ in range(random.integers(0, 3)):
                moved = box + random.normal(0, 4, 4)
                guess = label if random.random() < 0.8 else int(random.integers(3))
                rows.append((image, *moved.tolist(), random.random(), guess))
    return truth_of(*objects, images=len(IMAGES), classes=3), np.array(rows)


@pytest.mark.parametrize("threshold", [0.25, 0.6])
def test_pycocotools_counts_the_same(threshold: float) -> None:
    """Its matches at IoU 0.5, with the detections above the threshold only."""
    truth, rows = separate_case(0)
    chosen = rows[rows[:, 5] > threshold].tolist()
    results = [
        {
            "image_id": int(r[0]),
            "bbox": [*r[1:3], r[3] - r[1], r[4] - r[2]],
            "score": r[5],
            "category_id": int(r[6]) + 1,
        }
        for r in chosen
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [1000]
        evaluation.evaluate()
    point = measure_operating_point(of(rows), truth, threshold)
    for label, figures in [(None, point.overall), *enumerate(point.classes.values())]:
        found = [
            entry for entry in evaluation.evalImgs if entry and label in (None, entry["category_id"] - 1)
        ]
        matches = np.concatenate([entry["dtMatches"][0] for entry in found]) > 0
        objects = sum(len(entry["gtIds"]) for entry in found)
        assert 10 < matches.sum() < len(matches)
        assert figures.precision == matches.mean()
        assert figures.recall == matches.sum() / objects


# -- found again: looped by hand


@pytest.mark.parametrize(("seed", "threshold"), [(0, 0.25), (1, 0.5)])
def test_agreement_is_counted(seed: int, threshold: float) -> None:
    truth, rows = separate_case(seed)
    ours = jittered(rows, seed)
    point = measure_operating_point(of(ours), truth, threshold, of(rows))
    for label, figures in [(None, point.overall), *enumerate(point.classes.values())]:
        total, faded, shifts = 0, 0, []
        for image, *box, score, kind in rows.tolist():
            if score <= threshold or label not in (None, int(kind)):
                continue
            total += 1
            same = [row for row in ours.tolist() if row[0] == image and row[6] == kind]
            close = [row for row in same if overlap(row[1:5], box) >= 0.9]
            assert len(close) <= 1
            if close and close[0][5] > threshold:
                shifts.append(close[0][5] - score)
            elif close:
                faded += 1
        agreement = figures.agreement
        assert agreement is not None
        assert agreement.reference == total
        assert agreement.matched == len(shifts) / total
        assert agreement.faded == faded / total
        assert agreement.score_shift == pytest.approx(sum(shifts) / len(shifts), abs=1e-12)
        assert agreement.score_change == pytest.approx(sum(map(abs, shifts)) / len(shifts), abs=1e-12)
    assert point.overall.agreement is not None
    assert 0.3 < point.overall.agreement.matched < 0.95
    alone = measure_agreement(of(ours), of(rows), 3, threshold)
    assert alone == point.overall.agreement


def test_a_model_agrees_with_itself_and_is_a_drop_in() -> None:
    truth, rows = separate_case(1)
    same = of(rows)
    agreement = measure_operating_point(same, truth, 0.25, same).overall.agreement
    assert agreement == Agreement(int((rows[:, 5] > 0.25).sum()), 1.0, 0.0, 0.0, 0.0)
    assert agreement.is_drop_in


@pytest.mark.parametrize(
    ("matched", "shift", "drop_in"),
    [
        (0.99, 0.0099, True),
        (0.99, -0.0099, True),
        (0.9899, 0.0, False),
        (1.0, 0.01, False),
        (1.0, -0.01, False),
    ],
)
def test_a_drop_in_finds_99_percent_and_shifts_by_less_than_a_hundredth(
    matched: float, shift: float, drop_in: bool
) -> None:
    assert Agreement(100, matched, 0.0, shift, abs(shift)).is_drop_in is drop_in


def test_each_float_detection_is_found_again_once_and_in_its_class() -> None:
    box, near = (1, 10, 10, 110, 110), (1, 11, 10, 111, 110)
    float_rows = detections((*box, 0.9, 0), (*box, 0.8, 1))
    ours = detections((*near, 0.7, 0), (*box, 0.6, 0))  # two for the first, none for the second
    agreement = measure_agreement(ours, float_rows, 2, 0.25)
    assert (agreement.reference, agreement.matched) == (2, 0.5)
    moved = detections((1, 20, 10, 120, 110, 0.9, 0), (*box, 0.8, 1))  # IoU 0.82
    assert measure_agreement(moved, float_rows, 2, 0.25).matched == 0.5
    elsewhere = detections((2, *box[1:], 0.9, 0), (2, *box[1:], 0.8, 1))
    assert measure_agreement(elsewhere, float_rows, 2, 0.25).matched == 0.0


def test_nothing_to_divide_by_is_none_and_comes_back_from_json() -> None:
    truth = truth_of((1, 0, 0, 0, 40, 40), images=30, classes=3)
    nothing = detections()
    point = measure_operating_point(nothing, truth, 0.25, nothing)
    assert (point.overall.precision, point.overall.recall, point.overall.f1) == (None, 0.0, 0.0)
    assert point.overall.agreement == Agreement(0, None, None, None, None)
    assert point.overall.agreement.is_drop_in is None
    assert set(point.classes) == {"class0"}
    assert "-" in point.describe()
    truth, rows = separate_case(2)
    whole = measure_operating_point(of(rows), truth, 0.25, of(jittered(rows, 0)))
    for one in (point, whole):
        assert OperatingPoint.from_dict(one.as_dict()) == one


def test_models_are_compared_on_the_same_images_only() -> None:
    truth, rows = separate_case(0)
    with pytest.raises(DataError, match="same images"):
        measure_operating_point(of(rows), truth, 0.25, Detections(of(rows).rows[:10], IMAGES[:10]))


def test_a_model_with_its_classes_in_another_order_is_compared_class_by_class() -> None:
    _, rows = separate_case(0)
    turned = rows.copy()
    turned[:, 6] = (rows[:, 6] + 1) % 3  # class k of the first model is class k + 1 of the second
    brought = of(turned).in_classes(np.array([2, 0, 1]))
    assert measure_agreement(of(rows), brought, 3, 0.25).matched == 1.0
    assert measure_agreement(of(rows), of(turned), 3, 0.25).matched < 0.1
