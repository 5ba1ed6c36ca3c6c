"""Sensitivity scores against explicit loops over single images, whatever the batches."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from quant_networks import small_images, small_net, small_quantized
from torch import Tensor, fx, nn

from core.errors import ConfigError
from core.grid import INT8_WEIGHTS
from quant import (
    Mode,
    activation_quantizers,
    calibrate,
    insert,
    measure_fisher,
    measure_sqnr,
    place,
    placement_of,
    quantized_layers,
    set_mode,
)
from quant.layers import quantize_layer
from quant.sensitivity.probes import LayerProbe, weight_gradients

NUM_IMAGES = 8
IMAGES = small_images(NUM_IMAGES, seed=3)
TARGETS = [  # every other image pulls the other way
    target * (-1) ** index
    for index, target in enumerate(
        torch.rand(NUM_IMAGES, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    )
]


def task_loss(output: Tensor, targets: Any, size: tuple[int, int]) -> dict[str, Tensor]:
    """Two terms normalised over the batch, as the detection loss is. `targets`: [4, 8, 8], or a list of these."""
    assert size == (16, 16)
    wanted = torch.stack(targets) if isinstance(targets, list) else targets[None]
    total = wanted.abs().sum().clamp(min=1.0)
    return {"square": (output - wanted).square().sum() / total, "size": 0.1 * output.abs().sum() / total}


def round_by_hand(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return torch.round(x / scale).clamp(low, high) * scale


def batched(size: int) -> list[tuple[Tensor, list[Tensor]]]:
    return [(IMAGES[i : i + size], TARGETS[i : i + size]) for i in range(0, NUM_IMAGES, size)]


def fisher_by_hand(model: fx.GraphModule) -> dict[str, tuple[float, float]]:
    """Unit -> (activations, weights): mean over images of sum g^2 (Q(x) - x)^2, one image after the other."""
    quantizers, layers = activation_quantizers(model), quantized_layers(model)
    found = {group.name: [0.0, 0.0] for group in placement_of(model).groups}
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, output: Tensor) -> None:
        output.retain_grad()
        seen.setdefault(name, []).append(output)

    handles = [
        quantizer.register_forward_hook(lambda _module, _inputs, output, name=name: keep(name, output))
        for name, quantizer in quantizers.items()
    ]
    set_mode(model, Mode.OFF)
    for image, target in zip(IMAGES, TARGETS, strict=True):
        seen.clear()
        model.zero_grad()
        sum(task_loss(model(image[None].requires_grad_()), target, (16, 16)).values()).backward()
        for group in placement_of(model).groups:
            scale = quantizers[group.name].scale
            for x in seen[group.name]:
                if x.grad is None:  # no gradient reaches it
                    continue
                error = round_by_hand(x.detach(), scale, -128, 127) - x.detach()
                found[group.name][0] += float((x.grad * error).square().sum()) / NUM_IMAGES
            for name in group.layers:
                layer = layers[name]
                if layer.weight.grad is None:
                    continue
                steps = layer.weight_quantizer.scale.reshape(-1, 1, 1, 1)
                error = round_by_hand(layer.weight.detach(), steps, -127, 127) - layer.weight.detach()
                found[group.name][1] += float((layer.weight.grad * error).square().sum()) / NUM_IMAGES
    for handle in handles:
        handle.remove()
    return {name: (parts[0], parts[1]) for name, parts in found.items()}


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_fisher_is_the_mean_over_single_images(size: int) -> None:
    model = small_quantized()
    expected = fisher_by_hand(small_quantized())
    scores = measure_fisher(model, batched(size), task_loss)
    assert {score.unit for score in scores} == set(expected)
    assert [score.score for score in scores] == sorted((score.score for score in scores), reverse=True)
    assert sum(weights for _, weights in expected.values()) > 0
    for score in scores:
        activations, weights = expected[score.unit]
        assert score.parts["weights"] == pytest.approx(weights, rel=1e-3, abs=0)
        assert score.parts["activations"] == pytest.approx(activations, rel=1e-3, abs=0)
        assert score.score == pytest.approx(activations + weights, rel=1e-3, abs=0)


def test_bfloat16_products_move_scores_by_less_than_they_say() -> None:
    expected = fisher_by_hand(small_quantized())
    scores = measure_fisher(small_quantized(), batched(4), task_loss, products=torch.bfloat16)
    exact = measure_fisher(small_quantized(), batched(4), task_loss)
    assert [score.unit for score in scores] == [score.unit for score in exact]
    assert [score.score for score in scores] != [score.score for score in exact]
    for score in scores:
        assert score.score == pytest.approx(sum(expected[score.unit]), rel=0.02, abs=0)


def test_an_image_whose_loss_has_no_gradient_counts_as_zero() -> None:
    def loss(output: Tensor, target: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        found = task_loss(output, target, size)
        return found if target is not TARGETS[1] else {"none": torch.zeros(())}

    others = [(IMAGES[:1], TARGETS[:1]), (IMAGES[2:4], TARGETS[2:4])]
    alone = {s.unit: s.score for s in measure_fisher(small_quantized(), others, task_loss)}
    found = measure_fisher(small_quantized(), [(IMAGES[:4], TARGETS[:4])], loss)
    assert {s.unit: s.score for s in found} == pytest.approx(
        {u: s * 3 / 4 for u, s in alone.items()}, rel=1e-5
    )


def test_the_number_of_threads_moves_no_more_than_the_last_digits() -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append({s.unit: s.score for s in measure_fisher(small_quantized(), batched(4), task_loss)})
    finally:
        torch.set_num_threads(threads)
    assert found[0] == pytest.approx(found[1], rel=1e-6, abs=0)


def test_fisher_leaves_the_model_as_it_was() -> None:
    model = small_quantized(learn_scales=False).train()
    learned = [parameter.requires_grad for parameter in model.parameters()]
    assert len(set(learned)) == 2
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure_fisher(model, batched(4), task_loss)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == learned
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(quantizer.mode is Mode.QUANTIZE for quantizer in activation_quantizers(model).values())


def test_fisher_wants_one_target_per_image() -> None:
    with pytest.raises(ValueError, match="2 images has 1 targets"):
        measure_fisher(small_quantized(), [(IMAGES[:2], TARGETS[:1])], task_loss)
    with pytest.raises(ConfigError, match=r"sensitivity\.images"):
        measure_fisher(small_quantized(), [], task_loss)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("num_processes", [2, 3, 9])  # 9: one of them gets no image
def test_processes_that_share_the_images_find_the_scores_of_one(num_processes: int, size: int) -> None:
    alone = measure_fisher(small_quantized(), batched(size), task_loss)
    parts: list[Any] = []

    def keep(item: Any) -> list[Any]:
        parts.append(item)
        return [[[[0.0] * 9]]]  # four groups and five layers

    for rank in range(num_processes):
        measure_fisher(small_quantized(), batched(size)[rank::num_processes], task_loss, keep)
    shared = measure_fisher(small_quantized(), batched(size)[:1], task_loss, lambda _: parts)
    assert [score.as_dict() for score in shared] == [score.as_dict() for score in alone]  # to the last digit


def test_kept_figures_are_taken_instead_of_measured() -> None:
    whole = measure_fisher(small_quantized(), batched(3), task_loss)
    kept: dict[int, Any] = {}

    def keep(number: int, compute: Any) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return kept.setdefault(number, json.loads(json.dumps(compute())))

    with pytest.raises(KeyboardInterrupt):
        measure_fisher(small_quantized(), batched(3), task_loss, None, keep)
    assert {number: len(figures) for number, figures in kept.items()} == {0: 3, 1: 3}
    computed = []

    def go_on(number: int, compute: Any) -> Any:
        if number not in kept:
            computed.append(number)
            kept[number] = compute()
        return kept[number]

    resumed = measure_fisher(small_quantized(), batched(3), task_loss, None, go_on)
    assert computed == [2]
    assert [score.as_dict() for score in resumed] == [score.as_dict() for score in whole]  # to the last digit


class Twice(nn.Module):
    """One convolution called twice, and one behind a detach."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.output = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(self.twice(self.first(x).relu()).relu()).relu()
        return self.output(y.detach()) + self.output(y)


def test_gradients_of_all_calls_of_a_layer_add_up() -> None:
    network = Twice().eval()
    model = insert(network, place(network)).eval()
    calibrate(model, [IMAGES])
    expected = fisher_by_hand(copy.deepcopy(model))
    for score in measure_fisher(model, batched(4), task_loss):
        assert score.parts["weights"] == pytest.approx(expected[score.unit][1], rel=1e-3, abs=0)
        assert score.parts["activations"] == pytest.approx(expected[score.unit][0], rel=1e-3, abs=0)


def test_what_lies_behind_a_detach_is_scored() -> None:
    class Detached(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return self.output(self.twice(self.first(x).relu().detach()).relu())

    network = Detached().eval()
    model = insert(network, place(network)).eval()
    calibrate(model, [IMAGES])
    expected = fisher_by_hand(copy.deepcopy(model))
    scores = {score.unit: score.parts for score in measure_fisher(model, batched(4), task_loss)}
    assert scores["relu_0"]["weights"] == pytest.approx(expected["relu_0"][1], rel=1e-3) != 0
    assert scores["relu_0"]["activations"] == scores["input.x"]["weights"] == 0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, 1),
        nn.Conv2d(6, 8, 1, stride=2),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(6, 8, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(6, 8, 3, padding="same"),
        nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(6, 8, 4, stride=2, padding=1, output_padding=1),
        nn.Linear(10, 8),
    ],
    ids=str,
)
def test_weight_gradients_are_those_of_each_image(layer: Any, memory_format: Any) -> None:
    layer = copy.deepcopy(layer)
    x = torch.randn(3, 6, 12, 10).contiguous(memory_format=memory_format)
    slopes = torch.randn_like(layer(x))
    expected = [
        torch.autograd.grad(layer(image), layer.weight, slope)[0]
        for image, slope in zip(x.split(1), slopes.split(1), strict=True)
    ]
    quantize_layer(layer, 1 if isinstance(layer, nn.ConvTranspose2d) else 0, INT8_WEIGHTS, True)
    with torch.no_grad():
        found = weight_gradients(layer, x, slopes)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, 1),
        nn.Conv2d(6, 8, 1, padding=1),
        nn.Conv2d(6, 8, (3, 2), padding=(1, 0)),
        nn.Conv2d(6, 8, (3, 5), padding=2),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.Conv2d(6, 8, 3, stride=(1, 2)),
    ],
    ids=str,
)
def test_gradients_for_inputs_are_those_of_autograd(layer: Any, memory_format: Any) -> None:
    layer = copy.deepcopy(layer)
    x = torch.randn(3, 6, 12, 10).contiguous(memory_format=memory_format).requires_grad_()
    slopes = torch.randn_like(layer(x))
    (expected,) = torch.autograd.grad(layer(x), x, slopes)
    quantize_layer(layer, 0, INT8_WEIGHTS, True)
    with torch.no_grad():
        found = LayerProbe(layer).backward(x.detach(), slopes)
        rounded = LayerProbe(layer, torch.bfloat16).backward(x.detach(), slopes)
    assert found.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert rounded.dtype == torch.float32
    assert 1e-4 < (rounded - expected).norm() / expected.norm() < 1e-2


def test_chosen_units_are_scored_alike() -> None:
    images = [images for images, _ in batched(4)]
    alone = {score.unit: score.score for score in measure_sqnr(small_quantized(), images)}
    parts = [list(alone)[rank::2] for rank in range(2)]
    shares = [
        {s.unit: s.score for s in measure_sqnr(small_quantized(), images, {*alone} - {*part})}
        for part in parts
    ]
    assert [list(share) for share in shares] == parts
    assert shares[0] | shares[1] == alone


def sqnr_by_hand(model: fx.GraphModule) -> dict[str, float]:
    """Unit -> mean over images of |y_unit - y|^2 / var(y), y being the one output map of the float network."""
    network = small_net()
    quantizers, layers = activation_quantizers(model), quantized_layers(model)
    found = {}
    for group in placement_of(model).groups:
        set_mode(model, Mode.OFF)
        quantizers[group.name].mode = Mode.QUANTIZE
        for name in group.layers:
            layers[name].weight_quantizer.mode = Mode.QUANTIZE
        total = 0.0
        for image in IMAGES:
            with torch.no_grad():
                y, y_unit = network(image[None])[0], model(image[None])[0]
            total += float((y_unit - y).square().mean() / y.var())
        found[group.name] = total / NUM_IMAGES
    return found


@pytest.mark.parametrize("size", [1, 3, 8])  # 3: the last batch is smaller
def test_sqnr_is_the_mean_over_single_images(size: int) -> None:
    expected = sqnr_by_hand(small_quantized())
    scores = list(measure_sqnr(small_quantized(), [images for images, _ in batched(size)]))
    assert [score.unit for score in scores] == list(expected)
    for score in scores:
        assert score.score == pytest.approx(expected[score.unit], rel=1e-3, abs=0)
