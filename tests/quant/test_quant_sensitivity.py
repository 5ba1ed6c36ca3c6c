"""Sensitivity scores against explicit loops over single images, whatever the batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quant_networks import small_images, small_net, small_quantized
from torch import Tensor, fx

from core.errors import ConfigError
from quant import (
    Mode,
    activation_quantizers,
    measure_fisher,
    measure_sqnr,
    placement_of,
    quantized_layers,
    set_mode,
)

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
                error = round_by_hand(x.detach(), scale, -128, 127) - x.detach()
                found[group.name][0] += float((x.grad * error).square().sum()) / NUM_IMAGES
            for name in group.layers:
                layer = layers[name]
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


def test_fisher_leaves_the_model_as_it_was() -> None:
    model = small_quantized(learn_scales=False).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure_fisher(model, batched(4), task_loss)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(quantizer.mode is Mode.QUANTIZE for quantizer in activation_quantizers(model).values())


def test_fisher_wants_one_target_per_image() -> None:
    with pytest.raises(ValueError, match="2 images has 1 targets"):
        measure_fisher(small_quantized(), [(IMAGES[:2], TARGETS[:1])], task_loss)
    with pytest.raises(ConfigError, match=r"sensitivity\.images"):
        measure_fisher(small_quantized(), [], task_loss)


@pytest.mark.parametrize("num_processes", [2, 3, 9])  # 9: one of them gets no image
def test_processes_that_share_the_images_find_the_scores_of_one(num_processes: int) -> None:
    alone = measure_fisher(small_quantized(), batched(1), task_loss)
    parts: list[Any] = []

    def keep(item: Any) -> list[Any]:
        parts.append(item)
        return [item] if item else [[([0.0] * 99, [0.0] * 99)]]

    for rank in range(num_processes):
        measure_fisher(small_quantized(), batched(1)[rank::num_processes], task_loss, keep)
    shared = measure_fisher(small_quantized(), batched(1)[:1], task_loss, lambda _: parts)
    assert [score.as_dict() for score in shared] == [score.as_dict() for score in alone]  # to the last digit


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
