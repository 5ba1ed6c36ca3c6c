"""Steps that are not finite: skipped, traced to a layer, and an error where they do not end."""

import copy
import math

import pytest
import torch
from test_training_loop import STEPS, options, squared_error, train
from torch import nn

from core.errors import DivergenceError
from training import TrainingState, check_finite, not_finite, train_epochs


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))


def batches_with(bad, value):
    """Batches of which some have an image that is not finite."""

    def batches(epoch, samples):
        for step in range(samples // 4, STEPS):
            images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(100 * epoch + step))
            targets = images.mean(1, keepdim=True).repeat(1, 2, 1, 1)
            if STEPS * epoch + step in bad:
                images[0, 0, 0, 0] = value
            yield images, targets

    return batches


@pytest.mark.parametrize("bad", [{0}, {5}, {2, 3, 4}, {11}])
def test_a_bad_step_changes_nothing_but_the_count_of_steps(bad, caplog):
    """By hand: the good batches alone, trained at the rates of their steps; buffers of batch norm included."""
    model = network()
    state = train(model, batches_with(bad, math.nan))
    assert state.step == 3 * STEPS
    assert [record.step for record in state.records] == [step for step in range(3 * STEPS) if step not in bad]
    assert caplog.text.count("loss is not finite at step") == len(bad)
    assert f"step {min(bad)}, first in the images: step skipped" in caplog.text
    by_hand = TrainingState(network(), options())
    for epoch in range(3):
        by_hand.model.train()
        for index, batch in enumerate(batches_with((), 0.0)(epoch, 0)):
            if STEPS * epoch + index not in bad:
                by_hand.epoch, by_hand.samples = epoch, 0
                steps = train_one(by_hand, batch)
                assert steps == 1
            else:
                by_hand.step += 1
    found, expected = model.state_dict(), by_hand.model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    averages = state.average.model.state_dict(), by_hand.average.model.state_dict()
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in expected)


def train_one(state, batch):
    """One step of the loop, as part of an epoch that never ends."""

    class Enough(Exception):  # noqa: N818
        pass

    def stop(_):
        raise Enough

    before = state.step
    with pytest.raises(Enough):
        list(train_epochs(state, lambda epoch, samples: [batch], STEPS, squared_error, stop))
    return state.step - before


def test_the_fourth_bad_step_in_a_row_is_an_error_about_the_first():
    model = network()
    before = copy.deepcopy(model.state_dict())
    message = r"^loss is not finite at step 0 \(.*\), first in the images, nor in the 3 steps after it: lower"
    with pytest.raises(DivergenceError, match=message):
        train(model, batches_with(set(range(12)), math.inf))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_layer_that_overflows_is_named(caplog):
    """Finite weights and images; the sum of the last layer's products is not."""
    model = network()
    with torch.no_grad():
        model[3].weight.fill_(3e38)
    with pytest.raises(DivergenceError, match=r"first in the output of 3, nor"):
        train(model)
    with torch.no_grad():
        model[1].bias[2] = math.nan
    with pytest.raises(DivergenceError, match=r"first in 1\.bias, nor"):
        train(model)


def test_the_parameter_whose_gradient_overflows_is_named():
    """The slope of the square root is infinite at 0; only the first layer is in its way."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.early, self.late = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

        def forward(self, images):
            return (self.early(images) * 0.0).square().sum().sqrt() + self.late(images).square().mean()

    torch.manual_seed(0)
    message = r"gradient is not finite at step 0 \(.*\), first in the gradient of early.bias, nor"
    with pytest.raises(DivergenceError, match=message):
        train(Two(), loss=lambda raw, targets, size: {"error": raw})


def test_a_state_that_is_not_finite_is_not_saved_unless_it_never_was():
    state = {
        "model": {"mask": torch.tensor([-math.inf]), "weight": torch.ones(2)},
        "moments": [torch.ones(1)],
    }
    never = not_finite(state)
    assert never == {"model.mask"}
    check_finite(state, never)
    state["moments"][0][0] = math.nan
    with pytest.raises(DivergenceError, match=r"moments\.0 is not finite \(1 tensors"):
        check_finite(state, never)
