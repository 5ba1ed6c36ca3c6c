"""The training loop: schedule, average and losses by their formulas, learning, fixed scales, divergence, resuming."""

import copy
import math

import pytest
import torch
from quant_networks import small_images, small_net, small_quantized
from torch import nn

from core.errors import DivergenceError
from quant import (
    Mode,
    TrainingOptions,
    activation_quantizers,
    calibrate,
    insert,
    new_state,
    place,
    quantized_layers,
    set_mode,
    train_epochs,
)
from quant.finetuning.distillation import distillation_loss, flatten_maps
from quant.finetuning.loop import ModelAverage, parameter_groups, rate_factor

STEPS = 4


def batches(epoch):
    """Images and regression targets that depend on the epoch."""
    for step in range(STEPS):
        images = small_images(4, seed=100 * epoch + step)
        yield images, images.mean(1, keepdim=True)[:, :, ::2, ::2].repeat(1, 4, 1, 1)


def squared_error(raw, targets, size):
    return {"error": (raw - targets).square().mean()}


def options(**changes):
    return TrainingOptions(**{"epochs": 3, "learning_rate": 1e-3, "warmup_fraction": 0.0, **changes})


def train(model, **changes):
    states = list(train_epochs(model, batches, STEPS, squared_error, options(**changes)))
    return states[-1]


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
    assert rate_factor(step, 100, 0.1, 0.0) == pytest.approx(factor if step != 32.5 else 0.8535534, abs=1e-6)


def test_learning_rate_ends_at_the_final_fraction_and_starts_without_warmup():
    assert rate_factor(100, 100, 0.1, 0.05) == pytest.approx(0.05)
    assert rate_factor(0, 100, 0.0, 0.05) == 1.0
    factors = [rate_factor(step, 40, 0.25, 0.01) for step in range(40)]
    assert factors[:10] == sorted(factors[:10])
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert max(factors) == 1.0


def test_the_rate_reaches_the_optimizer_and_the_record():
    state = train(small_quantized(), epochs=2, warmup_fraction=0.25, scale_learning_rate=1e-2)
    expected = [rate_factor(step, 2 * STEPS, 0.25, 0.01) for step in range(2 * STEPS)]
    assert [record.learning_rate for record in state.records] == pytest.approx([1e-3 * f for f in expected])
    last = {group["name"]: group["lr"] for group in state.optimizer.param_groups}
    assert last == pytest.approx(
        {name: peak * expected[-1] for name, peak in (("weights", 1e-3), ("biases", 1e-3), ("scales", 1e-2))}
    )


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
    groups = {group["name"]: group for group in parameter_groups(model, options(weight_decay=0.1))}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "weights": 0.1,
        "biases": 0.0,
        "scales": 0.0,
    }
    assert len(groups["weights"]["params"]) == len(groups["biases"]["params"]) == 6
    assert len(groups["scales"]["params"]) == 4 + 5  # groups and layers, each once
    total = [id(p) for group in groups.values() for p in group["params"]]
    assert len(total) == len(set(total)) == len(list(model.parameters()))
    fixed = parameter_groups(small_quantized(learn_scales=False), options())
    assert [group["name"] for group in fixed] == ["weights", "biases"]


# -- learning


def test_float_training_with_the_same_loop_learns():
    network = small_net()
    state = train(network, epochs=25, distill_weight=0.0, ema_decay=0.0, learning_rate=1e-2)
    losses = [record.losses["total"] for record in state.records]
    assert sum(losses[-STEPS:]) < 0.1 * sum(losses[:STEPS])
    assert state.average is None
    assert (state.step, state.epoch) == (25 * STEPS, 25)


def test_fine_tuning_recovers_what_few_bits_lose():
    """The teacher's answers at 3 bits: distillation alone brings the student closer."""
    from quant import Rule

    teacher = small_net()
    model = insert(teacher, place(teacher, rules=(Rule("*", bits=3),))).eval()
    calibrate(model, [small_images()])
    images = small_images(8, seed=999)
    with torch.no_grad():
        before = float(distillation_loss([model(images)], [teacher(images)]))
    choices = options(epochs=20, learning_rate=3e-3, scale_learning_rate=1e-2, task_weight=0.0)
    for _ in train_epochs(model, batches, STEPS, squared_error, choices, teacher):
        assert not model.training
    with torch.no_grad():
        after = float(distillation_loss([model(images)], [teacher(images)]))
    assert after < 0.6 * before


def test_both_losses_are_weighted_and_recorded():
    model, teacher = small_quantized(), small_net()
    choices = options(
        epochs=1, task_weight=2.0, distill_weight=0.5, learning_rate=0.0, scale_learning_rate=0.0
    )
    images, targets = next(batches(0))
    model.train()
    raw, reference = model(images), teacher(images)
    (state,) = train_epochs(model, batches, STEPS, squared_error, choices, teacher)
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
    list(train_epochs(model, batches, STEPS, squared_error, options(epochs=1), teacher))
    assert equal(values_of(teacher), before)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_nothing_to_learn_from_is_an_error():
    with pytest.raises(ValueError, match="all 0"):
        list(train_epochs(small_quantized(), batches, STEPS, squared_error, options(task_weight=0.0)))


def scales_of(model):
    scales = {name: q.scale.clone() for name, q in activation_quantizers(model).items()}
    return scales, {
        name: layer.weight_quantizer.scale.clone() for name, layer in quantized_layers(model).items()
    }


def test_learned_scales_move_and_stay_positive():
    model = small_quantized()
    activations, weights = scales_of(model)
    train(model, scale_learning_rate=1e-2)
    new_activations, new_weights = scales_of(model)
    for old, new in ((activations, new_activations), (weights, new_weights)):
        for name in old:
            assert not torch.equal(old[name], new[name])
            assert bool((new[name] > 0).all())


def test_scales_that_are_not_learned():
    """Activation scales stay; weight scales keep their calibrated share of each channel's largest weight."""
    model = small_quantized(learn_scales=False)
    activations, weights = scales_of(model)
    shares = {
        name: weights[name] / (layer.weight.detach().abs().amax((1, 2, 3)) / 127)
        for name, layer in quantized_layers(model).items()
    }
    state = train(model, scale_learning_rate=1e-2, learning_rate=1e-2)
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
    (state,) = train_epochs(model, batches, STEPS, huge, options(epochs=1, clip_norm=1.0))
    assert all(record.gradient_norm > 100.0 for record in state.records)
    for group in state.optimizer.param_groups:
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in group["params"]]))
        assert float(norm) <= 1.0 + 1e-4


def test_the_average_starts_at_the_model_and_trails_it():
    model = small_quantized()
    before = values_of(model)
    state = train(model, ema_decay=0.999, ema_warmup=1.0)
    averaged, now = state.average.model.state_dict(), model.state_dict()
    name = "side.conv.weight"
    assert 0 < float((averaged[name] - before[name]).norm()) < float((now[name] - before[name]).norm())
    assert torch.isfinite(state.average.model(small_images())).all()


# -- divergence


def test_a_loss_that_is_not_finite_names_step_terms_and_remedy():
    def breaking(raw, targets, size):
        breaking.calls += 1
        return {"fine": raw.square().mean(), "bad": raw.mean() * (math.inf if breaking.calls > 2 else 1.0)}

    breaking.calls = 0
    message = r"loss is not finite at step 2 \(.*'bad': -?(inf|nan).*lower the learning rate \(now 0.001\)"
    with pytest.raises(DivergenceError, match=message):
        list(train_epochs(small_quantized(), batches, STEPS, breaking, options()))


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights():
    """The square root's slope is infinite at 0, its value is not."""

    def steep(raw, targets, size):
        return {"error": (raw * 0.0).square().sum().sqrt()}

    model = small_quantized()
    before = values_of(model)
    with pytest.raises(DivergenceError, match=r"gradient is not finite at step 0"):
        list(train_epochs(model, batches, STEPS, steep, options()))
    assert equal(values_of(model), before)


# -- stopping and going on


def saved(model, state):
    """What a caller keeps: all of it plain data or tensors."""
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "average": state.average.model.state_dict(),
            "updates": state.average.updates,
            "step": state.step,
            "epoch": state.epoch,
        }
    )


@pytest.mark.parametrize("learn_scales", [True, False])
@pytest.mark.parametrize("stop_after", [1, 2])
def test_going_on_from_a_saved_state_gives_the_weights_of_an_undisturbed_run(
    tmp_path, learn_scales, stop_after
):
    teacher, choices = small_net(), options(epochs=4, warmup_fraction=0.3, scale_learning_rate=1e-2)

    straight = small_quantized(learn_scales=learn_scales)
    expected = list(train_epochs(straight, batches, STEPS, squared_error, choices, teacher))[-1]

    stopped = small_quantized(learn_scales=learn_scales)
    for state in train_epochs(stopped, batches, STEPS, squared_error, choices, teacher):
        if state.epoch == stop_after:
            torch.save(saved(stopped, state), tmp_path / "state.pt")
            break

    content = torch.load(tmp_path / "state.pt", weights_only=True)
    network = small_net(9)  # other weights: everything must come from the file
    fresh = insert(network, place(network), learn_scales)
    set_mode(fresh, Mode.QUANTIZE)
    state = new_state(fresh, choices)
    fresh.load_state_dict(content["model"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.average.model.load_state_dict(content["average"])
    state.average.updates, state.step, state.epoch = content["updates"], content["step"], content["epoch"]
    state = list(train_epochs(fresh, batches, STEPS, squared_error, choices, teacher, state))[-1]

    assert (state.step, state.epoch) == (expected.step, expected.epoch) == (4 * STEPS, 4)
    assert equal(values_of(fresh), values_of(straight))
    assert equal(values_of(state.average.model), values_of(expected.average.model))


def test_a_finished_state_trains_no_further():
    model = small_quantized()
    state = train(model, epochs=2)
    before = values_of(model)
    assert list(train_epochs(model, batches, STEPS, squared_error, options(epochs=2), None, state)) == []
    assert equal(values_of(model), before)
