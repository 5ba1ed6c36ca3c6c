"""Every form of engine output becomes the same detections; partners are found one to one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision

from core.errors import DeployError
from pipeline.evaluation.engine_outputs import OutputReader, decode_maps, match_detections
from pipeline.stages.parity import compare_detections

STRIDES = (8, 16, 32)
BINS, CLASSES = 16, 2


def raw_maps() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    maps = {}
    for stride in STRIDES:
        shape = (2, 64 // stride, 96 // stride)
        for kind, channels in (("class", CLASSES), ("box", 4 * BINS)):
            maps[f"{kind}_{stride}"] = generator.normal(0, 2, (shape[0], channels, *shape[1:])).astype(
                np.float32
            )
    return maps


def by_hand(maps: dict[str, np.ndarray]) -> list[list[list[float]]]:
    """Corners and scores of every cell, in loops: [image][cell] of x1, y1, x2, y2, scores."""
    images = []
    for image in range(2):
        rows = []
        for stride in STRIDES:
            box, score = maps[f"box_{stride}"][image], maps[f"class_{stride}"][image]
            for y in range(box.shape[1]):
                for x in range(box.shape[2]):
                    sides = []
                    for side in range(4):
                        logits = box[side * BINS : (side + 1) * BINS, y, x].astype(np.float64)
                        weights = np.exp(logits) / np.exp(logits).sum()
                        sides.append(float((weights * np.arange(BINS)).sum()))
                    left, top, right, bottom = sides
                    corners = [x + 0.5 - left, y + 0.5 - top, x + 0.5 + right, y + 0.5 + bottom]
                    scores = 1 / (1 + np.exp(-score[:, y, x].astype(np.float64)))
                    rows.append([*(value * stride for value in corners), *scores])
        images.append(rows)
    return images


def test_raw_maps_are_decoded_and_suppressed() -> None:
    maps = raw_maps()
    reader = OutputReader("raw", confidence=0.6, iou=0.5, max_detections=20)
    found = reader.detections(maps, 2)
    for image, rows in zip(found, by_hand(maps), strict=True):
        cells = torch.tensor(rows)
        anchor, label = torch.nonzero(cells[:, 4:] > 0.6, as_tuple=True)
        scores = cells[anchor, 4 + label]
        kept = torchvision.ops.batched_nms(cells[anchor, :4], scores, label, 0.5)[:20]
        wanted = torch.cat([cells[anchor[kept], :4], scores[kept, None], label[kept, None]], 1)
        torch.testing.assert_close(image, wanted.float(), rtol=1e-4, atol=1e-3)


def test_wrong_outputs_are_named() -> None:
    maps = raw_maps()
    del maps["box_16"]
    with pytest.raises(DeployError, match="box_8, class_8, box_16 and so on"):
        decode_maps(maps)
    with pytest.raises(DeployError, match=r"\(2, 7\).*\[B, 4 \+ classes"):
        OutputReader("decoded", 0.1, 0.5, 10).detections({"out": np.zeros((2, 7), np.float32)}, 2)


def test_a_head_without_nms_keeps_overlapping_boxes() -> None:
    """The same maps, nothing suppressed: the best cells and classes of a sort."""
    maps = raw_maps()
    reader = OutputReader("raw", confidence=0.6, iou=None, max_detections=20)
    for image, rows in zip(reader.detections(maps, 2), by_hand(maps), strict=True):
        pairs = [
            [*row[:4], score, label] for row in rows for label, score in enumerate(row[4:]) if score > 0.6
        ]
        wanted = sorted(pairs, key=lambda pair: -pair[4])[:20]
        torch.testing.assert_close(image, torch.tensor(wanted).float(), rtol=1e-4, atol=1e-3)


def test_end_to_end_detections_are_cut_only() -> None:
    rows = np.zeros((3, 4, 6 + 2), np.float32)
    rows[0, :, 4] = [0.9, 0.5, 0.2, 0.0]
    rows[0, :, 6:] = [[1, 0], [0, 1], [1, 1], [5, 5]]
    prototypes = np.stack([np.full((3, 2, 2), -1.0), np.full((3, 2, 2), 2.0)], 1).astype(np.float32)
    reader = OutputReader("end2end", 0.1, None, 2)
    first, second = reader.detections({"output0": rows[..., :6]}, 2)
    torch.testing.assert_close(first, torch.from_numpy(rows[0, :2, :6]))
    assert second.shape == (0, 6)
    masked = OutputReader("end2end", 0.1, None, 300, masks=True)
    found = masked.detections({"output0": rows, "output1": prototypes}, 1)[0]
    assert found.detections.shape == (3, 6)  # type: ignore[union-attr]
    wanted = torch.tensor([-1.0, 2.0, 1.0]).sigmoid()
    torch.testing.assert_close(found.masks[:, 0, 0], wanted)  # type: ignore[union-attr]
    with pytest.raises(DeployError, match=r"\(2, 7\); expected \[B, detections, 6\]"):
        reader.detections({"output0": np.zeros((2, 7), np.float32)}, 2)


ROWS = [  # image, box, score, class
    [1, 0, 0, 10, 10, 0.3, 0],
    [0, 5, 5, 20, 20, 0.9, 1],
    [1, 0, 0, 10, 10, 0.8, 1],
    [2, 1, 1, 2, 2, 0.99, 0],  # of an image that only fills up the batch
    [1, 4, 4, 9, 9, 0.05, 0],
]


def plugin_outputs() -> dict[str, np.ndarray]:
    boxes, scores, classes = np.zeros((3, 4, 4)), np.zeros((3, 4)), np.full((3, 4), 7.0)
    counts = np.zeros((3, 1))
    for image, *box, score, label in ROWS:
        place = int(counts[image, 0])
        boxes[image, place], scores[image, place], classes[image, place] = box, score, label
        counts[image, 0] += 1
    scores[0, 1] = 1.0  # behind the count: rubbish
    values = {"num_dets": counts, "det_boxes": boxes, "det_scores": scores, "det_classes": classes}
    return {name: value.astype(np.float32) for name, value in values.items()}


@pytest.mark.parametrize(
    ("form", "outputs"),
    [
        ("onnx_nms", {"detections": np.array(ROWS, np.float32)}),
        ("efficient_nms", plugin_outputs()),
    ],
)
def test_detections_of_the_graph_are_sorted_and_cut(form: str, outputs: dict[str, np.ndarray]) -> None:
    first, second = OutputReader(form, 0.1, 0.5, 10).detections(outputs, 2)
    torch.testing.assert_close(first, torch.tensor([[5, 5, 20, 20, 0.9, 1]]))
    torch.testing.assert_close(second, torch.tensor([[0, 0, 10, 10, 0.8, 1], [0, 0, 10, 10, 0.3, 0]]))
    assert len(OutputReader(form, 0.1, 0.5, 1).detections(outputs, 2)[1]) == 1


def boxes(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows).reshape(-1, 6)


def test_partners_are_one_to_one_and_of_one_class() -> None:
    reference = boxes((0, 0, 10, 10, 0.5, 0), (2, 0, 12, 10, 0.9, 0), (30, 30, 40, 40, 0.9, 1))
    found = boxes((0, 0, 10, 10, 0.6, 0), (1.9, 0, 12, 10, 0.7, 0), (30, 30, 40, 40, 0.9, 0))
    assert sorted(match_detections(found, reference)) == [(0, 0), (1, 1)]
    twice = boxes((0, 0, 10, 10, 0.6, 0), (0, 0, 10, 10, 0.7, 0))
    assert match_detections(twice, reference[:1]) == [(1, 0)]
    assert match_detections(found, boxes()) == []
    assert match_detections(boxes(), reference) == []
    half = boxes((0, 0, 10, 5, 0.9, 0))
    assert match_detections(half, reference[:1], 0.5) == [(0, 0)]
    assert match_detections(half, reference[:1], 0.51) == []


def test_missing_clear_detections_stop_and_faint_ones_do_not() -> None:
    sure = boxes(*((20.0 * i, 0, 20 * i + 10, 10, 0.9, 0) for i in range(10)))
    faint = boxes(*((20.0 * i, 50, 20 * i + 10, 60, 0.3, 0) for i in range(10)))
    everything = torch.cat([sure, faint])
    agreement = compare_detections([sure], [everything], confidence=0.25)
    assert (agreement.matched, agreement.clear, agreement.clear_missed) == (10, 20, 0)
    agreement.require(0.02, "engine")
    agreement = compare_detections([everything[3:]], [everything], confidence=0.25)
    assert agreement.clear_missed == 3
    with pytest.raises(DeployError, match="of 17 clear ones 3 are missing"):
        agreement.require(0.02, "engine")
