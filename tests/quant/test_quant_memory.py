"""What fine-tuning keeps for the backward pass: no quantized inputs of layers, and the same gradients."""

from __future__ import annotations

import weakref
from contextlib import nullcontext

import pytest
import torch
from quant_networks import small_images, small_quantized
from torch import Tensor, fx, nn

from quant import FakeQuantize, Mode, PlacementOptions, calibrate, insert, layers, place, quantized_layers


def gradients(model: fx.GraphModule, images: Tensor) -> dict[str, Tensor]:
    """Gradients of all parameters, and of the images."""
    model.zero_grad()
    images = images.clone().requires_grad_()
    model.train()(images).square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert images.grad is not None
    return {**found, "images": images.grad}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_those_from_kept_inputs(
    layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = small_quantized(), small_images(2, size=32).contiguous(memory_format=layout)
    found = gradients(model, images)
    monkeypatch.setattr(layers, "_not_keeping", lambda *_: nullcontext())
    wanted = gradients(model, images)
    assert len(wanted) > 20
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name


def test_an_input_is_kept_only_where_its_quantizer_keeps_nothing() -> None:
    convs = [nn.Conv2d(channels, 16, 3) for channels in (3, 16, 16)]
    network = nn.Sequential(convs[0], nn.SiLU(), convs[1], nn.SiLU(), nn.MaxPool2d(2), convs[2]).eval()
    model = insert(network, place(network, PlacementOptions(quantize_outputs=True)))
    images, inputs = small_images(2, size=32), {}
    calibrate(model, [images])
    for name, layer in quantized_layers(model).items():
        layer.register_forward_hook(
            lambda _, given, __, name=name: inputs.update({name: weakref.ref(given[0].untyped_storage())})
        )
    loss = model.train()(images).square().mean()
    kept = {name: reference() is not None for name, reference in inputs.items()}
    assert kept == {
        "0": True,
        "2": False,
        "5": True,
    }  # the images, which need no gradient, and what was pooled
    first, second = (
        torch.autograd.grad(loss, model.get_parameter("2.weight"), retain_graph=True) for _ in range(2)
    )
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("kept", [True, False])
def test_the_quantized_input_of_a_layer_is_not_kept(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if kept:  # the check below sees the memory that torch itself would hold
        monkeypatch.setattr(layers, "_not_keeping", lambda *_: nullcontext())
    model, alive, direct = small_quantized().train(), {}, set()
    for name, layer in quantized_layers(model).items():
        assert layer.input_grid

        def watch(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor, name: str = name) -> None:
            alive[name] = weakref.ref(inputs[0].untyped_storage())
            if "FakeQuantize" in type(inputs[0].grad_fn).__name__:
                direct.add(name)

        layer.register_forward_hook(watch)
    output = model(small_images())
    assert len(alive) == len(quantized_layers(model))
    assert len(direct) >= 3
    assert [alive[name]() is not None for name in direct] == [kept] * len(direct)
    output.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_a_quantizer_keeps_the_type_of_its_input(dtype: torch.dtype) -> None:
    quantizer, kept = FakeQuantize(), []
    quantizer.mode = Mode.QUANTIZE
    quantizer.set_scale(0.03)
    x = torch.randn(3, 4, 50, 50).to(dtype).requires_grad_()
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", dtype),
    ):
        y = quantizer(x)
    assert [tensor.dtype for tensor in kept if tensor.numel() > 1] == [dtype]
    g = torch.randn(x.shape)
    y.backward(g)
    exact = x.detach().float().requires_grad_()
    found, quantizer.log_scale.grad = quantizer.log_scale.grad, None
    quantizer(exact).backward(g)
    assert x.grad is not None
    assert exact.grad is not None
    assert torch.equal(x.grad, exact.grad.to(dtype))
    assert torch.equal(found, quantizer.log_scale.grad)
