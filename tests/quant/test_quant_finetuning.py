"""Fine-tuning: losses by their formulas, learning, fixed scales, and going on from a saved state."""

import copy
import math

import pytest
import torch
from fine_tuning import STEPS, batches, fine_tune, new_state, squared_error
from quant_networks import small_images, small_net, small_quantized
from torch import nn

from core.errors import DivergenceError
from quant import (
    FakeQuantize,
    Mode,
    Rule,
    WeightFakeQuantize,
    activation_quantizers,
    calibrate,
    insert,
    place,
    quantized_layers,
    set_mode,
)
from quant.finetuning.distillation import distillation_loss, flatten_maps
from training import train_epochs
from training.schedule import rate_factor


def values_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# -- formulas


def test_the_rate_reaches_the_optimizer_and_the_record():
    state = fine_tune(small_quantized(), epochs=2, warmup_fraction=0.25, scale_learning_rate=1e-2)
    expected = [rate_factor(step, 2 * STEPS, 0.25, 0.01) for step in range(2 * STEPS)]
    assert [record.learning_rate for record in state.records] == pytest.approx([1e-3 * f for f in expected])
    last = {group["name"]: group["lr"] for group in state.optimizer.param_groups}
    assert last == pytest.approx(
        {name: peak * expected[-1] for name, peak in (("weights", 1e-3), ("biases", 1e-3), ("scales", 1e-2))}
    )


def test_distillation_is_0_for_equal_and_1_for_the_mean_answer():
    teacher = (
        (torch.randn(2, 3, 40, 40) * 5 + 3, torch.randn(2, 7, 40, 40) * 0.01),
        torch.randn(2, 5, 90, 9),
    )
    assert float(distillation_loss(teacher, teacher)) == 0.0

    def constant(maps):
        return tuple(
            constant(m) if isinstance(m, tuple) else torch.full_like(m, float(m.mean())) for m in maps
        )

    assert float(distillation_loss(constant(teacher), teacher)) == pytest.approx(1.0, abs=1e-3)


def test_distillation_by_hand_is_a_mean_over_maps():
    """Map 1: errors 1, 1 over variance 2 -> 0.5; map 2: errors 0, 9 over variance 8 -> 0.5625."""
    teacher = [torch.tensor([0.0, 2.0]), torch.tensor([1.0, 5.0])]
    student = [torch.tensor([1.0, 3.0]), torch.tensor([1.0, 8.0])]
    assert float(distillation_loss(student, teacher)) == pytest.approx((1 / 2 + 4.5 / 8) / 2)


def test_distillation_does_not_depend_on_units_and_teaches_the_student_only():
    teacher, student = torch.randn(100, requires_grad=True), torch.randn(100, requires_grad=True)
    loss = distillation_loss([student], [teacher])
    scaled = distillation_loss([student * 1000], [teacher * 1000])
    assert float(scaled.detach()) == pytest.approx(float(loss.detach()), rel=1e-4)
    loss.backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_distillation_of_a_constant_map_stays_finite():
    assert math.isfinite(float(distillation_loss([torch.ones(4)], [torch.zeros(4)])))


def test_outputs_of_any_nesting_are_flattened_in_order():
    a, b, c = torch.zeros(1), torch.ones(1), torch.ones(2)
    assert [id(t) for t in flatten_maps(((a, [b]), {"c": c}))] == [id(a), id(b), id(c)]


def test_distillation_needs_as_many_maps_on_both_sides():
    with pytest.raises(ValueError, match=r"longer|shorter"):
        distillation_loss([torch.ones(2)], [torch.ones(2), torch.ones(2)])


def test_parameters_are_split_by_what_they_are():
    model = small_quantized()
    state = new_state(model, weight_decay=0.1)
    groups = {group["name"]: group for group in state.optimizer.param_groups}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "weights": 0.1,
        "biases": 0.0,
        "scales": 0.0,
    }
    assert len(groups["weights"]["params"]) == len(groups["biases"]["params"]) == 6
    assert len(groups["scales"]["params"]) == 3 + 5  # groups but that of the input, and layers, each once
    total = [id(p) for group in groups.values() for p in group["params"]]
    assert len(total) == len(set(total)) == len(list(model.parameters())) - 1
    fixed = new_state(small_quantized(learn_scales=False)).optimizer.param_groups
    assert [group["name"] for group in fixed] == ["weights", "biases"]


# -- learning


def test_fine_tuning_recovers_what_few_bits_lose():
    """The teacher's answers at 3 bits: distillation alone brings the student closer."""
    teacher = small_net()
    model = insert(teacher, place(teacher, rules=(Rule("*", bits=3),))).eval()
    calibrate(model, [small_images()])
    images = small_images(8, seed=999)
    with torch.no_grad():
        before = float(distillation_loss([model(images)], [teacher(images)]))
    fine_tune(model, teacher, epochs=20, learning_rate=3e-3, scale_learning_rate=1e-2, task_weight=0.0)
    with torch.no_grad():
        after = float(distillation_loss([model(images)], [teacher(images)]))
    assert after < 0.6 * before


def test_both_losses_are_weighted_and_recorded():
    model, teacher = small_quantized(), small_net()
    choices = {"task_weight": 2.0, "distill_weight": 0.5, "learning_rate": 0.0, "scale_learning_rate": 0.0}
    images, targets = next(batches(0))
    model.train()
    raw, reference = model(images), teacher(images)
    state = fine_tune(model, teacher, epochs=1, **choices)
    losses = state.records[0].losses
    assert losses["error"] == pytest.approx(2.0 * float((raw - targets).square().mean().detach()), rel=1e-5)
    expected = 0.5 * float(((raw - reference).square().mean() / reference.var()).detach())
    assert losses["distillation"] == pytest.approx(expected, rel=1e-5)
    assert losses["total"] == pytest.approx(losses["error"] + losses["distillation"], rel=1e-6)
    assert state.records[0].as_dict()["distillation"] == losses["distillation"]


def test_the_teacher_does_not_move():
    """Not even one that comes in training mode, with batch statistics that would."""
    model = small_quantized()
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3, 2, padding=1), nn.BatchNorm2d(4)).train()
    before = values_of(teacher)
    fine_tune(model, teacher, epochs=1)
    assert equal(values_of(teacher), before)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_nothing_to_learn_from_is_an_error():
    with pytest.raises(ValueError, match="all loss terms are 0"):
        fine_tune(small_quantized(), task_weight=0.0)


def scales_of(model):
    scales = {name: q.scale.clone() for name, q in activation_quantizers(model).items()}
    return scales, {
        name: layer.weight_quantizer.scale.clone() for name, layer in quantized_layers(model).items()
    }


def test_learned_scales_move_and_stay_positive():
    model = small_quantized()
    activations, weights = scales_of(model)
    fine_tune(model, scale_learning_rate=1e-2)
    new_activations, new_weights = scales_of(model)
    for old, new in ((activations, new_activations), (weights, new_weights)):
        for name in old:
            assert torch.equal(old[name], new[name]) == (name == "input.x")  # the images' range is known
            assert bool((new[name] > 0).all())


class Repeated(nn.Module):
    """A quantizer as a network: of the images, or of a weight that is repeated along its input channels."""

    def __init__(self, weight=None):
        super().__init__()
        self.weight = weight
        if weight is None:
            self.quantizer = FakeQuantize()
            self.quantizer.set_scale(0.01)
        else:
            self.quantizer = WeightFakeQuantize(len(weight))
            self.quantizer.set_scale(torch.full((len(weight),), 0.01), weight)
        self.quantizer.mode = Mode.QUANTIZE

    def forward(self, images):
        return self.quantizer(images if self.weight is None else self.weight)


def weighted_mean(raw, targets, size):
    return {"mean": (raw * targets).mean()}


@pytest.mark.parametrize("repeats", [1, 16, 256])
@pytest.mark.parametrize("kind", ["activation", "weight"])
def test_the_step_of_a_scale_does_not_depend_on_the_size_of_the_tensor(kind, repeats):
    """The same values repeated under a mean: the loss and its slope stay, so must the step of AdamW.

    The slope is by LSQ's equation 3, value by value: d(s * code)/d(log s) = s * (code - v) inside, s * code beyond.
    Adam's first step is rate * slope / (|slope| + eps).
    """
    values = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(3)) * 0.5
    factors = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(4)) * 3e-3
    slope = 0.0
    for x, factor in zip(
        values.double().flatten().tolist(), factors.double().flatten().tolist(), strict=True
    ):
        v = x / 0.01
        inside = -128 <= round(v) <= 127 if kind == "activation" else -127 <= round(v) <= 127
        code = round(v) - v if inside else math.copysign(128 if kind == "activation" and v < 0 else 127, v)
        slope += factor * 0.01 * code / values.numel()
    expected = 1e-3 * slope / (abs(slope) + 1e-8)

    if kind == "activation":
        model = Repeated()
        images, weights = values.repeat(repeats, 1, 1, 1), factors.repeat(repeats, 1, 1, 1)
    else:
        model = Repeated(values.repeat(1, repeats, 1, 1))
        images, weights = torch.zeros(1, 3, 5, 5), factors.repeat(1, repeats, 1, 1)
    before = model.quantizer.log_scale.detach().clone()
    state = new_state(model, epochs=1, scale_learning_rate=1e-3)
    list(train_epochs(state, lambda epoch, samples: [(images, weights)], 1, weighted_mean))
    step = float((model.quantizer.log_scale.detach() - before).sum())
    assert step == pytest.approx(-expected, rel=1e-2)
    assert 1e-7 < abs(slope) < 1e-6  # above Adam's eps, below the median of a detector's weight scales


def test_scales_that_are_not_learned():
    """Activation scales stay; weight scales keep their calibrated share of each channel's largest weight."""
    model = small_quantized(learn_scales=False)
    activations, weights = scales_of(model)
    shares = {
        name: weights[name] / (layer.weight.detach().abs().amax((1, 2, 3)) / 127)
        for name, layer in quantized_layers(model).items()
    }
    state = fine_tune(model, scale_learning_rate=1e-2, learning_rate=1e-2)
    new_activations, new_weights = scales_of(model)
    assert equal(activations, new_activations)
    for trained in (model, state.average.model):
        for name, layer in quantized_layers(trained).items():
            amax = layer.weight.detach().abs().amax((1, 2, 3))
            torch.testing.assert_close(
                layer.weight_quantizer.scale, shares[name] * amax / 127, rtol=1e-5, atol=0
            )
    assert not any(torch.equal(weights[name], new_weights[name]) for name in weights)


def test_clipping_bounds_the_step_and_the_record_keeps_the_norm_before():
    def huge(raw, targets, size):
        return {"error": 1e6 * (raw - targets).square().mean()}

    model = small_quantized()
    state = fine_tune(model, loss=huge, epochs=1, clip_norm=1.0)
    assert all(record.gradient_norm > 100.0 for record in state.records)
    for group in state.optimizer.param_groups:
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in group["params"]]))
        assert float(norm) <= 1.0 + 1e-4


def test_the_average_starts_at_the_model_and_trails_it():
    model = small_quantized()
    before = values_of(model)
    state = fine_tune(model, ema_decay=0.999, ema_warmup=1.0)
    averaged, now = state.average.model.state_dict(), model.state_dict()
    name = "side.conv.weight"
    assert 0 < float((averaged[name] - before[name]).norm()) < float((now[name] - before[name]).norm())
    assert torch.isfinite(state.average.model(small_images())).all()


def test_divergence_names_the_rate_of_the_scales_too():
    def infinite(raw, targets, size):
        return {"bad": raw.mean() * math.inf}

    message = r"lower the learning rate \(now 0.001\) or that of scales \(now 0.02\)"
    with pytest.raises(DivergenceError, match=message):
        fine_tune(small_quantized(), loss=infinite, scale_learning_rate=0.02)


# -- stopping and going on


@pytest.mark.parametrize("learn_scales", [True, False])
@pytest.mark.parametrize("stop_after", [1, 2])
def test_going_on_from_a_saved_state_gives_the_weights_of_an_undisturbed_run(
    tmp_path, learn_scales, stop_after
):
    choices = {"epochs": 4, "warmup_fraction": 0.3, "scale_learning_rate": 1e-2}
    expected = fine_tune(small_quantized(learn_scales=learn_scales), small_net(), **choices)

    stopped = new_state(small_quantized(learn_scales=learn_scales), small_net(), **choices)
    for state in train_epochs(stopped, batches, STEPS, squared_error):
        if state.epoch == stop_after:
            torch.save(copy.deepcopy(state.state_dict()), tmp_path / "state.pt")
            break

    network = small_net(9)  # other weights: everything must come from the file
    fresh = insert(network, place(network), learn_scales)
    set_mode(fresh, Mode.QUANTIZE)
    resumed = new_state(fresh, small_net(), **choices)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    list(train_epochs(resumed, batches, STEPS, squared_error))

    assert (resumed.step, resumed.epoch) == (expected.step, expected.epoch) == (4 * STEPS, 4)
    assert equal(values_of(resumed.model), values_of(expected.model))
    assert equal(values_of(resumed.averaged), values_of(expected.averaged))
