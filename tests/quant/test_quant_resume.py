"""Exact resume of fine-tuning at a step: weights, scales, average, optimizer and oscillations, bit for bit."""

import copy
from dataclasses import asdict

import pytest
import torch
from fine_tuning import STEPS, batches, new_state, squared_error
from quant_networks import small_net, small_quantized

from training import Checkpoints, train_epochs

OPTIONS = {
    "epochs": 3,
    "distill_weight": 1.0,
    "feature_weight": 0.5,
    "distill_images": 0.5,
    "dampen_weight": 0.01,
    "freeze_threshold": 0.001,
    "ema_warmup": 3.0,
}


class Stop(Exception):  # noqa: N818 - a stop is no error
    """Ends a fine-tuning in the middle."""


def new(learn_scales, seed=0):
    return new_state(small_quantized(seed, learn_scales=learn_scales), small_net(), **OPTIONS)


def flat(value, path=""):
    """Every leaf of a nested state by its path."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{path}.{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for index, item in enumerate(value) for k, v in flat(item, f"{path}[{index}]").items()}
    return {path: value}


def everything(state):
    content = {
        **state.state_dict(),
        "records": [{**asdict(record), "seconds": 0.0} for record in state.records],
    }
    return flat(copy.deepcopy(content))


@pytest.mark.parametrize("learn_scales", [True, False])
def test_steps_stop_and_rest_are_all_steps(tmp_path, learn_scales):
    straight = new(learn_scales)
    list(train_epochs(straight, batches, STEPS, squared_error))
    expected = everything(straight)
    assert any("log_scale" in name for name in expected)
    for stop_at in (STEPS, STEPS + 2):  # at the end of an epoch, and inside one
        checkpoints = Checkpoints(tmp_path / str(stop_at))

        def save_and_stop(state, checkpoints=checkpoints, stop_at=stop_at):
            if state.step == stop_at:
                checkpoints.save(state.state_dict())
                raise Stop

        with pytest.raises(Stop):
            list(train_epochs(new(learn_scales), batches, STEPS, squared_error, save_and_stop))
        resumed = new(learn_scales, seed=9)  # other weights and scales: everything must come from the file
        resumed.load_state_dict(checkpoints.load())
        list(train_epochs(resumed, batches, STEPS, squared_error))
        found = everything(resumed)
        assert found.keys() == expected.keys()
        assert [name for name, value in expected.items() if not same(value, found[name])] == []


def same(first, second):
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
