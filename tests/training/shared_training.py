"""One of several processes that train together: python shared_training.py KIND FOLDER STOP [MICRO LIMIT].

KIND is `float` (with BatchNorm), `quantized` (learned scales, a teacher, dampening), or `sampled`, where the teacher
sees three of the eight images of a batch. The state is saved in FOLDER as RANK.pt; STOP is a number of epochs after
which the process ends, `all`, or `resume` to go on from FOLDER/0.pt. MICRO is the micro-batch (0 for none),
and LIMIT the images for which the last process has memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quant"))
from quant_networks import small_images, small_net, small_quantized

from core.processes import sum_over_processes
from quant import FineTuningOptions, QuantizationAware
from training import TrainingOptions, TrainingState, train_epochs
from training.team import ALONE, Team, join_team

BATCH, STEPS, EPOCHS = 8, 3, 3
SEED = 1200  # of images on which no value lies so near between two codes that the order of sums decides


def with_norm() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )


def loss(raw: Any, targets: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """Normalised by a sum over the batch, as the detection loss is."""
    total = sum_over_processes(targets.abs().sum()).clamp(min=1.0)
    output = raw if raw.shape[-1] == targets.shape[-1] else nn.functional.interpolate(raw, targets.shape[-2:])
    return {"error": (output - targets).square().sum() / total}


def state_of(kind: str, team: Team, micro_batch: int | None) -> TrainingState:
    options = TrainingOptions(
        epochs=EPOCHS, learning_rate=1e-3, warmup_fraction=0.0, clip_norm=1.0, micro_batch=micro_batch
    )
    if kind == "float":
        model = with_norm()
        if team.rank:  # the first process's model is that of all
            with torch.no_grad():
                model[0].weight.zero_()
        return TrainingState(model, options, team=team)
    student = small_quantized()
    added = FineTuningOptions(
        scale_learning_rate=1e-3, distill_images=3 / BATCH if kind == "sampled" else 1.0, dampen_weight=0.1
    )
    return TrainingState(student, options, QuantizationAware(student, added, small_net()), team)


def batches(team: Team, epoch: int, samples: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A process's share of images that are the same for any number of processes."""
    for step in range(samples // BATCH, STEPS):
        images = small_images(BATCH, seed=SEED + 10 * epoch + step)[team.rank :: team.size]
        yield images, images.mean(1, keepdim=True).repeat(1, 4, 1, 1)


def train(
    kind: str,
    team: Team = ALONE,
    last: int = EPOCHS,
    earlier: dict[str, Any] | None = None,
    micro_batch: int | None = None,
    limit: int = BATCH,
) -> TrainingState:
    """Train up to a whole epoch."""

    def limited(raw: Any, targets: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        if team.rank == team.size - 1 and len(targets) > limit:
            raise RuntimeError("could not create a primitive")
        return loss(raw, targets, size)

    state = state_of(kind, team, micro_batch)
    if earlier is not None:
        state.load_state_dict(earlier)
    for _ in train_epochs(state, partial(batches, team), STEPS, limited):
        if state.epoch == last:
            break
    return state


def equal(a: Any, b: Any) -> bool:
    """Bit for bit, in any nesting; seconds and speeds aside."""
    if isinstance(a, dict):
        return set(a) == set(b) and all(
            equal(a[key], b[key]) for key in a if key not in ("seconds", "figures")
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def main() -> None:
    kind, folder, stop = sys.argv[1:4]
    micro, limit = map(int, sys.argv[4:] or (0, BATCH))
    torch.set_num_threads(1)
    team = join_team()
    with team.reporting():
        earlier = torch.load(Path(folder) / "0.pt", weights_only=True) if stop == "resume" else None
        team.wait()
        state = train(
            kind, team, EPOCHS if earlier or stop == "all" else int(stop), earlier, micro or None, limit
        )
        torch.save(state.state_dict(), Path(folder) / f"{team.rank}.pt")


if __name__ == "__main__":
    main()
