"""The assigner and the loss against loops that follow the papers' words."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import complete_box_iou

from models import DetectionLoss
from models.boxes import make_anchor_points
from models.losses.assigner import assign, pad_targets
from models.losses.detection import distribution_focal_loss

STRIDES = (8, 16)
SIZE = (64, 64)
CLASSES = 3


def random_raw(seed: int, batch: int = 2) -> tuple[tuple[Tensor, Tensor], ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        (
            torch.randn(batch, 64, SIZE[0] // s, SIZE[1] // s, generator=generator).requires_grad_(),
            torch.randn(batch, CLASSES, SIZE[0] // s, SIZE[1] // s, generator=generator).requires_grad_(),
        )
        for s in STRIDES
    )


TARGETS = torch.tensor(
    [
        [1, 2, 4.0, 6.0, 30.0, 40.0],
        [0, 1, 10.0, 10.0, 60.0, 50.0],
        [1, 0, 8.0, 8.0, 34.0, 44.0],  # overlaps the first, so points compete
        [1, 1, 50.0, 50.0, 62.0, 60.0],
    ]
)


def naive_assignment(
    scores: Tensor, boxes: Tensor, points: Tensor, targets: Tensor
) -> dict[int, tuple[int, float]]:
    """One image: anchor -> (object, soft target), step by step."""
    overlap = complete_box_iou(targets[:, 1:], boxes).clamp(min=0)
    chosen: dict[int, list[int]] = {}
    alignment = torch.zeros_like(overlap)
    for m, target in enumerate(targets):
        for a, (x, y) in enumerate(points.tolist()):
            if target[1] < x < target[3] and target[2] < y < target[4]:
                alignment[m, a] = scores[a, int(target[0])] ** 0.5 * overlap[m, a] ** 6
        for a in sorted(range(len(points)), key=lambda index: -alignment[m, index])[:10]:
            if alignment[m, a] > 0:
                chosen.setdefault(a, []).append(m)
    owner = {a: max(objects, key=lambda m: overlap[m, a]) for a, objects in chosen.items()}
    result = {}
    for a, m in owner.items():
        mine = [b for b, other in owner.items() if other == m]
        best_alignment = max(float(alignment[m, b]) for b in mine)
        best_overlap = max(float(overlap[m, b]) for b in mine)
        result[a] = (m, float(alignment[m, a]) / best_alignment * best_overlap)
    return result


def test_assignment_equals_the_papers_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    points, strides = make_anchor_points([(8, 8), (4, 4)], STRIDES, torch.device("cpu"), torch.float32)
    points = points * strides
    half = torch.rand(2, 80, 2, generator=generator) * 20 + 4
    boxes = torch.cat((points - half, points + half), dim=-1)
    scores = torch.rand(2, 80, CLASSES, generator=generator)
    result = assign(scores, boxes, points, *pad_targets(TARGETS, 2))
    for image in range(2):
        rows = TARGETS[TARGETS[:, 0] == image][:, 1:]
        expected = naive_assignment(scores[image], boxes[image], points, rows)
        assert result.positive_BA[image].nonzero().flatten().tolist() == sorted(expected)
        for anchor, (owner, weight) in expected.items():
            wanted = torch.zeros(CLASSES)
            wanted[int(rows[owner, 0])] = weight
            assert torch.allclose(result.scores_BAK[image, anchor], wanted, atol=1e-4)
            assert torch.equal(result.boxes_BA4[image, anchor], rows[owner, 1:])


def test_terms_equal_a_loop_over_positive_points() -> None:
    """Sums as the papers have them, from the assigner's result and the raw maps, one point at a time."""
    raw = random_raw(6)
    loss = DetectionLoss(CLASSES, STRIDES, gains={"box": 1.0, "cls": 1.0, "dfl": 1.0})
    terms = {name: float(term.detach()) for name, term in loss(raw, TARGETS, SIZE).items()}
    centres, scores, boxes, sides = [], [], [], []
    for (box, cls), stride in zip(raw, STRIDES, strict=True):
        probability = box.detach().reshape(2, 4, 16, -1).softmax(dim=2)
        for a in range(box.shape[2] * box.shape[3]):
            x, y = (a % box.shape[3] + 0.5) * stride, (a // box.shape[3] + 0.5) * stride
            expected = (probability[..., a] * torch.arange(16.0)[None, None]).sum(dim=2) * stride
            corners = torch.stack(
                (x - expected[:, 0], y - expected[:, 1], x + expected[:, 2], y + expected[:, 3]), dim=1
            )
            centres.append((x, y, stride))
            boxes.append(corners)
            sides.append(probability[..., a])
            scores.append(cls.detach().flatten(2)[..., a])
    logits = torch.stack(scores, dim=1)
    points = torch.tensor([centre[:2] for centre in centres])
    result = assign(logits.sigmoid(), torch.stack(boxes, dim=1), points, *pad_targets(TARGETS, 2))
    total = float(result.scores_BAK.sum())
    expected_terms = {"box": 0.0, "dfl": 0.0}
    for image, a in result.positive_BA.nonzero().tolist():
        x, y, stride = centres[a]
        target = result.boxes_BA4[image, a]
        weight = float(result.scores_BAK[image, a].sum()) / total
        overlap = float(complete_box_iou(boxes[a][image : image + 1], target[None]))
        expected_terms["box"] += weight * (1 - overlap)
        for side, wanted in enumerate([x - target[0], y - target[1], target[2] - x, target[3] - y]):
            cells = min(max(float(wanted) / stride, 0.0), 14.99)
            low, part = int(cells), cells - int(cells)
            bins = sides[a][image, side]
            entropy = -(1 - part) * math.log(bins[low]) - part * math.log(bins[low + 1])
            expected_terms["dfl"] += weight * entropy / 4
    assert total > 1
    assert terms["box"] == pytest.approx(expected_terms["box"], rel=1e-4)
    assert terms["dfl"] == pytest.approx(expected_terms["dfl"], rel=1e-4)
    entropy = torch.nn.functional.binary_cross_entropy(logits.sigmoid(), result.scores_BAK, reduction="sum")
    assert terms["cls"] == pytest.approx(float(entropy) / total, rel=1e-4)


def test_distribution_focal_loss_of_a_known_distance() -> None:
    logits = torch.zeros(1, 4, 16)
    logits[0, :, 2], logits[0, :, 3] = 3.0, 1.0
    total = math.exp(3) + math.exp(1) + 14
    expected = -(0.75 * math.log(math.exp(3) / total) + 0.25 * math.log(math.exp(1) / total))
    loss = distribution_focal_loss(logits.reshape(1, 64), torch.full((1, 4), 2.25), 16)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_images_without_objects_train_the_classes_only() -> None:
    raw = random_raw(1)
    terms = DetectionLoss(CLASSES, STRIDES)(raw, TARGETS[:0], SIZE)
    assert float(terms["box"].detach()) == 0
    assert float(terms["dfl"].detach()) == 0
    logits = torch.cat([cls.flatten() for _, cls in raw])
    assert float(terms["cls"].detach()) == pytest.approx(
        0.5 * float(torch.nn.functional.softplus(logits).sum()), rel=1e-5
    )
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert raw[0][1].grad is not None


def test_an_image_without_objects_beside_one_with_objects() -> None:
    raw = random_raw(2)
    both = DetectionLoss(CLASSES, STRIDES)(raw, TARGETS[:1], SIZE)
    alone = DetectionLoss(CLASSES, STRIDES)(
        tuple((box[1:], cls[1:]) for box, cls in raw), TARGETS[:1] * torch.tensor([0, 1, 1, 1, 1, 1]), SIZE
    )
    assert float(both["box"]) == pytest.approx(float(alone["box"]), rel=1e-5)
    assert float(both["cls"]) > float(alone["cls"])


def test_loss_falls_when_the_maps_are_fitted() -> None:
    raw = random_raw(3)
    loss = DetectionLoss(CLASSES, STRIDES)
    optimizer = torch.optim.Adam([tensor for level in raw for tensor in level], lr=0.1)
    history = []
    for _ in range(150):
        terms = loss(raw, TARGETS, SIZE)
        total = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append({name: float(term) for name, term in terms.items()})
    assert history[-1]["box"] < 0.1 * history[0]["box"]
    assert history[-1]["cls"] < 0.1 * history[0]["cls"]
    assert history[-1]["dfl"] < 0.5 * history[0]["dfl"]


def test_terms_are_single_precision_under_autocast() -> None:
    raw = random_raw(4)
    expected = DetectionLoss(CLASSES, STRIDES)(raw, TARGETS, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        terms = DetectionLoss(CLASSES, STRIDES)(raw, TARGETS, SIZE)
    assert all(term.dtype == torch.float32 for term in terms.values())
    assert all(torch.equal(terms[name], expected[name]) for name in terms)
    half = tuple((box.bfloat16(), cls.bfloat16()) for box, cls in raw)
    terms = DetectionLoss(CLASSES, STRIDES)(half, TARGETS, SIZE)
    assert all(term.dtype == torch.float32 for term in terms.values())


def test_mismatches_are_refused() -> None:
    loss = DetectionLoss(CLASSES, STRIDES)
    with pytest.raises(ValueError, match="stride 8 have shapes"):
        loss(random_raw(5), TARGETS, (32, 64))
    with pytest.raises(ValueError, match="classes reach 3; the network has 3"):
        loss(random_raw(5), torch.tensor([[0, 3, 0, 0, 9, 9.0]]), SIZE)
    with pytest.raises(ValueError, match="name image 2"):
        loss(random_raw(5), torch.tensor([[2, 0, 0, 0, 9, 9.0]]), SIZE)
    with pytest.raises(ValueError, match="kls"):
        DetectionLoss(CLASSES, STRIDES, gains={"kls": 1.0})
