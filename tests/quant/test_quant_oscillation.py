"""Oscillating weights: the counting against a slow copy of the paper's algorithm, freezing, dampening, resuming."""

import copy
import math

import pytest
import torch
from fine_tuning import STEPS, batches, fine_tune, new_state, squared_error
from quant_networks import small_net, small_quantized
from torch import nn

from core.grid import Grid
from quant import Mode, insert, place, quantized_layers, set_mode
from quant.fake_quantize import WeightFakeQuantize
from quant.finetuning.oscillation import OscillationTracker, dampening_loss
from quant.layers import quantize_layer
from training import train_epochs


def one_layer(weights=(0.1, 0.1, 0.1, 0.1), bits=4, scale=0.1):
    """A convolution of one output channel whose grid has the given step."""
    layer = nn.Sequential(nn.Conv2d(len(weights), 1, 1, bias=False))
    quantize_layer(layer[0], 0, Grid(bits, symmetric=True), learned=True)
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor(weights).view(1, -1, 1, 1))
    quantizer = layer[0].weight_quantizer
    assert isinstance(quantizer, WeightFakeQuantize)
    quantizer.set_scale(torch.tensor([scale]), layer[0].weight)
    quantizer.mode = Mode.QUANTIZE
    return layer


def paper(histories, momentum, threshold):
    """Algorithm 1 of arXiv:2203.11086 for one weight after the other: (frequency, average, frozen at) of each."""
    results = []
    for integers in histories:
        frequency, average, direction, before, frozen = 0.0, float(integers[0]), 0, integers[0], None
        for now in integers[1:]:
            now = before if frozen is not None else now
            move = int(math.copysign(1, now - before)) if now != before else 0
            frequency = momentum * (move != 0 and move == -direction) + (1 - momentum) * frequency
            average = momentum * now + (1 - momentum) * average
            direction, before = move or direction, now
            if frozen is None and frequency > threshold:
                frozen = before = round(average)
        results.append((frequency, average, frozen))
    return results


@pytest.mark.parametrize("threshold", [1.0, 0.3, 0.11])
def test_counting_and_freezing_follow_the_paper(threshold):
    random = torch.Generator().manual_seed(3)
    steps = torch.randint(-1, 2, (60, 40), generator=random).cumsum(0).clamp(-7, 7)
    steps[:, 0] = torch.arange(60) % 2  # flips in every step
    steps[:, 1] = torch.arange(60).clamp(max=7)  # moves, but never back
    steps[:, 2] = torch.tensor([-7, 7] * 30)  # across the whole grid
    layer = one_layer([0.0] * 40)
    with torch.no_grad():
        layer[0].weight.copy_(steps[0].view(1, -1, 1, 1) * 0.1)
    tracker = OscillationTracker(layer, momentum=0.1)
    for integers in steps[1:]:
        with torch.no_grad():
            layer[0].weight.copy_(integers.view(1, -1, 1, 1) * 0.1 + 0.02)
        tracker.update(threshold)
    for index, (frequency, average, frozen) in enumerate(paper(steps.T.tolist(), 0.1, threshold)):
        assert float(tracker.frequency[index]) == pytest.approx(frequency, abs=1e-5), index
        assert bool(tracker.frozen[index]) == (frozen is not None), index
        if frozen is not None:
            assert float(layer[0].weight.flatten()[index]) == pytest.approx(0.1 * frozen, abs=1e-6)
        else:
            assert float(tracker.average[index]) == pytest.approx(average, abs=1e-4)
    assert not bool(tracker.frozen[1])
    assert bool(tracker.frozen[0]) == (threshold < 1.0)


def test_wide_grids_do_not_overflow():
    layer = one_layer((-1.27, 1.27), bits=8, scale=0.01)
    tracker = OscillationTracker(layer, momentum=0.5)
    for _ in range(3):
        with torch.no_grad():
            layer[0].weight.neg_()
        tracker.update()
    assert tracker.frequency.tolist() == [0.75, 0.75]  # the first move is no flip, the next two are


def test_frozen_weights_stay_on_their_integer_when_the_scale_moves():
    layer = one_layer((0.1, 0.2))
    tracker = OscillationTracker(layer)
    tracker.frozen[1] = True
    with torch.no_grad():
        layer[0].weight.add_(0.5)
        layer[0].weight_quantizer.log_scale.add_(math.log(2.0))
    tracker.update(threshold=1.0)
    torch.testing.assert_close(layer[0].weight.flatten(), torch.tensor([0.6, 2 * 0.2]))


def test_layers_that_are_off_are_left_alone():
    layer = one_layer()
    layer[0].weight_quantizer.mode = Mode.OFF
    tracker = OscillationTracker(layer)
    tracker.update(0.01)
    assert tracker.shares() == {}


def test_shares():
    tracker = OscillationTracker(one_layer())
    tracker.frequency.copy_(torch.tensor([0.0, 0.004, 0.2, 0.2]))
    tracker.frozen[3] = True
    assert tracker.shares() == {"share_oscillating": 0.25, "share_frozen": 0.25}


def test_dampening_is_the_squared_distance_to_the_grid():
    """Step 0.1, integers to 7: 0.13 is 0.03 off, 0.3 on the grid, 0.9 beyond it and -0.26 is 0.04 off."""
    layer = one_layer((0.13, 0.3, 0.9, -0.26))
    loss = dampening_loss(layer)
    assert float(loss.detach()) == pytest.approx(0.03**2 + 0.04**2, rel=1e-4)
    loss.backward()
    gradient = layer[0].weight.grad.flatten()
    torch.testing.assert_close(gradient, torch.tensor([0.06, 0.0, 0.0, 0.08]), atol=1e-6, rtol=1e-4)
    assert layer[0].weight_quantizer.log_scale.grad is None


# -- in the training loop

OPTIONS = {"epochs": 8, "learning_rate": 1e-2, "distill_weight": 0.0}


def train(**changes):
    model = small_quantized()
    return model, fine_tune(model, **{**OPTIONS, **changes})


def off_grid(model):
    """Mean distance of the weights to their grid points, in steps."""
    return float(dampening_loss(model).detach()) / sum(
        layer.weight.numel() for layer in quantized_layers(model).values()
    )


def test_shares_stand_on_the_last_step_of_each_epoch():
    _, state = train()
    with_figures = [record.step for record in state.records if record.figures]
    assert with_figures == [STEPS * (epoch + 1) - 1 for epoch in range(8)]
    shares = [record.figures["share_oscillating"] for record in state.records if record.figures]
    assert all(0.0 <= share <= 1.0 for share in shares)
    assert shares[-1] > 0.05
    assert state.records[-1].as_dict()["share_frozen"] == 0.0


def test_freezing_leaves_fewer_weights_that_flip():
    _, free = train()
    model, held = train(freeze_threshold=0.01)
    figures = held.records[-1].figures
    assert figures["share_frozen"] > 0.05
    assert figures["share_oscillating"] < 0.5 * free.records[-1].figures["share_oscillating"]
    weights = torch.cat([layer.weight.detach().flatten() for layer in quantized_layers(model).values()])
    steps = torch.cat(
        [
            layer.weight_quantizer.scale.view(-1, 1, 1, 1).expand_as(layer.weight).flatten()
            for layer in quantized_layers(model).values()
        ]
    )
    oscillation = held.extension.oscillation
    frozen = oscillation.frozen
    torch.testing.assert_close(
        weights[frozen] / steps[frozen], oscillation.target[frozen].float(), atol=1e-3, rtol=0
    )


def test_dampening_pulls_weights_to_the_grid():
    plain, _ = train(learning_rate=1e-3)
    pulled, state = train(learning_rate=1e-3, dampen_weight=1e4)
    assert off_grid(pulled) < 0.5 * off_grid(plain)
    terms = [record.losses["dampening"] for record in state.records]
    assert terms[0] == 0.0
    assert terms[1] > 0.0


def test_resuming_with_frozen_weights_gives_the_undisturbed_run(tmp_path):
    choices = {**OPTIONS, "epochs": 4, "freeze_threshold": 0.01}
    expected = fine_tune(small_quantized(), **choices)
    stopped = new_state(small_quantized(), **choices)
    for state in train_epochs(stopped, batches, STEPS, squared_error):
        if state.epoch == 2:
            break
    assert bool(stopped.extension.oscillation.frozen.any())
    torch.save(copy.deepcopy(stopped.state_dict()), tmp_path / "state.pt")

    network = small_net(9)  # other weights: everything must come from the file
    fresh = insert(network, place(network))
    set_mode(fresh, Mode.QUANTIZE)
    resumed = new_state(fresh, **choices)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    list(train_epochs(resumed, batches, STEPS, squared_error))
    for name, value in expected.model.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name
    for name, value in expected.extension.state_dict().items():
        assert torch.equal(value, resumed.extension.state_dict()[name]), name


def test_a_state_of_another_network_is_refused():
    state = OscillationTracker(one_layer()).state_dict()
    with pytest.raises(ValueError, match="follows 4 weights, this network has 2"):
        OscillationTracker(one_layer((0.1, 0.2))).load_state_dict(state)
