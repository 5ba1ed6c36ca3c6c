"""SiLU in its quantizer and weights together: the bits of single calls, float64 loops, what graphs and hooks see."""

from __future__ import annotations

import copy
import dataclasses
import math
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from quant_networks import small_images, small_quantized
from test_quant_native import same_bits
from test_quant_rounding import LAYOUTS
from torch import Tensor, fx, nn

from core.errors import KernelError
from core.grid import Grid
from core.machine import CPU_INFO
from quant import (
    FakeQuantize,
    Mode,
    PlacementOptions,
    WeightFakeQuantize,
    calibrate,
    fusing,
    insert,
    place,
    quantized_layers,
    set_mode,
)
from quant.finetuning.distillation import with_features
from quant.native.kernel import Kernel, choose_kernel
from quant.rounding import codes_of, gradients, round_to_grid, silu_gradients, silu_kernel, silu_to_grid
from quant.weights import quantized_weights

SHAPES = [
    (2, 4, 16, 16),
    (3, 5, 128, 32),
]  # torch computes the last values of other sizes one by one, see below
DENSE = ("contiguous", "channels-last")


def has_kernel() -> bool:
    """Whether there is a native kernel, for a processor with joined products and sums."""
    try:
        choose_kernel("native")
    except KernelError:
        return False
    choose_kernel("auto")
    return platform.machine() == "aarch64" or "fma" in re.findall(r"\w+", CPU_INFO.read_text())


needs_silu = pytest.mark.skipif(not has_kernel(), reason="no native kernel, or a processor without FMA")


@pytest.fixture(autouse=True)
def auto() -> Iterator[None]:
    choose_kernel("auto")
    yield
    choose_kernel("auto")


def kernel_of(x: Tensor, scale: Tensor) -> Kernel:
    kernel = silu_kernel(x, scale)
    assert kernel is not None
    return kernel


def plain(model: fx.GraphModule) -> fx.GraphModule:
    """A copy of a model in which SiLU and its quantizer are called one after the other."""
    model = copy.deepcopy(model)
    return fx.GraphModule(model, model.graph).train(model.training)


def num_silu(function: Callable[[], object]) -> int:
    """How often torch's own SiLU is called."""
    with torch.profiler.profile() as profiler:
        function()
    return sum(event.count for event in profiler.key_averages() if event.key == "aten::silu")


# -- the arithmetic


@needs_silu
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_codes_and_gradients_are_those_of_two_passes_bit_by_bit(
    layout: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * 4
    special = [0.0, -0.0, math.inf, -math.inf, 1e-45, -1e-45, 87.5, 88.8, 103.9, 104.1, 3e38]
    x.view(-1)[: 2 * len(special)] = torch.tensor([*special, *(-value for value in special)])
    x = LAYOUTS[layout](x.to(dtype))
    g = torch.empty_like(x, dtype=torch.float32).copy_(torch.randn(x.shape))
    for grid in (Grid(), Grid(4), Grid(signed=False)):
        for scale in (torch.tensor(0.0173), torch.tensor(0.5), torch.tensor(1e-30)):
            kernel, activated = kernel_of(x, scale), F.silu(x)
            y, codes = silu_to_grid(x, scale, grid, kernel)
            expected = round_to_grid(activated, scale, grid)
            assert y.stride() == codes.stride() == x.stride()
            assert same_bits(y, expected), (grid, scale)
            assert torch.equal(codes, codes_of(expected, scale, dtype=codes.dtype)), (grid, scale)
            for learned in (True, False):
                found, of_scale = silu_gradients(g, x, scale, grid, learned, kernel)
                passed, of_scale_expected = gradients(g, activated, scale, grid, learned)
                expected = torch.ops.aten.silu_backward(passed, x)
                known = ~expected.isnan() & x.isfinite()  # torch's gradient at minus infinity is no number
                assert bool((~known).sum() <= 4)
                assert same_bits(found[known], expected[known]), (grid, scale)
                assert (of_scale is None) == (of_scale_expected is None) == (not learned)


@needs_silu
def test_gradients_are_those_of_the_formula_in_float64() -> None:
    torch.manual_seed(0)
    x, g, scale, high = torch.randn(3000) * 3, 1 + 0.1 * torch.randn(3000), 0.0173, 127
    kernel = kernel_of(x, torch.tensor(scale))
    y, _ = silu_to_grid(x, torch.tensor(scale), Grid(), kernel)
    grad_x, grad_log_scale = silu_gradients(g, x, torch.tensor(scale), Grid(), True, kernel)
    assert grad_log_scale is not None
    terms, num_clipped = [], 0
    for value, along, rounded, gradient in zip(
        x.tolist(), g.tolist(), y.tolist(), grad_x.tolist(), strict=True
    ):
        sigmoid = 1 / (1 + math.exp(-value))
        activated, inside = value * sigmoid, value * sigmoid / scale < high + 0.5
        assert abs(rounded - min(activated, scale * high)) <= scale * 0.5001
        slope = sigmoid * (1 + value * (1 - sigmoid))
        assert gradient == pytest.approx(along * slope if inside else 0.0, rel=1e-5, abs=1e-6)
        terms.append(along * (rounded - activated if inside else rounded))
        num_clipped += not inside
    assert 100 < num_clipped < 2000
    assert float(grad_log_scale) == pytest.approx(math.fsum(terms), rel=1e-5)


@needs_silu
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    x, g, scale = torch.randn(3, 7, 130, 91), torch.randn(3, 7, 130, 91), torch.tensor(0.0173)
    found = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            kernel = kernel_of(x, scale)
            y, codes = silu_to_grid(x, scale, Grid(), kernel)
            found.append((y, codes, *silu_gradients(g, x, scale, Grid(), True, kernel)))
        finally:
            torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@needs_silu
def test_the_last_values_that_torch_computes_one_by_one_differ_by_rounding_alone() -> None:
    x, scale = torch.randn(31), torch.tensor(1e-3)
    y, _ = silu_to_grid(x, scale, Grid(), kernel_of(x, scale))
    assert float((y - round_to_grid(F.silu(x), scale, Grid())).abs().max()) <= 1e-3


@pytest.mark.parametrize("x", [torch.zeros(4, dtype=torch.float16), torch.zeros(2, 3, 8, 8)[..., ::2]])
def test_tensors_that_the_kernel_does_not_read_are_left_to_torch(x: Tensor) -> None:
    assert silu_kernel(x, torch.tensor(1.0)) is None


# -- the network


@needs_silu
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_outputs_and_gradients_are_those_of_the_plain_network(training: bool, autocast: bool) -> None:
    model, images = small_quantized().train(training), small_images(2, size=32)
    separate, found = plain(model), []
    for network in (model, separate):
        given = images.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            output = network(given)
        output.float().square().mean().backward()
        of_parameters = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        found.append((output, given.grad, of_parameters))
        with torch.no_grad():
            assert torch.equal(network(images), fx.Interpreter(network).run(images))
    (output, of_images, ours), (expected, of_images_expected, theirs) = found
    assert torch.equal(output, expected)
    assert torch.equal(of_images, of_images_expected)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 20
    for name, gradient in theirs.items():
        if name.startswith("activation_quantizers"):  # the sum over the values has another order
            assert float(ours[name]) == pytest.approx(float(gradient), rel=1e-4, abs=1e-7), name
        else:
            assert torch.equal(ours[name], gradient), name


@needs_silu
def test_silu_is_fused_where_only_its_quantizer_reads_it() -> None:
    model, images = small_quantized().eval(), small_images(1, size=32)
    alone, shared = 0, 0
    for node in model.graph.nodes:
        if node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), nn.SiLU):
            (reader, *others) = node.users
            is_alone = not others and str(reader.target).startswith("activation_quantizers")
            alone, shared = alone + is_alone, shared + (not is_alone)
    assert alone >= 3
    assert shared >= 1
    assert num_silu(lambda: plain(model)(images)) == alone + shared
    for network in (model, copy.deepcopy(model), with_features(model, [])):
        assert num_silu(lambda network=network: network(images)) == shared


@needs_silu
@pytest.mark.parametrize("mode", [Mode.OFF, Mode.OBSERVE])
def test_switched_off_the_network_is_the_float_one(mode: Mode) -> None:
    model, images = small_quantized().eval(), small_images(1, size=32)
    set_mode(model, mode)
    assert torch.equal(model(images), plain(model)(images))


@needs_silu
def test_without_the_kernel_the_network_computes_the_same() -> None:
    model, images = small_quantized().eval(), small_images(1, size=32)
    expected = model(images)
    choose_kernel("torch")
    assert torch.equal(model(images), expected)


@needs_silu
def test_hooks_see_what_they_see_in_the_plain_network() -> None:
    model, images = small_quantized().eval(), small_images(1, size=32)
    seen: dict[str, list[list[Tensor]]] = {"quantizer": [], "SiLU": []}
    for kind, found in seen.items():
        for network in (model, plain(model)):
            values: list[Tensor] = []
            handles = [
                module.register_forward_pre_hook(lambda _, given, to=values: to.append(given[0].clone()))
                if kind == "quantizer"
                else module.register_forward_hook(lambda _, __, result, to=values: to.append(result.clone()))
                for module in network.modules()
                if isinstance(module, FakeQuantize if kind == "quantizer" else nn.SiLU)
            ]
            network(images)
            found.append(values)
            for handle in handles:
                handle.remove()
    for ours, theirs in seen.values():
        assert len(ours) == len(theirs) >= 4
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@needs_silu
def test_a_changed_graph_is_fused_again() -> None:
    model, images = small_quantized().eval(), small_images(1, size=32)
    before = num_silu(lambda: model(images))
    silu = next(
        node
        for node in model.graph.nodes
        if node.op == "call_module"
        and isinstance(model.get_submodule(str(node.target)), nn.SiLU)
        and len(node.users) == 1
    )
    with model.graph.inserting_after(silu):
        model.graph.call_method("sum", (silu,))  # a second reader
    model.recompile()
    assert num_silu(lambda: model(images)) == before + 1


# -- weights


class Twice(nn.Module):
    """A layer that is called twice, one of 4 bits, and one whose output nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.narrow = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 1)
        self.again, self.unread = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 16, 1)
        self.last = nn.Conv2d(32, 16, 1)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.act(self.narrow(self.act(self.first(x))))
        x = self.act(self.again(self.act(self.again(x))))
        return self.last(x), self.unread(x)


def of_twice(learn_scales: bool) -> tuple[fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    network, images = Twice().eval(), small_images(2, size=16)
    placement = place(network, PlacementOptions(quantize_outputs=True))
    sites = [
        dataclasses.replace(site, grid=Grid(4, symmetric=True)) if site.layer == "narrow" else site
        for site in placement.weights
    ]
    model = insert(network, dataclasses.replace(placement, weights=sites), learn_scales)
    calibrate(model, [images])
    return model.train(), images


def gradients_of(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    read, _ = network(images)
    read.square().mean().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@needs_silu
@pytest.mark.parametrize("learn_scales", [True, False])
@pytest.mark.parametrize("together", [1, 2, 16])
def test_weights_that_are_quantized_together_have_the_bits_of_those_quantized_alone(
    learn_scales: bool, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusing, "NUM_TOGETHER", together)
    model, images = of_twice(learn_scales)
    separate = plain(model)
    with torch.no_grad():
        for network in (model, separate):
            network.get_parameter("first.weight").mul_(1.3)  # scales that are not learned follow
    expected = gradients_of(separate, images)
    with monkeypatch.context() as patch:  # nothing is left to the layers
        patch.setattr(WeightFakeQuantize, "forward", lambda *_: pytest.fail("a weight was quantized alone"))
        found = gradients_of(model, images)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found if ".log_scale" not in name)
    scales = [name for name in found if name.endswith("weight_quantizer.log_scale")]
    assert len(scales) == (4 if learn_scales else 0)
    for name in scales:  # the one of the layer that is called twice gets one sum instead of two
        tolerance = 1e-5 if name.startswith("again") else 0.0
        assert torch.allclose(found[name], expected[name], rtol=tolerance, atol=tolerance * 1e-3), name
    assert not any(name.startswith("unread") for name in found)
    state, other = model.state_dict(), separate.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)


@needs_silu
def test_a_watched_quantizer_and_a_watched_layer_are_called() -> None:
    model, images = of_twice(True)
    seen: list[tuple[int, ...]] = []
    handles = [
        quantized_layers(model)["again"].weight_quantizer.register_forward_hook(
            lambda _, given, __: seen.append(tuple(given[0].shape))
        ),
        quantized_layers(model)["first"].register_forward_pre_hook(
            lambda _, given: seen.append(tuple(given[0].shape))
        ),
    ]
    expected = gradients_of(model, images)
    assert seen == [(2, 3, 16, 16), (32, 32, 3, 3), (32, 32, 3, 3)]
    for handle in handles:
        handle.remove()
    found = gradients_of(model, images)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-8) for name in expected)


@needs_silu
@pytest.mark.parametrize("cause", ["torch", "off", "no gradient"])
def test_layers_quantize_their_weights_themselves(cause: str) -> None:
    model, _ = of_twice(True)
    layers = list(quantized_layers(model).values())
    assert all(weight is not None for weight in quantized_weights(*layers))
    if cause == "torch":
        choose_kernel("torch")
    if cause == "off":
        set_mode(model, Mode.OFF)
    with torch.set_grad_enabled(cause != "no gradient"):
        assert quantized_weights(*layers) == (None,) * len(layers)
