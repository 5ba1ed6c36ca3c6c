"""The mask loss against a loop over points and cells, and what it must and must not depend on."""

import math

import pytest
import torch
from torch import Tensor

from models import DetectionLoss, SegmentationLoss, SegmentTargets, build_detector
from models.boxes import distances_to_boxes, expected_distances, make_anchor_points
from models.losses.assigner import assign, pad_targets
from models.losses.segmentation import mask_losses, target_rows
from models.segmentation import detection_maps

STRIDES, SIZE, CLASSES, PROTOTYPES = (8, 16), (64, 64), 3, 5
TARGETS = torch.tensor(
    [
        [1, 2, 4.0, 6.0, 30.0, 40.0],
        [0, 1, 10.0, 10.0, 60.0, 50.0],
        [1, 0, 8.0, 8.0, 34.0, 44.0],  # overlaps the first
        [1, 1, 50.0, 50.0, 61.0, 60.0],
    ]
)
RawMaps = tuple[tuple[tuple[Tensor, Tensor, Tensor], ...], Tensor]


def random_raw(seed: int) -> RawMaps:
    generator = torch.Generator().manual_seed(seed)

    def draw(channels: int, stride: int) -> Tensor:
        return torch.randn(2, channels, SIZE[0] // stride, SIZE[1] // stride, generator=generator)

    levels = tuple((draw(64, s), draw(CLASSES, s), draw(PROTOTYPES, s).requires_grad_()) for s in STRIDES)
    return levels, draw(PROTOTYPES, 4).requires_grad_()


def random_masks(seed: int) -> Tensor:
    return torch.randint(0, 256, (len(TARGETS), 16, 16), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )


def overlap(cell: int, low: float, high: float) -> float:
    return max(0.0, min(cell + 1.0, high) - max(float(cell), low))


def test_term_equals_a_loop_over_points_and_cells() -> None:
    raw, masks = random_raw(0), random_masks(1)
    found = SegmentationLoss(CLASSES, STRIDES, gains={"mask": 2.0})(raw, SegmentTargets(TARGETS, masks), SIZE)
    plain = DetectionLoss(CLASSES, STRIDES)(detection_maps(raw), TARGETS, SIZE)
    assert {name: float(term) for name, term in found.items() if name != "mask"} == pytest.approx(
        {name: float(term) for name, term in plain.items()}
    )
    shapes = [(SIZE[0] // s, SIZE[1] // s) for s in STRIDES]
    points, strides = make_anchor_points(shapes, STRIDES, torch.device("cpu"), torch.float32)
    box = torch.cat([level[0].flatten(2) for level in raw[0]], dim=2).transpose(1, 2)
    cls = torch.cat([level[1].flatten(2) for level in raw[0]], dim=2).transpose(1, 2)
    coefficients = torch.cat([level[2].flatten(2) for level in raw[0]], dim=2)
    boxes = distances_to_boxes(expected_distances(box, torch.arange(16.0)), points) * strides
    chosen = assign(cls.sigmoid(), boxes, points * strides, *pad_targets(TARGETS, 2))
    total, weights = 0.0, chosen.scores_BAK.sum(dim=-1)
    for image, anchor in chosen.positive_BA.nonzero().tolist():
        target = chosen.boxes_BA4[image, anchor]
        (row,) = [
            row for row, t in enumerate(TARGETS) if int(t[0]) == image and torch.equal(t[2:], target)
        ]  # its object, found by the box
        x1, y1, x2, y2 = (target / 4).tolist()
        summed, area = 0.0, 0.0
        for y in range(16):
            for x in range(16):
                share = overlap(x, x1, x2) * overlap(y, y1, y2)
                logit = float((coefficients[image, :, anchor] @ raw[1][image, :, y, x]).detach())
                p, wanted = 1 / (1 + math.exp(-logit)), float(masks[row, y, x]) / 255
                summed -= share * (wanted * math.log(p) + (1 - wanted) * math.log(1 - p))
                area += share
        total += float(weights[image, anchor]) * summed / area
    assert float(found["mask"]) == pytest.approx(2.0 * total / max(float(weights.sum()), 1.0), rel=1e-4)
    assert chosen.positive_BA.sum() > 10


def test_size_of_an_object_and_what_lies_outside_do_not_count() -> None:
    """Constant logits give the same loss for any box; changes outside of the box give none."""
    prototypes = torch.ones(1, 1, 16, 16)
    boxes = torch.tensor([[0.0, 0, 64, 64], [20, 20, 23, 27], [4, 4, 8, 8]])
    masks = torch.full((3, 16, 16), 255, dtype=torch.uint8)
    coefficients, images = torch.full((3, 1), 1.5), torch.zeros(3, dtype=torch.int64)
    losses = mask_losses(prototypes, coefficients, images, masks, boxes, SIZE)
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-1.5))] * 3, rel=1e-5)
    masks[2, 2:] = 0  # rows below 8 pixels
    assert torch.equal(mask_losses(prototypes, coefficients, images, masks, boxes, SIZE)[2], losses[2])


def test_gradient_reaches_coefficients_and_prototypes_of_objects_only() -> None:
    raw = random_raw(2)
    only_second = TARGETS[TARGETS[:, 0] == 1]
    masks = random_masks(3)[: len(only_second)]
    loss = SegmentationLoss(CLASSES, STRIDES)(raw, SegmentTargets(only_second, masks), SIZE)
    loss["mask"].backward()
    assert raw[1].grad is not None
    assert not raw[1].grad[0].any()
    assert raw[1].grad[1].any()
    assert raw[0][0][2].grad is not None
    assert raw[0][0][2].grad[1].any()


def test_images_without_objects_cost_nothing() -> None:
    targets = SegmentTargets(torch.zeros(0, 6), torch.zeros(0, 16, 16, dtype=torch.uint8))
    terms = SegmentationLoss(CLASSES, STRIDES)(random_raw(4), targets, SIZE)
    assert float(terms["mask"]) == 0
    assert bool(torch.stack(list(terms.values())).isfinite().all())


def test_rows_lead_from_padded_objects_back_to_the_list() -> None:
    assert target_rows(TARGETS[:, 0].long(), 3).tolist() == [[1, -1, -1], [0, 2, 3], [-1, -1, -1]]


def test_masks_on_another_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 8, 8\); expected \(4, 16, 16\)"):
        SegmentationLoss(CLASSES, STRIDES)(
            random_raw(0), SegmentTargets(TARGETS, random_masks(0)[:, ::2, ::2]), SIZE
        )


@pytest.mark.slow
def test_a_network_learns_one_mask() -> None:
    """A few dozen steps on one image turn the assembled mask into the object's."""
    torch.manual_seed(0)
    detector = build_detector("yolov9t-seg", 1).train()
    image = torch.rand(1, 3, 64, 64) * 0.1
    image[:, :, 16:48, 8:40] += 0.8
    masks = torch.zeros(1, 16, 16, dtype=torch.uint8)
    masks[:, 4:12, 2:10] = 255
    targets = SegmentTargets(torch.tensor([[0, 0, 4.0, 12.0, 44.0, 52.0]]), masks)
    loss = SegmentationLoss(1, detector.strides)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    values = []
    for _ in range(20):
        terms = loss(detector.network(image), targets, (64, 64))
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        values.append(float(terms["mask"].detach()))
    assert min(values[-5:]) < 0.3 * max(values[:5])
