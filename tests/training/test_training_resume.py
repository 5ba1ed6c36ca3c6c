"""Exact resume: N steps are k steps, a stop, and the rest, bit for bit; saved states that are damaged."""

import copy
import random
from dataclasses import asdict

import numpy as np
import pytest
import torch
from test_training_loop import STEPS, options, squared_error
from torch import nn

from core.errors import StateError, WriteError
from training import Checkpoints, TrainingState, train_epochs
from training.random_states import random_states, restore_random_states

BATCH = 4


class Stop(Exception):  # noqa: N818 - a stop is no error
    """Ends a training in the middle."""


def network(seed=0):
    """With batch norm and dropout, so that a step depends on buffers and on random numbers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(8, 2, 1)
    )


def noisy_batches(epoch, samples):
    """Batches that draw from all random generators, as a user's own data set may."""
    for step in range(samples // BATCH, STEPS):
        images = torch.full((BATCH, 3, 8, 8), random.random() + epoch + 0.1 * step)
        images += torch.rand(images.shape) + float(np.random.rand())
        yield images, images.mean(1, keepdim=True).repeat(1, 2, 1, 1)


def everything(state):
    """All that a training consists of, times left out."""
    content = state.state_dict()
    content["records"] = [{**asdict(record), "seconds": 0.0} for record in state.records]
    return copy.deepcopy(content)


def assert_equal(first, second, path="state"):
    assert type(first) is type(second), path
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), path
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_equal(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_equal(one, other, f"{path}[{index}]")
    else:
        assert first == second, path


def run(state, checkpoints=None, stop_at=None):
    """Train to the end, or save after a step and stop there."""

    def after_step(state):
        if state.step == stop_at:
            checkpoints.save(state.state_dict())
            raise Stop

    for _ in train_epochs(state, noisy_batches, STEPS, squared_error, after_step):
        pass
    return state


def new_state(model, **changes):
    changes = {"epochs": 3, "warmup_fraction": 0.3, **changes}
    return TrainingState(model, options(**changes))


def seed_all():
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)


@pytest.mark.parametrize("ema_decay", [0.999, 0.0])
@pytest.mark.parametrize("stop_at", [1, 3, 4, 6, 11, 12])
def test_steps_stop_and_rest_are_all_steps(tmp_path, stop_at, ema_decay):
    """Inside an epoch, at its end, and after the last step of all."""
    model = network()
    seed_all()
    expected = everything(run(new_state(model, ema_decay=ema_decay)))
    model = network()
    seed_all()
    checkpoints = Checkpoints(tmp_path / "states")
    with pytest.raises(Stop):
        run(new_state(model, ema_decay=ema_decay), checkpoints, stop_at)
    resumed = new_state(network(9), ema_decay=ema_decay)  # other weights: everything must come from the file
    resumed.load_state_dict(checkpoints.load())
    assert resumed.step == stop_at
    assert_equal(everything(run(resumed)), expected)
    assert resumed.step == 3 * STEPS


def test_random_states_survive_a_file(tmp_path):
    seed_all()
    np.random.standard_normal()  # leaves a second value for later
    torch.save(random_states(), tmp_path / "states.pt")
    drawn = [
        random.random(),
        random.gauss(0, 1),
        np.random.standard_normal(),
        np.random.rand(),
        torch.rand(3),
    ]
    seed_all()
    restore_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    again = [
        random.random(),
        random.gauss(0, 1),
        np.random.standard_normal(),
        np.random.rand(),
        torch.rand(3),
    ]
    assert_equal(again, drawn)


def test_a_resumed_state_takes_the_learning_rate_of_now(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(Stop):
        run(new_state(network()), checkpoints, 5)
    lowered = new_state(network(), learning_rate=1e-4, weight_decay=0.0)
    lowered.load_state_dict(checkpoints.load())
    assert [(group["peak"], group["weight_decay"]) for group in lowered.optimizer.param_groups] == [
        (1e-4, 0.0)
    ] * 2
    run(lowered)
    rates = [record.learning_rate for record in lowered.records]
    assert max(rates[5:]) < 1e-4 < max(rates[:5])


# -- saved states


def names(folder):
    return sorted(path.name.split("-")[0] for path in folder.iterdir())


def test_the_last_two_states_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "states")
    assert checkpoints.load() is None
    for step in range(4):
        checkpoints.save({"step": step})
    assert names(tmp_path / "states") == ["000003", "000004"]
    assert checkpoints.load() == {"step": 3}


DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "garbage": lambda content: b"\x00" * len(content),
    "one bit": lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_gives_way_to_the_one_before(tmp_path, caplog, damage):
    checkpoints = Checkpoints(tmp_path)
    for step in range(2):
        newest = checkpoints.save({"step": step, "values": torch.arange(100)})
    newest.write_bytes(DAMAGES[damage](newest.read_bytes()))
    assert checkpoints.load()["step"] == 0
    assert f"{newest} is damaged: the state before it is taken" in caplog.text
    checkpoints.save({"step": 2})
    assert checkpoints.load() == {"step": 2}


def test_only_damaged_states_are_an_error(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    paths = [checkpoints.save({"step": step}) for step in range(2)]
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(
        StateError, match=r"all saved states in .* are damaged .*remove this folder"
    ) as caught:
        checkpoints.load()
    assert caught.value.exit_code == 3


def test_a_state_that_cannot_be_written_leaves_the_earlier_ones(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"step": 0})

    def full(content, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(WriteError, match="No space left on device"):
        checkpoints.save({"step": 1})
    assert names(tmp_path) == ["000001"]
    assert checkpoints.load() == {"step": 0}
