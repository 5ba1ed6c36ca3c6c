"""The training loop: schedule, average and steps by their formulas, learning, divergence, extensions, resuming."""

import copy
import math

import pytest
import torch
from torch import nn

from core.errors import DivergenceError
from training import TrainingOptions, TrainingState, train_epochs
from training.average import ModelAverage
from training.schedule import rate_factor

STEPS = 4


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))


def batches(epoch, samples=0):
    """Images and regression targets that depend on the epoch."""
    for step in range(samples // 4, STEPS):
        images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(100 * epoch + step))
        yield images, images.mean(1, keepdim=True).repeat(1, 2, 1, 1)


def squared_error(raw, targets, size):
    return {"error": (raw - targets).square().mean()}


def options(**changes):
    return TrainingOptions(**{"epochs": 3, "learning_rate": 1e-3, "warmup_fraction": 0.0, **changes})


def train(model, data=batches, loss=squared_error, **changes):
    *_, state = train_epochs(TrainingState(model, options(**changes)), data, STEPS, loss)
    return state


def values_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# -- formulas


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.1),
        (4, 0.5),
        (9, 1.0),
        (10, 1.0),
        (55, 0.5),
        (32.5, 0.5 + 0.5 * math.sqrt(0.5)),
        (100, 0.0),
        (150, 0.0),
    ],
)
def test_learning_rate_by_hand(step, factor):
    """100 steps, 10 of warm-up, down to 0: half way along the cosine at 55, a quarter at 32.5."""
    assert rate_factor(step, 100, 0.1, 0.0) == pytest.approx(factor, abs=1e-6)


def test_learning_rate_ends_at_the_final_fraction_and_starts_without_warmup():
    assert rate_factor(100, 100, 0.1, 0.05) == pytest.approx(0.05)
    assert rate_factor(0, 100, 0.0, 0.05) == 1.0
    factors = [rate_factor(step, 40, 0.25, 0.01) for step in range(40)]
    assert factors[:10] == sorted(factors[:10])
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert max(factors) == 1.0


def test_average_by_hand():
    """decay_k = 0.9 (1 - exp(-k / 2)); average <- decay_k average + (1 - decay_k) value."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    average = ModelAverage(model, decay=0.9, warmup=2.0)
    expected = 1.0
    for update, value in enumerate((2.0, 4.0, -1.0), start=1):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update(model)
        decay = 0.9 * (1 - math.exp(-update / 2.0))
        expected = decay * expected + (1 - decay) * value
        assert float(average.model.weight) == pytest.approx(expected, rel=1e-6)
    assert average.updates == 3
    assert not average.model.weight.requires_grad


def test_average_without_warmup_and_of_integer_buffers():
    model = nn.BatchNorm1d(2)
    average = ModelAverage(model, decay=0.5, warmup=0.0)
    model.num_batches_tracked.fill_(7)
    model.running_mean.fill_(1.0)
    average.update(model)
    assert int(average.model.num_batches_tracked) == 7
    assert average.model.running_mean.tolist() == [0.5, 0.5]
    assert not average.model.training


class Shared(nn.Module):
    """Two layers with one weight, a buffer that is not saved, and one of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.register_parameter("absent", None)
        self.register_buffer("offset", torch.zeros(2), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def test_average_of_what_is_saved_each_tensor_once():
    """average <- (average + value) / 2 for a weight that two layers share, and for one that replaces another."""
    model = Shared()
    average = ModelAverage(model, decay=0.5, warmup=0.0)
    first = model.first.weight.detach().clone()
    with torch.no_grad():
        model.first.weight.copy_(first + 4.0)
        model.offset.fill_(8.0)
        model.count.fill_(3)
    model.scale = nn.Parameter(torch.tensor(3.0))
    average.update(model)
    kept = average.model
    torch.testing.assert_close(kept.first.weight, first + 2.0)
    assert kept.second.weight is kept.first.weight
    assert (float(kept.scale), int(kept.count)) == (2.0, 3)
    assert kept.offset.tolist() == [0.0, 0.0]
    other = Shared()  # another model of the same form
    average.update(other)
    torch.testing.assert_close(kept.first.weight, (first + 2.0 + other.first.weight) / 2)
    assert (float(kept.scale), int(kept.count)) == (1.5, 0)


def test_a_step_by_hand():
    """AdamW's first step on one weight: w (1 - rate * decay) - rate * sign(gradient), for a gradient far above eps."""
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(0.5)
    data = [(torch.ones(1, 1, 1, 1), torch.zeros(1))]
    state = TrainingState(model, options(epochs=1, learning_rate=0.1, weight_decay=0.3, ema_decay=0.0))
    list(train_epochs(state, lambda epoch, samples: data, 1, lambda raw, targets, size: {"value": raw.sum()}))
    assert float(model.weight.detach()) == pytest.approx(2.0 * (1 - 0.1 * 0.3) - 0.1)
    assert float(model.bias.detach()) == pytest.approx(0.5 - 0.1)  # one axis: no decay
    record = state.records[0].as_dict()
    assert (record["value"], record["total"], record["learning_rate"]) == (2.5, 2.5, 0.1)
    assert record["gradient_norm"] == pytest.approx(1.0)  # the weight's alone


# -- learning


def test_float_training_learns():
    state = train(network(), epochs=25, ema_decay=0.0, learning_rate=1e-2)
    losses = [record.losses["total"] for record in state.records]
    assert sum(losses[-STEPS:]) < 0.1 * sum(losses[:STEPS])
    assert state.averaged is state.model
    assert (state.step, state.epoch) == (25 * STEPS, 25)


def test_the_model_is_in_training_mode_in_steps_only():
    model = network()
    seen = []

    def loss(raw, targets, size):
        seen.append((model.training, size))
        return squared_error(raw, targets, size)

    for _ in train_epochs(TrainingState(model, options(epochs=2)), batches, STEPS, loss):
        assert not model.training
    assert seen == [(True, (8, 8))] * 2 * STEPS


class Penalty:
    """An extension with a parameter of its own, a loss on it, and figures; it notes what the loop calls."""

    def __init__(self, model):
        self.network, self.offset = model, model.offset
        self.calls = []
        self.parts = []

    def parameter_groups(self):
        return [{"name": "offset", "params": [self.offset], "peak": 0.5, "weight_decay": 0.0}]

    def losses(self, outputs, images, progress, part):
        self.parts.append((part.step, part.places, part.num_images))
        return outputs, {"penalty": (self.offset - 3.0).square()}

    def after_step(self, progress):
        self.calls.append(progress)

    def after_epoch(self, average):
        self.calls.append(average)
        return {"offset": float(self.offset.detach())}

    def state_dict(self):
        return {"calls": len(self.calls)}

    def load_state_dict(self, state):
        self.calls = [None] * state["calls"]


def test_an_extension_adds_groups_terms_and_figures():
    model = network()
    model.offset = nn.Parameter(torch.zeros(()))
    extension = Penalty(model)
    state = TrainingState(model, options(epochs=2), extension)
    list(train_epochs(state, batches, STEPS, squared_error))
    average = state.average.model
    assert extension.calls == [0, 1 / 8, 2 / 8, 3 / 8, average, 4 / 8, 5 / 8, 6 / 8, 7 / 8, average]
    assert extension.parts == [(step, range(4), 4) for step in range(2 * STEPS)]
    assert [group["name"] for group in state.optimizer.param_groups] == ["weights", "biases", "offset"]
    assert not any(model.offset is p for group in state.optimizer.param_groups[:2] for p in group["params"])
    first = state.records[0].losses
    assert first["penalty"] == 9.0
    assert first["total"] == pytest.approx(first["error"] + 9.0)
    figures = {record.step: record.figures for record in state.records if record.figures}
    assert list(figures) == [STEPS - 1, 2 * STEPS - 1]
    assert figures[2 * STEPS - 1] == {"offset": float(model.offset.detach())}
    assert 1.0 < float(model.offset.detach()) < 5.0  # its own rate of 0.5, not 0.001
    resumed = Penalty(model)
    TrainingState(model, options(), resumed).load_state_dict(state.state_dict())
    assert len(resumed.calls) == 10


# -- divergence


def test_a_loss_that_is_not_finite_names_step_terms_and_remedy():
    def breaking(raw, targets, size):
        breaking.calls += 1
        return {"fine": raw.square().mean(), "bad": raw.mean() * (math.inf if breaking.calls > 2 else 1.0)}

    breaking.calls = 0
    message = r"loss is not finite at step 2 \(.*'bad': -?(inf|nan).*lower the learning rate \(now 0.001\)$"
    with pytest.raises(DivergenceError, match=message):
        train(network(), loss=breaking)


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights():
    """The square root's slope is infinite at 0, its value is not."""

    def steep(raw, targets, size):
        return {"error": (raw * 0.0).square().sum().sqrt()}

    model = network()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(DivergenceError, match=r"gradient is not finite at step 0"):
        train(model, loss=steep)
    assert equal(dict(model.named_parameters()), before)


def test_nothing_to_learn_from_is_an_error():
    with pytest.raises(ValueError, match="all loss terms are 0"):
        train(network(), task_weight=0.0)


# -- stopping and going on


@pytest.mark.parametrize("ema_decay", [0.999, 0.0])
def test_a_loaded_state_goes_on_as_if_undisturbed(tmp_path, ema_decay):
    choices = options(epochs=4, warmup_fraction=0.3, ema_decay=ema_decay)
    expected = train(network(), epochs=4, warmup_fraction=0.3, ema_decay=ema_decay)
    stopped = TrainingState(network(), choices)
    for state in train_epochs(stopped, batches, STEPS, squared_error):
        if state.epoch == 2:
            torch.save(copy.deepcopy(state.state_dict()), tmp_path / "state.pt")
            break
    resumed = TrainingState(network(9), choices)  # other weights: everything must come from the file
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    list(train_epochs(resumed, batches, STEPS, squared_error))
    assert (resumed.step, resumed.epoch) == (expected.step, expected.epoch) == (4 * STEPS, 4)
    assert equal(values_of(resumed.model), values_of(expected.model))
    assert equal(values_of(resumed.averaged), values_of(expected.averaged))


def test_a_finished_state_trains_no_further():
    state = train(network(), epochs=2)
    before = values_of(state.model)
    assert list(train_epochs(state, batches, STEPS, squared_error)) == []
    assert equal(values_of(state.model), before)
