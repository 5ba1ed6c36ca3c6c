"""The detection loss among processes: the parts of two halves of a batch add up to the loss of the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from core.processes import num_processes, sum_over_processes, summing
from models.losses.detection import DetectionLoss
from quant.finetuning.distillation import distillation_loss

BATCH, CLASSES, STRIDES = 6, 3, (8, 16)


def maps(batch: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    sides = [64 // stride for stride in STRIDES]
    return [
        (torch.randn(batch, 64, n, n, generator=random), torch.randn(batch, CLASSES, n, n, generator=random))
        for n in sides
    ]


def targets() -> Tensor:
    """Five objects, four of them in the first half of the images."""
    rows = [
        (0, 1, 4, 4, 40, 40),
        (0, 0, 20, 30, 60, 60),
        (1, 2, 2, 8, 30, 50),
        (2, 0, 10, 10, 50, 54),
        (4, 1, 6, 6, 58, 40),
    ]
    return torch.tensor(rows, dtype=torch.float32)


def in_parts(compute, size: int) -> list[dict[str, Tensor]]:
    """What `size` processes compute: a first pass notes the sums that each asks for, a second one gets the totals."""
    asked: list[list[Tensor]] = [[] for _ in range(size)]
    for rank in range(size):
        with summing(lambda value, rank=rank: asked[rank].append(value) or value, size):
            compute(rank)
    parts = []
    for rank in range(size):
        totals = iter([torch.stack(values).sum(0) for values in zip(*asked, strict=True)])
        with summing(lambda value, totals=totals: next(totals), size):
            parts.append(compute(rank))
    return parts


@pytest.mark.parametrize("size", [2, 3])
def test_detection_terms_of_the_parts_add_up(size: int) -> None:
    loss, raw, boxes = DetectionLoss(CLASSES, STRIDES), maps(BATCH, 1), targets()

    def part(rank: int) -> dict[str, Tensor]:
        images = list(range(BATCH))[rank::size]
        own = boxes[[int(row[0]) in images for row in boxes]].clone()
        own[:, 0] = torch.tensor([float(images.index(int(row[0]))) for row in own])
        return loss([(box[rank::size], score[rank::size]) for box, score in raw], own, (64, 64))

    whole = loss(raw, boxes, (64, 64))
    found = in_parts(part, size)
    for name, term in whole.items():
        assert float(sum(terms[name] for terms in found)) == pytest.approx(float(term), rel=1e-5)
        assert float(sum(terms[name] for terms in map(part, range(size)))) != pytest.approx(
            float(term), rel=0.05
        )


@pytest.mark.parametrize("size", [2, 3])
def test_distillation_of_the_parts_adds_up(size: int) -> None:
    student, teacher = maps(BATCH, 1), maps(BATCH, 2)
    teacher[1] = (teacher[1][0] * 0.01 + 5, teacher[1][1])  # hardly varies: the floor counts

    def part(rank: int) -> dict[str, Tensor]:
        shares = [[(box[rank::size], score[rank::size]) for box, score in one] for one in (student, teacher)]
        return {"distillation": distillation_loss(*shares)}

    found = sum(float(terms["distillation"]) for terms in in_parts(part, size))
    assert found == pytest.approx(float(distillation_loss(student, teacher)), rel=1e-5)


def test_a_process_alone_sums_its_own() -> None:
    value = torch.tensor(3.0, requires_grad=True)
    assert sum_over_processes(value) is value
    assert num_processes() == 1
    with summing(lambda value: 2 * value, 4):
        assert float(sum_over_processes(value)) == 6
        assert not sum_over_processes(value).requires_grad
        assert num_processes() == 4
    assert num_processes() == 1
