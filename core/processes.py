"""Sums over the processes that take one training step together.

A loss divides by a sum over the batch: of target scores, of a teacher's variances. Where several processes share the
batch, these sums have to be those of all of them, or the step would not be that of the whole batch. The training loop
says how to sum; everywhere else a process is alone, and a sum is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

Sum = Callable[[Tensor], Tensor]
_active: list[tuple[Sum, int]] = []


@dataclass(frozen=True)
class BatchPart:
    """Which images of a step's batch are in memory: those of one process, or fewer.

    Attributes:
        step: number of the step, from 0.
        places: of the images, in their order, among those of the whole batch.
        num_images: of the whole batch, over all processes.
    """

    step: int
    places: range
    num_images: int


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of the processes' values; no gradient goes to the other processes."""
    return _active[-1][0](value.detach()) if _active else value


def num_processes() -> int:
    """How many processes take this step together; each one's terms are its part of the terms of the whole batch."""
    return _active[-1][1] if _active else 1


@contextmanager
def summing(function: Sum, size: int) -> Iterator[None]:
    """Let sums in the block be those of `size` processes, all of which run it with the same calls."""
    _active.append((function, size))
    try:
        yield
    finally:
        _active.pop()
