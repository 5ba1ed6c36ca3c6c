"""Mask AP against pycocotools' own summary and the fast engine, and through `evaluate`."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from core.errors import DataError
from data import Instances, build_loader, evaluate, generate_synthetic, open_dataset
from data.masks import Rle, encode_mask
from data.metrics.coco import coco_matches
from data.metrics.resampling import resample_ap
from tests.data.per_image import compute_metrics

SIZE = (90, 120)


def ellipse(x: float, y: float, rx: float, ry: float) -> np.ndarray:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    return ((columns - x) / rx) ** 2 + ((rows - y) / ry) ** 2 < 1


def scene(seed: int) -> tuple[dict[str, Any], np.ndarray, list[Rle]]:
    """Ellipses as ground truth (one a crowd), and shifted, wrongly classified and invented ones as detections."""
    random = np.random.default_rng(seed)
    images = [{"id": number, "height": SIZE[0], "width": SIZE[1]} for number in (3, 5, 8)]
    annotations, rows, masks = [], [], []
    for image in images:
        for _ in range(7):
            x, y, rx, ry = random.uniform((10, 10, 3, 3), (110, 80, 30, 30))
            mask = ellipse(x, y, rx, ry)
            code = codec.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": image["id"], "category_id": int(random.integers(1, 4)),
                    "bbox": codec.toBbox(code).tolist(), "area": float(mask.sum()),
                    "iscrowd": int(len(annotations) == 4),
                    "segmentation": {"size": list(SIZE), "counts": code["counts"].decode()},
                }
            )  # fmt: skip
            for _ in range(int(random.integers(0, 3))):
                dx, dy, zoom = random.normal(0, 2), random.normal(0, 2), random.uniform(0.8, 1.2)
                found = ellipse(x + dx, y + dy, rx * zoom, ry)
                if not found.any():
                    continue
                label = annotations[-1]["category_id"] - 1 if random.random() < 0.8 else random.integers(0, 3)
                corners = [x + dx - rx * zoom, y + dy - ry, x + dx + rx * zoom, y + dy + ry]
                rows.append([image["id"], *corners, random.uniform(), label])
                masks.append(encode_mask(found))
    categories = [{"id": number + 1, "name": name} for number, name in enumerate("abc")]
    truth = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    return truth, np.array(rows), masks


@pytest.mark.parametrize("seed", range(4))
def test_figures_are_those_of_pycocotools(seed: int):
    truth, rows, masks = scene(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        results = [
            {
                "image_id": int(row[0]), "category_id": int(row[6]) + 1, "score": row[5],
                "segmentation": {"size": list(mask.size), "counts": mask.counts},
            }
            for row, mask in zip(rows, masks, strict=True)
        ]  # fmt: skip
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ids = [image["id"] for image in truth["images"]]
    for engine in ("hotcoco", "pycocotools"):
        found = compute_metrics(rows, ids, truth, engine, masks)
        boxes = compute_metrics(rows, ids, truth, engine)
        figures = [found.ap_mask, found.ap50_mask, found.ap75_mask]
        assert figures == pytest.approx(evaluation.stats[:3].tolist(), abs=1e-9)
        assert np.mean(list(found.per_class_ap_mask.values())) == pytest.approx(found.ap_mask)
        assert found.ap == boxes.ap
        assert found.ap_mask != pytest.approx(found.ap, abs=1e-3)
        assert "ap_mask" in found.as_dict()
        assert not [name for name in boxes.as_dict() if name.endswith("_mask")]
    assert 0.05 < evaluation.stats[0] < 0.95


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("engine", ["hotcoco", "pycocotools"])
def test_matches_of_masks_give_the_mask_ap(engine: str, seed: int):
    """Every image drawn once: the resampled score is the mask AP of the library."""
    truth, rows, masks = scene(seed)
    ids = [image["id"] for image in truth["images"]]
    corners, rest = rows[:, 1:5], rows[:, 5:] + (0, 1)
    boxes = np.concatenate([rows[:, :1], corners[:, :2], corners[:, 2:] - corners[:, :2], rest], axis=1)
    found = resample_ap(coco_matches(truth, boxes, ids, engine, masks), np.ones((1, len(ids)), np.int64))
    assert found[0] == pytest.approx(
        compute_metrics(rows, ids, truth, "pycocotools", masks).ap_mask, abs=1e-9
    )


def test_masks_without_ground_truth_masks_are_refused():
    truth, rows, masks = scene(0)
    for entry in truth["annotations"]:
        del entry["segmentation"]
    with pytest.raises(DataError, match="segments=True"):
        compute_metrics(rows, [3, 5, 8], truth, "hotcoco", masks)


@pytest.mark.parametrize("engine", ["hotcoco", "pycocotools"])
def test_true_masks_through_evaluate_score_high_and_none_score_zero(tmp_path, engine):
    """Ground truth, drawn on the coarse grid of the network, comes back through `evaluate` as nearly perfect masks."""
    dataset = open_dataset(generate_synthetic(tmp_path / "set", 1, 8, 160, 1), "val", segments=True)
    loader = build_loader(dataset, 192, 4, masks=True)
    batches = list(loader)
    answers = iter(batches)

    def truth(_images):
        batch = next(answers)
        found = []
        for number in range(len(batch)):
            own = batch.targets[:, 0] == number
            objects = batch.targets[own]
            ones = torch.ones(len(objects), 1)
            detections = torch.cat([objects[:, 2:], ones, objects[:, 1:2]], dim=1)
            found.append(Instances(detections, batch.masks[own].float() / 255))
        return found

    perfect = evaluate(truth, batches, dataset, engine)
    assert perfect.ap > 0.99
    assert perfect.ap50_mask > 0.98
    assert perfect.ap_mask > 0.7  # small stars and rings on a grid of four pixels
    nothing = evaluate(
        lambda images: [Instances(torch.zeros(0, 6), torch.zeros(0, 48, 48))] * len(images),
        batches,
        dataset,
        engine,
    )
    assert nothing.ap == nothing.ap_mask == 0
