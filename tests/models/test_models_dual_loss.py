"""Consistent dual assignment, and the regression without bins, against formulas looped by hand."""

import numpy as np
import pytest
import torch
from torch import Tensor

from models import DetectionLoss, DualLoss, SegmentationLoss, build_detector, detector_loss, select_head
from models.boxes import complete_iou

SIZE, STRIDES, CLASSES = (64, 96), (8, 16, 32), 3
TARGETS = torch.tensor(
    [
        [0.0, 1, 8.0, 8.0, 56.0, 40.0],
        [0.0, 0, 30.0, 20.0, 90.0, 60.0],
        [1.0, 2, 4.0, 4.0, 20.0, 20.0],
    ]
)


def maps(seed: int = 0) -> tuple[tuple[Tensor, Tensor], ...]:
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for stride in STRIDES:
        h, w = SIZE[0] // stride, SIZE[1] // stride
        box = torch.rand(2, 4, h, w, generator=generator) * 32 / stride + 0.5
        levels.append((box, torch.randn(2, CLASSES, h, w, generator=generator)))
    return tuple(levels)


def cells(raw: tuple[tuple[Tensor, Tensor], ...], image: int) -> list[dict[str, Tensor]]:
    """Every anchor point of an image: its centre, box (pixels), distances (cells), scores, stride."""
    found = []
    for stride, (box, cls) in zip(STRIDES, raw, strict=True):
        for y in range(box.shape[2]):
            for x in range(box.shape[3]):
                centre = torch.tensor([x + 0.5, y + 0.5])
                distances = box[image, :, y, x]
                corners = torch.cat((centre - distances[:2], centre + distances[2:])) * stride
                found.append(
                    {
                        "centre": centre * stride,
                        "box": corners,
                        "distances": distances,
                        "scores": cls[image, :, y, x].sigmoid(),
                        "stride": torch.tensor(float(stride)),
                    }
                )
    return found


def matched(
    raw: tuple[tuple[Tensor, Tensor], ...], top_k: int
) -> list[tuple[dict[str, Tensor], Tensor, float]]:
    """(point, object, weight) of every assignment; objects here are far enough apart not to share a point."""
    chosen = []
    for target in TARGETS:
        image, label, box = int(target[0]), int(target[1]), target[2:]
        ranked = []
        for point in cells(raw, image):
            inside = bool((point["centre"] > box[:2]).all() and (point["centre"] < box[2:]).all())
            overlap = float(complete_iou(box, point["box"]).clamp(min=0)) * inside
            ranked.append((float(point["scores"][label]) ** 0.5 * overlap**6, overlap, point))
        best = sorted(ranked, key=lambda entry: -entry[0])[:top_k]
        best = [entry for entry in best if entry[0] > 0]
        most, widest = max(entry[0] for entry in best), max(entry[1] for entry in best)
        chosen += [(point, target, metric / most * widest) for metric, _, point in best]
    return chosen


def test_l1_and_overlap_of_one_to_one_assignment() -> None:
    """With one point for each object its class target is its own overlap (arXiv:2405.14458, section 3.1)."""
    raw = maps()
    terms = DetectionLoss(CLASSES, STRIDES, reg_max=1, top_k=1)(raw, TARGETS, SIZE)
    assert set(terms) == {"box", "cls", "l1"}
    found = matched(raw, 1)
    assert len(found) == 3
    total = max(sum(weight for _, _, weight in found), 1.0)
    box = l1 = 0.0
    for point, target, weight in found:
        iou = float(complete_iou(point["box"], target[2:]))
        assert weight == pytest.approx(iou, rel=1e-5)
        box += (1 - iou) * weight
        shares = (point["box"] - target[2:]).abs() / torch.tensor([96.0, 64.0, 96.0, 64.0])
        l1 += float(shares.sum()) * weight
    assert float(terms["box"]) == pytest.approx(7.5 * box / total, rel=1e-4)
    assert float(terms["l1"]) == pytest.approx(18.75 * l1 / total, rel=1e-4)


def test_the_one_to_one_point_is_the_best_of_the_one_to_many_points() -> None:
    """The consistent metric: with the same maps, the single point is the one with the largest class target."""
    raw = maps(1)
    for (point, target, _), many in zip(
        matched(raw, 1), np.array_split(np.arange(len(matched(raw, 10))), [10, 20]), strict=True
    ):
        del target
        best = max((matched(raw, 10)[index] for index in many), key=lambda entry: entry[2])
        assert torch.equal(best[0]["box"], point["box"])
    one = {"one2many": raw, "one2one": raw}
    terms = DualLoss(
        {
            "one2many": DetectionLoss(CLASSES, STRIDES, reg_max=1),
            "one2one": DetectionLoss(CLASSES, STRIDES, reg_max=1, top_k=1),
        }
    )(one, TARGETS, SIZE)
    assert set(terms) == {"box", "cls", "l1", "one2one_box", "one2one_cls", "one2one_l1"}
    for top_k, prefix in ((10, ""), (1, "one2one_")):
        alone = DetectionLoss(CLASSES, STRIDES, reg_max=1, top_k=top_k)(raw, TARGETS, SIZE)
        for name, term in alone.items():
            assert float(terms[prefix + name]) == float(term)
    assert float(terms["one2one_cls"]) != float(terms["cls"])


@pytest.mark.parametrize(
    ("name", "head", "kind", "names"),
    [
        ("yolo26n", None, DualLoss, {"box", "cls", "l1"}),
        ("yolo26n", "one2one", DetectionLoss, {"box", "cls", "l1"}),
        ("yolov10n", None, DualLoss, {"box", "cls", "dfl"}),
        ("yolo26n-seg", "one2one", SegmentationLoss, {"box", "cls", "l1", "mask"}),
    ],
)
def test_each_network_gets_the_loss_of_its_heads(
    name: str, head: str | None, kind: type, names: set[str]
) -> None:
    with torch.device("meta"):
        detector = build_detector(name, CLASSES)
    detector = select_head(detector, head) if head else detector
    loss = detector_loss(detector)
    assert isinstance(loss, kind)
    parts = dict(loss.losses.items()) if isinstance(loss, DualLoss) else {head: loss}
    assert {key: part.top_k for key, part in parts.items()} == {
        key: 1 if key == "one2one" else 10 for key in detector.heads
    }
    assert all(set(part.gains) == names for part in parts.values())


def test_training_lowers_the_terms_of_both_heads() -> None:
    torch.manual_seed(0)
    detector = build_detector("yolo26n", CLASSES)
    images, size = torch.rand(2, 3, 64, 64), (64, 64)
    targets = TARGETS.clone()
    targets[:, 2:] *= 2 / 3
    loss = detector_loss(detector)
    optimizer = torch.optim.AdamW(detector.network.parameters(), lr=2e-3)
    totals = []
    for _ in range(12):
        terms = loss(detector.network(images), targets, size)
        totals.append({name: float(term.detach()) for name, term in terms.items()})
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
    for head in ("", "one2one_"):
        first, last = (sum(t[f"{head}{n}"] for n in ("box", "cls", "l1")) for t in (totals[0], totals[-1]))
        assert last < 0.8 * first
