"""Sums over the processes in a training step, which a process that has run out of memory can still take part in.

When one process runs out of memory, the others already wait for it in the next sum. So it runs the step once more
with a batch that fits: sums that it has taken part in return what they returned then, and those after them take place.
The numbers are of no use, but every process comes to the end of the step, where they agree to take it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


class Exchanges:
    """The sums of one attempt at a step; all processes ask for the same ones in the same order.

    Args:
        group: the processes.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.begin()

    def begin(self) -> None:
        """Start an attempt."""
        self._answers: list[Tensor] = []
        self._position = 0
        self._is_inside = self._has_last_bucket = False

    def repeat(self) -> None:
        """Start the same attempt again: the sums that are done return what they returned before."""
        self._position = 0

    @property
    def can_complete(self) -> bool:
        """Whether the sums that are left can be completed by repeating the attempt.

        Not after an error within a sum, nor after the last bucket, which DistributedDataParallel follows up with an
        exchange of its own.
        """
        return not (self._is_inside or self._has_last_bucket)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, without a gradient."""
        if self._position == len(self._answers):
            answer = value.detach().clone()
            self._is_inside = True
            distributed.all_reduce(answer, group=self.group)
            self._is_inside = False
            self._answers.append(answer)
        self._position += 1
        return self._answers[self._position - 1].clone()

    def sum_bucket(self, bucket: Any) -> Any:
        """DistributedDataParallel's communication hook: the sum of some parameters' gradients, in the background.

        Args:
            bucket: `torch.distributed.GradBucket`.

        Returns:
            Future of a tensor. In a repeated attempt, of the process's own gradients.
        """
        gradients = bucket.buffer()
        self._position += 1
        if self._position <= len(self._answers):
            future: Any = torch.futures.Future(devices=[gradients.device] if gradients.is_cuda else None)
            future.set_result(gradients)
            return future
        self._is_inside = True
        work = distributed.all_reduce(gradients, group=self.group, async_op=True)
        self._is_inside, self._has_last_bucket = False, bucket.is_last()
        self._answers.append(gradients.new_empty(0))
        return work.get_future().then(lambda done: done.value()[0])
