"""One of several processes, the last of which runs out of memory in the middle of a training: python lacking_memory.py.

Prints a line for every case in which the training is, bit for bit, the one whose micro-batch was set from that step on;
then the process has no memory for a single image.
"""

from __future__ import annotations

import sys
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from shared_training import EPOCHS, STEPS, batches, equal, loss, state_of
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from core.errors import OctetError
from training import TrainingState, shared_step, train_epochs
from training.team import Team, join_team

CASES = [  # kind, where, and for how many images there is memory
    ("float", "forward", 1),
    ("float", "loss", 2),
    ("float", "backward", 1),
    ("float", "first layer", 2),
    ("quantized", "forward", 2),
    ("quantized", "loss", 1),
    ("quantized", "backward", 2),
    ("quantized", "first layer", 1),
]


class Memory:
    """Fails like an allocator in the last process, after the first epoch, for more than `limit` images."""

    def __init__(self, state: TrainingState, team: Team, where: str, limit: int) -> None:
        self.state, self.where, self.limit = state, where, limit
        self.is_scarce = team.rank == team.size - 1
        self.num_images = 0
        parameters = [p for p in state.model.parameters() if p.ndim == 4 and p.requires_grad]
        parameters[0].register_hook(partial(self.take, "first layer"))
        modules = [m for m in state.model.modules() if not list(m.children())]
        modules[-1].register_forward_pre_hook(lambda _, inputs: self.count(inputs[0]))

    def count(self, activation: Tensor) -> None:
        self.num_images = len(activation)
        self.take("forward")

    def loss(self, raw: Any, targets: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        terms = loss(raw, targets, size)
        self.take("loss")
        if raw.requires_grad:
            raw.register_hook(partial(self.take, "backward"))
        return terms

    def take(self, where: str, _gradient: Tensor | None = None) -> None:
        if (
            self.is_scarce
            and where == self.where
            and self.state.step >= STEPS
            and self.num_images > self.limit
        ):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


def trained(
    kind: str,
    team: Team,
    where: str = "nowhere",
    limit: int = 0,
    micro_batch: int | None = None,
    last: int = EPOCHS,
    earlier: Any = None,
) -> dict[str, Any]:
    state = state_of(kind, team, micro_batch)
    if earlier is not None:
        state.load_state_dict(deepcopy(earlier))  # the optimizer goes on with the tensors that it is given
    memory = Memory(state, team, where, limit)

    for _ in train_epochs(state, partial(batches, team), STEPS, memory.loss):
        if state.epoch == last:
            break
    return state.state_dict()


def main() -> None:
    torch.set_num_threads(1)
    # a bucket of its own for every parameter, so that some are exchanged when one fails
    shared_step.DistributedDataParallel = partial(DistributedDataParallel, bucket_cap_mb=1e-4)  # type: ignore[assignment, misc]
    team = join_team()
    try:
        with team.reporting():
            before = {kind: trained(kind, team, last=1) for kind in ("float", "quantized")}
            wanted: dict[Any, Any] = {}
            for kind, where, limit in CASES:
                if (kind, limit) not in wanted:
                    wanted[kind, limit] = trained(kind, team, micro_batch=limit, earlier=before[kind])
                    assert wanted[kind, limit].pop("accumulation")["micro_batch"] == limit
                found = trained(kind, team, where, limit)
                assert found.pop("accumulation") == {"configured": None, "micro_batch": limit}
                assert equal(found, wanted[kind, limit]), (kind, where, limit)
                print("equal:", kind, where, limit, file=sys.stderr, flush=True)
            trained("float", team, "backward", 0)
    except OctetError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
