"""Weight codes are kept in evaluation: the results are those of a model that keeps nothing, whatever has changed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quant_networks import small_images, small_quantized
from torch import Tensor, fx

from quant import Mode, quantized_layers, set_mode, trace

LAYER = "last.conv"


def evaluate(model: fx.GraphModule) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(small_images())
    return result.clone()


def evaluate_fresh(model: fx.GraphModule) -> Tensor:
    """The result of a new model with the same state, which has never been evaluated."""
    fresh = small_quantized(seed=5)
    fresh.load_state_dict(model.state_dict())
    return evaluate(fresh)


def count_quantizations(model: fx.GraphModule) -> list[int]:
    """A list that grows with every weight that is quantized."""
    counted: list[int] = []
    for layer in quantized_layers(model).values():
        layer.weight_quantizer.register_forward_hook(lambda *_: counted.append(1))
    return counted


def test_weights_are_quantized_once_in_evaluation() -> None:
    model = small_quantized()
    counted = count_quantizations(model)
    first = evaluate(model)
    assert len(counted) == len(quantized_layers(model))
    for _ in range(3):
        assert torch.equal(evaluate(model), first)
        with torch.no_grad():
            assert torch.equal(model(small_images()), first)
    assert len(counted) == len(quantized_layers(model))
    assert torch.equal(first, evaluate_fresh(model))


def _step(model: fx.GraphModule, optimizer: Callable[..., torch.optim.Optimizer], **options: object) -> None:
    """One step without a switch to training mode."""
    update = optimizer(model.parameters(), lr=0.05, **options)
    model(small_images()).square().mean().backward()
    update.step()


def _other_state(model: fx.GraphModule) -> dict[str, Tensor]:
    return {name: value * 0.9 for name, value in model.state_dict().items()}


def _weight(model: fx.GraphModule) -> torch.nn.Parameter:
    return quantized_layers(model)[LAYER].weight


def _in_training(model: fx.GraphModule) -> None:
    model.train()
    _weight(model).data.mul_(0.5)  # without a version counter
    model.eval()


CHANGES: dict[str, Callable[[fx.GraphModule], object]] = {
    "in place": lambda model: _weight(model).detach().mul_(0.5),
    "one element": lambda model: _weight(model).detach()[0, 0, 0, 0].add_(1.0),
    "other memory": lambda model: setattr(_weight(model), "data", _weight(model).data * 0.5),
    "weight scale": lambda model: (
        quantized_layers(model)[LAYER].weight_quantizer.log_scale.detach().add_(0.3)
    ),
    "set_scale": lambda model: quantized_layers(model)[LAYER].weight_quantizer.set_scale(
        quantized_layers(model)[LAYER].weight_quantizer.scale * 2, _weight(model)
    ),
    "input scale": lambda model: quantized_layers(model)[LAYER].input_grid[0].log_scale.detach().add_(0.3),
    "loaded": lambda model: model.load_state_dict(_other_state(model)),
    "loaded as new tensors": lambda model: model.load_state_dict(_other_state(model), assign=True),
    "SGD": lambda model: _step(model, torch.optim.SGD),
    "AdamW, fused": lambda model: _step(model, torch.optim.AdamW, fused=True),
    "AdamW, foreach": lambda model: _step(model, torch.optim.AdamW, foreach=True),
    "training mode": _in_training,
    "foreach": lambda model: torch._foreach_mul_([p.detach() for p in model.parameters()], 0.8),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_change_is_seen(change: str) -> None:
    model = small_quantized()
    before = evaluate(model)
    CHANGES[change](model)
    after = evaluate(model)
    assert torch.equal(after, evaluate_fresh(model))
    assert not torch.equal(after, before)


def test_memory_that_two_weights_had_one_after_the_other_is_no_match() -> None:
    model = small_quantized()
    weight = _weight(model)
    wanted = evaluate(model)
    shape, kept = weight.shape, weight.data.clone()
    for _ in range(20):
        weight.data = torch.rand(shape)
        evaluate(model)
        weight.data = torch.rand(shape)
        assert torch.equal(evaluate(model), evaluate_fresh(model))
    weight.data = kept
    assert torch.equal(evaluate(model), wanted)


def test_switching_off_and_on_again() -> None:
    model = small_quantized()
    on = evaluate(model)
    set_mode(model, Mode.OFF)
    off = evaluate(model)
    set_mode(model, Mode.QUANTIZE)
    assert torch.equal(evaluate(model), on)
    assert not torch.equal(off, on)


def test_gradients_are_taken_as_before() -> None:
    model, other = small_quantized(), small_quantized()
    evaluate(model)
    for network in (model, other):
        network.train()(small_images()).square().mean().backward()
    for (name, parameter), same in zip(model.named_parameters(), other.parameters(), strict=True):
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.equal(parameter.grad, same.grad), name


def test_copies_and_files_do_not_carry_the_codes() -> None:
    model = small_quantized()
    names, wanted = set(model.state_dict()), evaluate(model)
    assert set(model.state_dict()) == names
    copied = copy.deepcopy(model)
    counted = count_quantizations(copied)
    with torch.no_grad():
        _weight(copied).mul_(0.5)
    assert not torch.equal(evaluate(copied), wanted)
    assert len(counted) == len(quantized_layers(copied))
    assert torch.equal(evaluate(model), wanted)
    file = io.BytesIO()
    torch.save(quantized_layers(model)[LAYER].weight_quantizer, file)
    file.seek(0)
    quantizer = torch.load(file, weights_only=False)
    assert torch.equal(
        quantizer(_weight(model)), quantized_layers(model)[LAYER].weight_quantizer(_weight(model))
    )


def test_tracing_again_and_moving_keep_the_result() -> None:
    model = small_quantized()
    wanted = evaluate(model)
    assert torch.equal(evaluate(trace(model)), wanted)
    model.double().float()
    assert torch.equal(evaluate(model), wanted)


def test_export_after_an_evaluation_writes_the_current_weights(tmp_path: Path) -> None:
    from deploy import export_onnx

    files = []
    for evaluated in (False, True):
        model = small_quantized()
        if evaluated:
            evaluate(model)
        with torch.no_grad():
            _weight(model).mul_(0.7)
        export_onnx(model, path := tmp_path / f"{evaluated}.onnx", (16, 16), "openvino", {}, ("output0",))
        files.append(path.read_bytes())
    assert files[0] == files[1]
