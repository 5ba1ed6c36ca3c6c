"""Processes that work on one run together: `torchrun --nproc-per-node N train_qat.py ...`.

Calibration is shared among them: each process sees every N-th image, and their histograms add up exactly, so the scales
are the same for any N. All other stages run in the first process while the others wait.
"""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

Item = TypeVar("Item")
_PATIENCE = timedelta(days=30)  # the others wait for whole stages of the first


@dataclass(frozen=True)
class Team:
    """This process among `size`; `rank` counts from 0."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def gather(self, item: Item) -> list[Item]:
        """Every process's item, in the order of ranks, in every process."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        distributed.all_gather_object(items, item)
        return items

    def share(self, item: Item) -> Item:
        """The first process's item, in every process."""
        return self.gather(item)[0]

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.size > 1:
            distributed.barrier()


ALONE = Team()


def join_team() -> Team:
    """The team that torchrun's environment variables describe; without them this process is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Team()
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=_PATIENCE)
        atexit.register(distributed.destroy_process_group)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return Team(distributed.get_rank(), distributed.get_world_size())
