"""COCO AP and operating point against hand-worked cases, the reference library, and a plain-Python rewriting."""

import logging

import numpy as np
import pytest
import torch

from core.errors import DataError
from data import DetectionMetrics, build_loader, evaluate, ground_truth, open_dataset
from data.metrics.coco import ENGINES, average, coco_precision
from data.metrics.precision_recall import Boxes, best_f1, match
from tests.data.per_image import compute_metrics
from tests.data.test_loader import Squares


def truth_of(*objects: tuple, images: int = 2, classes: int = 2) -> dict:
    """COCO dictionary from (image, class, x1, y1, x2, y2[, crowd])."""
    annotations = []
    for number, (image, label, x1, y1, x2, y2, *crowd) in enumerate(objects, start=1):
        annotations.append(
            {
                "id": number,
                "image_id": image,
                "category_id": label + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": int(bool(crowd and crowd[0])),
            }
        )
    return {
        "info": {},
        "images": [{"id": i, "height": 200, "width": 200} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": k + 1, "name": f"class{k}"} for k in range(classes)],
    }


def found(*rows: tuple) -> np.ndarray:
    """Detections from (image, x1, y1, x2, y2, score, class)."""
    return np.array(rows, np.float64).reshape(-1, 7)


def random_case(
    seed: int, images: int = 30, classes: int = 3, crowds: bool = True
) -> tuple[dict, np.ndarray]:
    """Noisy detections of random objects, with duplicates, misses, wrong classes, and crowd regions."""
    random = np.random.default_rng(seed)
    objects, rows = [], []
    for image in range(1, images + 1):
        for _ in range(random.integers(0, 12)):
            corner, sides = random.uniform(0, 150, 2), random.uniform(4, 120, 2)
            box = np.concatenate([corner, corner + sides])
            label = int(random.integers(classes))
            objects.append((image, label, *box.tolist(), crowds and random.random() < 0.1))
            for _ in range(random.integers(0, 4)):
                noise = random.normal(0, 0.1, 4) * np.tile(sides, 2)
                guess = label if random.random() < 0.9 else int(random.integers(classes))
                moved = box + noise
                if (moved[2:] > moved[:2]).all():
                    rows.append(
                        (image, *moved.tolist(), round(random.random(), 2), guess)
                    )  # ties among scores
    return truth_of(*objects, images=images, classes=classes), found(*rows)


@pytest.mark.parametrize("engine", ENGINES)
def test_hand_worked_average_precision(engine: str):
    truth = truth_of((1, 0, 0, 0, 40, 40), (2, 0, 0, 0, 100, 100))
    rows = found((1, 0, 0, 40, 40, 0.9, 0), (1, 100, 100, 140, 140, 0.8, 0), (2, 0, 0, 100, 70, 0.7, 0))
    # By score: hit, miss, and one of IoU 0.7, which is a hit at 0.50 to 0.70 (five of ten thresholds).
    # There precision is 1 up to recall 0.5 (51 of 101 points), then 2/3 (50 points). Above 0.70: 1 for 51 points.
    low, high = (51 + 50 * 2 / 3) / 101, 51 / 101
    metrics = compute_metrics(rows, [1, 2], truth, engine)
    assert metrics.ap50 == pytest.approx(low, abs=1e-9)
    assert metrics.ap75 == pytest.approx(high, abs=1e-9)
    assert metrics.ap == pytest.approx((low + high) / 2, abs=1e-9)
    assert metrics.per_class_ap == {"class0": pytest.approx(metrics.ap)}  # class1 has no object
    assert metrics.ap_small is None  # nothing below 32 x 32
    assert metrics.ap_medium == pytest.approx(1.0)
    assert metrics.ap_large is not None
    assert (metrics.images, metrics.engine) == (2, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_hundred_detections_count(engine: str):
    """The protocol looks at the 100 best of an image and class: a hit at rank 101 does not count."""
    truth = truth_of((1, 0, 0, 0, 40, 40))
    misses = [(1, 100, 100, 150, 150, 0.9 - i / 1000, 0) for i in range(100)]
    assert compute_metrics(found(*misses, (1, 0, 0, 40, 40, 0.1, 0)), [1], truth, engine).ap == 0
    assert compute_metrics(found(*misses[1:], (1, 0, 0, 40, 40, 0.1, 0)), [1], truth, engine).ap > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_detections_in_a_crowd_are_neither_right_nor_wrong(engine: str):
    truth = truth_of((1, 0, 0, 0, 40, 40), (1, 0, 60, 60, 200, 200, True))
    rows = found((1, 70, 70, 90, 90, 0.99, 0), (1, 120, 120, 150, 150, 0.98, 0), (1, 0, 0, 40, 40, 0.5, 0))
    metrics = compute_metrics(rows, [1], truth, engine)
    assert (metrics.ap, metrics.precision, metrics.recall) == pytest.approx((1.0, 1.0, 1.0))


@pytest.mark.parametrize("seed", range(4))
def test_hotcoco_equals_pycocotools(seed: int):
    truth, rows = random_case(seed)
    ids = [image["id"] for image in truth["images"]][: 30 - 5 * seed]
    corners, rest = rows[:, 1:5], rows[:, 5:] + (0, 1)
    rows = np.concatenate([rows[:, :1], corners[:, :2], corners[:, 2:] - corners[:, :2], rest], axis=1)
    fast, reference = (coco_precision(truth, rows, ids, engine) for engine in ENGINES)
    np.testing.assert_allclose(fast, reference, atol=1e-12)
    assert 0.1 < average(reference[..., 0]) < 0.9


def test_pycocotools_own_summary_gives_the_same_figures(tmp_path):
    """The library's own path (files, loadRes, summarize) against ours."""
    import json

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, rows = random_case(11)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    results = [
        {
            "image_id": int(r[0]),
            "bbox": [r[1], r[2], r[3] - r[1], r[4] - r[2]],
            "score": r[5],
            "category_id": int(r[6]) + 1,
        }
        for r in rows.tolist()
    ]
    (tmp_path / "found.json").write_text(json.dumps(results))
    coco = COCO(str(tmp_path / "truth.json"))
    evaluation = COCOeval(coco, coco.loadRes(str(tmp_path / "found.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    metrics = compute_metrics(rows, list(range(1, 31)), truth, "hotcoco")
    ours = [metrics.ap, metrics.ap50, metrics.ap75, metrics.ap_small, metrics.ap_medium, metrics.ap_large]
    np.testing.assert_allclose(ours, evaluation.stats[:6], atol=1e-12)


def test_no_detection_is_zero_and_not_minus_one():
    truth = truth_of((1, 0, 0, 0, 100, 100))
    for engine in ENGINES:
        metrics = compute_metrics(found(), [1, 2], truth, engine)
        assert (metrics.ap, metrics.ap50, metrics.ap_large) == (0.0, 0.0, 0.0)
        assert (metrics.ap_small, metrics.ap_medium) == (None, None)
        assert (metrics.precision, metrics.recall, metrics.confidence) == (0.0, 0.0, 0.0)


def test_only_images_seen_are_measured():
    truth = truth_of((1, 0, 0, 0, 100, 100), (2, 0, 0, 0, 100, 100))
    assert compute_metrics(found((1, 0, 0, 100, 100, 0.9, 0)), [1], truth).ap == pytest.approx(1.0)
    assert compute_metrics(found((1, 0, 0, 100, 100, 0.9, 0)), [1, 2], truth).ap == pytest.approx(51 / 101)


def test_what_cannot_be_measured_is_refused():
    truth = truth_of((1, 0, 0, 0, 10, 10), (2, 0, 0, 0, 10, 10, True))
    for rows, ids, message in (
        (found(), [2], "nothing to measure"),
        (found(), [3], "not in the dataset"),
        (found((1, 0, 0, np.nan, 1, 0.5, 0)), [1], "NaN or infinite"),
    ):
        with pytest.raises(DataError, match=message):
            compute_metrics(rows, ids, truth)
    with pytest.raises(ValueError, match="Unknown metric engine 'fast'"):
        compute_metrics(found(), [1], truth, "fast")


def test_missing_hotcoco_falls_back_by_name(monkeypatch, caplog):
    monkeypatch.setattr("data.metrics.coco.importlib.util.find_spec", lambda _: None)
    with caplog.at_level(logging.WARNING):
        metrics = compute_metrics(found((1, 0, 0, 9, 9, 0.9, 0)), [1], truth_of((1, 0, 0, 0, 9, 9)))
    assert metrics.engine == "pycocotools"
    assert "pip install hotcoco" in caplog.text


def boxes_of(truth: dict) -> Boxes:
    annotations = truth["annotations"]
    boxes = np.array([a["bbox"] for a in annotations], np.float64)
    boxes[:, 2:] += boxes[:, :2]
    return Boxes(
        boxes,
        np.array([a["image_id"] for a in annotations]),
        np.array([a["category_id"] - 1 for a in annotations]),
        np.array([a["iscrowd"] for a in annotations], np.float64),
    )


def found_of(rows: np.ndarray) -> Boxes:
    return Boxes(rows[:, 1:5], rows[:, 0].astype(int), rows[:, 6].astype(int), rows[:, 5])


def plain_match(found: Boxes, truth: Boxes) -> tuple[list[bool], list[bool]]:
    """The rule of `match`, one detection at a time."""
    accepted: dict[int, int] = {}
    ignored = [False] * len(found.labels)
    for d, box in enumerate(found.boxes):
        best, best_iou = None, 0.5
        for g, other in enumerate(truth.boxes):
            if found.images[d] != truth.images[g] or found.labels[d] != truth.labels[g]:
                continue
            width = min(box[2], other[2]) - max(box[0], other[0])
            height = min(box[3], other[3]) - max(box[1], other[1])
            shared = max(width, 0) * max(height, 0)
            area = (box[2] - box[0]) * (box[3] - box[1])
            if truth.values[g]:
                ignored[d] |= shared / area >= 0.5
            else:
                iou = shared / (area + (other[2] - other[0]) * (other[3] - other[1]) - shared)
                if iou >= best_iou:
                    best, best_iou = g, iou
        if best is not None and (best not in accepted or found.values[d] > found.values[accepted[best]]):
            accepted[best] = d
    correct = [d in accepted.values() for d in range(len(found.labels))]
    return correct, [i and not c for i, c in zip(ignored, correct, strict=True)]


@pytest.mark.parametrize("seed", range(3))
def test_vectorised_matching_equals_the_plain_rule(seed: int):
    truth, rows = random_case(seed)
    correct, ignored = match(found_of(rows), boxes_of(truth))
    expected_correct, expected_ignored = plain_match(found_of(rows), boxes_of(truth))
    assert correct.tolist() == expected_correct
    assert ignored.tolist() == expected_ignored
    assert 20 < correct.sum() < len(rows) - 20
    assert ignored.any()


@pytest.mark.parametrize("seed", range(3))
def test_precision_and_recall_are_those_of_a_threshold(seed: int):
    """At the confidence returned, counting hits above the threshold gives nearly the same figures."""
    truth, rows = random_case(seed, images=150, crowds=False)
    point = best_f1(found_of(rows), boxes_of(truth))
    correct, _ = match(found_of(rows), boxes_of(truth))
    labels = boxes_of(truth).labels
    above = rows[:, 5] >= point.confidence
    precision = [correct[above & (rows[:, 6] == k)].mean() for k in range(3)]
    recall = [correct[above & (rows[:, 6] == k)].sum() / (labels == k).sum() for k in range(3)]
    assert point.precision == pytest.approx(np.mean(precision), abs=0.02)
    assert point.recall == pytest.approx(np.mean(recall), abs=0.02)


def test_hand_worked_operating_point():
    """Four objects; hits at 0.9, 0.8, 0.7, misses at 0.4 and 0.3: best between 0.4 and 0.7 with P 1 and R 3/4."""
    truth = truth_of(*((1, 0, 50 * i, 0, 50 * i + 40, 40) for i in range(4)))
    hits = [(1, 50 * i, 0, 50 * i + 40, 40, score, 0) for i, score in enumerate((0.9, 0.8, 0.7))]
    misses = [(1, 0, 100, 40, 140, 0.4, 0), (1, 0, 150, 40, 190, 0.3, 0)]
    metrics = compute_metrics(found(*hits, *misses), [1], truth)
    assert 0.55 < metrics.confidence < 0.7
    assert metrics.precision > 0.9
    assert metrics.recall == pytest.approx(0.75, abs=0.01)


def test_a_class_without_detections_above_the_confidence_counts_as_precise():
    """Class 0: hit at 0.9, misses at 0.3. Class 1: only misses, at 0.2. Best near 0.9: P (1 + 1) / 2, R (1 + 0) / 2."""
    truth = truth_of((1, 0, 0, 0, 40, 40), (1, 1, 0, 0, 40, 40))
    misses = [(1, 100, 10 * i, 140, 10 * i + 40, 0.3 - 0.1 * k, k) for i in range(9) for k in (0, 1)]
    metrics = compute_metrics(found((1, 0, 0, 40, 40, 0.9, 0), *misses), [1], truth)
    assert (metrics.precision, metrics.recall) == pytest.approx((1.0, 0.5), abs=0.05)


@pytest.mark.parametrize("engine", ENGINES)
def test_perfect_predictions_through_the_whole_path(engine: str):
    """Targets of the loader, given back as detections, are found at their places in the original images."""
    dataset = Squares(6, size=(96, 200))
    batches = list(build_loader(dataset, 64, 4))
    queue = iter(batches)

    def predict(images: torch.Tensor) -> list[torch.Tensor]:
        assert images.dtype == torch.float32
        assert images.max() <= 1
        targets = next(queue).targets
        rows = [targets[targets[:, 0] == i] for i in range(len(images))]
        return [torch.cat([t[:, 2:], torch.ones(len(t), 1), t[:, 1:2]], dim=1) for t in rows]

    metrics = evaluate(predict, batches, dataset, engine)
    assert metrics.ap == pytest.approx(1.0)
    assert metrics.per_class_ap == {"square": pytest.approx(1.0)}
    assert metrics.as_dict()["images"] == 6
    assert isinstance(metrics, DetectionMetrics)


def test_wrong_number_of_results_is_refused():
    with pytest.raises(DataError, match="1 results for a batch of 4"):
        evaluate(lambda _: [torch.zeros(0, 6)], build_loader(Squares(), 64, 4), Squares())


def test_real_ground_truth_scores_one(shared_data):
    """BCCD's own boxes as detections; the oracle is the definition of AP."""
    dataset = open_dataset(shared_data / "data" / "bccd", "val")
    truth = ground_truth(dataset)
    rows = found(
        *(
            (a["image_id"], a["bbox"][0], a["bbox"][1], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3], 0.5,
             a["category_id"] - 1)
            for a in truth["annotations"]
        )
    )  # fmt: skip
    metrics = compute_metrics(rows, list(dataset.ids), truth)
    assert metrics.ap == pytest.approx(1.0)
    assert metrics.images == 87
