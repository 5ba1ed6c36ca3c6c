"""Steps in parts: equal to those of the whole batch, taken by themselves where memory is used up, saved and resumed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from shared_training import train
from test_shared_training import assert_close
from test_training_resume import Stop, assert_equal, everything, network, new_state, noisy_batches, seed_all
from torch import nn

from core.errors import ResourceError
from core.processes import num_processes
from training import TrainingOptions, TrainingState, train_epochs
from training.accumulation import Accumulation

STEPS = 4
ERRORS = [
    RuntimeError("could not create a primitive"),
    torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"
    ),
    MemoryError(),
]


def mean_error(raw: torch.Tensor, targets: torch.Tensor, size: Any) -> dict[str, torch.Tensor]:
    """A mean over the images, as a user's own loss has it."""
    return {"error": (raw - targets).square().mean() / num_processes()}


class Memory:
    """A loss with memory for so many images, from a step on; the error comes forward or in the backward pass."""

    def __init__(self, images: int, error: Exception, step: int = 0, backward: bool = False) -> None:
        self.images, self.error, self.step, self.backward = images, error, step, backward
        self.state: Any = None
        self.calls: list[int] = []

    def __call__(self, raw: torch.Tensor, targets: torch.Tensor, size: Any) -> dict[str, torch.Tensor]:
        self.calls.append(len(raw))
        if len(raw) > self.images and self.state.step >= self.step:
            if not self.backward:
                raise self.error
            raw.register_hook(self.fail)
        return mean_error(raw, targets, size)

    def fail(self, _gradient: torch.Tensor) -> None:
        raise self.error


def run(state: TrainingState, loss: Any = mean_error, stop_at: int | None = None) -> Any:
    """Train on batches of all random generators; the state after, or after a step."""
    if isinstance(loss, Memory):
        loss.state = state
    seen: list[Any] = []

    def after_step(state: TrainingState) -> None:
        if state.step == stop_at:
            seen.append(copy.deepcopy(state.state_dict()))
            raise Stop

    try:
        for _ in train_epochs(state, noisy_batches, STEPS, loss, after_step):
            pass
    except Stop:
        return seen[0]
    return everything(state)


def fresh(seed: int = 0, **changes: Any) -> TrainingState:
    model = network(seed)
    seed_all()
    return new_state(model, **changes)


# -- equal to the whole batch


@pytest.mark.parametrize("kind", ["quantized", "sampled"])
@pytest.mark.parametrize("micro_batch", [1, 3, 4])  # 3: parts of 3, 3 and 2 images
def test_parts_are_the_whole_batch_for_a_quantized_network(micro_batch: int, kind: str) -> None:
    """Weights, learned scales, average, losses and gradient norms, within the rounding of other sums: 1e-5 of the
    largest magnitude of each tensor. The loss is divided by a sum over the batch, distillation by variances of it."""
    found, wanted = train(kind, micro_batch=micro_batch).state_dict(), train(kind).state_dict()
    assert_close(found, wanted)
    assert wanted["accumulation"] == {"configured": None, "micro_batch": None}
    changed = [n for n, v in found["model"].items() if not torch.equal(v, wanted["model"][n])]
    assert changed  # it was another computation


def test_batch_norm_sees_each_part_once_by_hand() -> None:
    """running <- 0.9 running + 0.1 mean(part), for each of two parts; the first pass leaves no trace."""
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1))
    images = torch.arange(16.0).reshape(4, 1, 2, 2)
    options = TrainingOptions(epochs=1, micro_batch=2, ema_decay=0.0)
    state = TrainingState(model, options)
    list(train_epochs(state, lambda epoch, samples: [(images, images)], 1, mean_error))
    norm: Any = model[0]
    assert float(norm.running_mean) == pytest.approx(0.9 * (0.1 * 3.5) + 0.1 * 11.5)
    assert int(norm.num_batches_tracked) == 2


def test_as_many_parts_as_needed_and_none_too_small() -> None:
    images = torch.arange(7.0).reshape(7, 1, 1, 1)
    for micro_batch, sizes in {None: [7], 9: [7], 7: [7], 6: [4, 3], 3: [3, 2, 2], 1: [1] * 7}.items():
        parts = Accumulation(micro_batch).parts(images, 10 * images)
        assert [len(some) for some, _ in parts] == sizes
        assert torch.equal(torch.cat([some for some, _ in parts]), images)
        assert all(torch.equal(targets, 10 * some) for some, targets in parts)


# -- memory that is used up


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_step_without_memory_is_taken_again_in_parts(
    error: Exception, backward: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """From the first step on it is the training with that micro-batch, bit for bit: dropout and batches as well."""
    wanted = run(fresh(micro_batch=2))
    found = run(fresh(), Memory(2, error, backward=backward))
    assert found.pop("accumulation") == {"configured": None, "micro_batch": 2}
    assert wanted.pop("accumulation") == {"configured": 2, "micro_batch": 2}
    assert_equal(found, wanted)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "the memory does not suffice for step 0 (" in lines[0]
    assert "are taken with micro_batch=2 (images in memory at a time" in lines[0]


def test_memory_that_is_used_up_in_the_middle_and_a_resumed_training() -> None:
    """Steps, stop and rest are all steps, with the micro-batch that was found; and it is halved until it fits."""
    loss = Memory(1, ERRORS[0], step=5)
    wanted = run(fresh(), loss)
    assert wanted["accumulation"]["micro_batch"] == 1
    assert loss.calls[5:8] == [4, 2, 1]
    assert wanted["samples"] == 0
    stopped = run(fresh(), Memory(1, ERRORS[0], step=5), stop_at=7)
    resumed = fresh(seed=9)
    resumed.load_state_dict(stopped)
    loss = Memory(4, ERRORS[0])
    assert_equal(run(resumed, loss), wanted)
    assert set(loss.calls) == {1}  # without a second attempt at whole batches


def test_a_micro_batch_that_is_configured_anew_counts() -> None:
    stopped = run(fresh(micro_batch=2), Memory(1, ERRORS[0], step=2), stop_at=4)
    assert stopped["accumulation"] == {"configured": 2, "micro_batch": 1}
    for configured, expected in {2: 1, 3: 3, None: None}.items():
        resumed = fresh(micro_batch=configured)
        resumed.load_state_dict(stopped)
        assert resumed.accumulation.micro_batch == expected


def test_one_image_without_memory_ends_the_training_with_what_to_change() -> None:
    state = fresh()
    message = (
        r"does not suffice for step 3 with 1 image\(s\) at a time \(could not .*: resume with micro_batch=1"
    )
    with pytest.raises(ResourceError, match=message) as caught:
        run(state, Memory(0, ERRORS[0], step=3))
    assert caught.value.exit_code == 3
    assert (state.step, state.samples) == (3, 3 * 4)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    loss = Memory(2, RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(fresh(), loss)
    assert loss.calls == [4]


def test_a_bad_step_in_parts_is_skipped() -> None:
    def broken(raw: torch.Tensor, targets: torch.Tensor, size: Any) -> dict[str, torch.Tensor]:
        factor = math.nan if state.step == 1 else 1.0
        return {"error": mean_error(raw, targets, size)["error"] * factor}

    state = fresh(micro_batch=1)
    run(state, broken)
    assert [record.step for record in state.records] == [0, *range(2, 12)]
    assert all(bool(torch.isfinite(value).all()) for value in state.model.state_dict().values())
