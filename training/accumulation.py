"""A step whose batch does not fit into memory at once: taken in parts, with the gradients added up.

The loss divides by sums over the whole batch (`core.processes`): of target scores, of a teacher's variances. So a step
in parts makes two passes over them. The first finds the sums, without gradients; the second computes every part's share
of the batch's loss and its gradients. They add up to those of the whole batch but for the order of additions, except
that BatchNorm layers in training normalise each part by itself.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from core.errors import ResourceError
from core.processes import summing
from training.shared_step import SharedStep

TargetsOf = Callable[[Any, int, int], Any]
"""(targets of a batch, begin, end) -> the targets of its images begin..end, as those of a batch of their own."""
_log = logging.getLogger(__name__)


def rows_of(targets: Any, begin: int, end: int) -> Any:
    """`TargetsOf` for tensors with one row per image; None stays None."""
    return None if targets is None else targets[begin:end]


class Accumulation:
    """How many images of a batch are in memory at once.

    Args:
        micro_batch: most images of one forward and backward pass, in each process; None for all of the batch.
        targets_of: see `TargetsOf`.
        shared: the step of several processes, which divide their shares into equally many parts; None alone.

    Attributes:
        configured: `micro_batch` as it was given; the attribute `micro_batch` is lowered where memory is used up.
    """

    def __init__(
        self, micro_batch: int | None, targets_of: TargetsOf = rows_of, shared: SharedStep | None = None
    ) -> None:
        self.configured = self.micro_batch = micro_batch
        self.targets_of = targets_of
        self.shared = shared

    def state_dict(self) -> dict[str, int | None]:
        """What the next step depends on."""
        return {"configured": self.configured, "micro_batch": self.micro_batch}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        """Restore what `state_dict` returned, unless another number has been configured since."""
        if state["configured"] == self.configured:
            self.micro_batch = state["micro_batch"]

    def parts(self, images: Tensor, targets: Any) -> list[tuple[Tensor, Any]]:
        """A batch in parts of at most `micro_batch` images that differ by one image at most."""
        bounds = [0]
        for sizes in torch.arange(len(images)).tensor_split(self._num_parts(len(images))):
            bounds.append(bounds[-1] + len(sizes))
        if len(bounds) == 2:
            return [(images, targets)]
        return [(images[begin:end], self.targets_of(targets, begin, end)) for begin, end in pairwise(bounds)]

    def halve(self, num_images: int, step: int, reason: str) -> None:
        """Halve the number of images in memory, after a step had no memory left; frees what it left behind.

        Args:
            num_images: of the batch, in this process.
            step: number of the step.
            reason: what the library said.

        Raises:
            ResourceError: one image at a time was too much.
        """
        before, largest = self._num_parts(num_images), self._largest(num_images)
        self.micro_batch = max(1, min(self.micro_batch or largest, largest) // 2)
        if self._num_parts(num_images) <= before:
            raise ResourceError(
                f"The memory does not suffice for step {step} with {-(-largest // before)} image(s) at a time "
                f"({reason}): resume with micro_batch=1 (train.micro_batch, qat.micro_batch), since a new process does "
                "not have what the attempts with more images have left in memory; or use smaller images "
                "(data.image_size), fewer data workers (data.workers), or more memory"
            )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _log.warning(
            "the memory does not suffice for step %d (%s): it and the steps after it are taken with "
            "micro_batch=%d (images in memory at a time; their gradients are added up)",
            *(step, reason, self.micro_batch),
        )

    def _num_parts(self, num_images: int) -> int:
        """As many in every process; each needs an image for every part."""
        if self.micro_batch is None:
            return 1
        parts = -(-self._largest(num_images) // self.micro_batch)
        return min(parts, num_images if self.shared is None else -self.shared.largest(-num_images))

    def _largest(self, num_images: int) -> int:
        return num_images if self.shared is None else self.shared.largest(num_images)


class BatchSums:
    """Sums over the parts of a batch (and over the processes), found in a first pass and given in a second.

    Args:
        num_parts: of this process.
        shared: the step of several processes; None alone.

    Attributes:
        values: the sums, in the order in which a part asks for them.
    """

    def __init__(self, num_parts: int, shared: SharedStep | None) -> None:
        self.shared = shared
        self.size = num_parts * (1 if shared is None else shared.team.size)
        self.values: list[Tensor] = []
        self._position = 0

    @contextmanager
    def finding(self) -> Iterator[None]:
        """A part of the first pass, without gradients."""
        self._position = 0
        with torch.no_grad(), summing(self._add, self.size):
            yield

    def share(self) -> None:
        """Between the passes: sums over this process's parts become those of all processes."""
        if self.shared is not None:
            self.values = [self.shared.exchanges.sum(value) for value in self.values]

    @contextmanager
    def giving(self) -> Iterator[None]:
        """A part of the second pass."""
        self._position = 0
        with summing(self._next, self.size):
            yield

    def _add(self, value: Tensor) -> Tensor:
        if self._position == len(self.values):
            self.values.append(torch.zeros_like(value))
        self.values[self._position] = self.values[self._position] + value
        return self._next(value)

    def _next(self, _value: Tensor) -> Tensor:
        self._position += 1
        return self.values[self._position - 1]
