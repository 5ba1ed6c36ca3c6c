"""Fake quantization against pytorch-quantization, a plain-torch LSQ, and its own promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_networks import small_images, small_net
from torch import nn

from core.grid import INT8_WEIGHTS, Grid
from models import build_detector, fold_detector
from quant import FakeQuantize, Mode, WeightFakeQuantize, insert, place
from quant.calibration.observers import choose_weight_scale
from quant.fake_quantize import MAX_SCALE, MIN_SCALE
from quant.rounding import round_to_grid

WIDTHS = range(2, 9)
SCALES = st.floats(2.0**-20, 2.0**20, allow_nan=False)


def switched_on(quantizer, *scale):
    quantizer.set_scale(*scale)
    quantizer.mode = Mode.QUANTIZE
    return quantizer


def lsq(x, log_scale, low, high):
    """LSQ (arXiv:1902.08153) as its equations stand, without its gradient factor: autograd does the rest."""
    step = log_scale.exp()
    v = x / step
    code = torch.round(v).detach()
    inside = (code >= low) & (code <= high)
    return torch.where(inside, v + (code - v).detach(), code.clamp(low, high)) * step


# -- two kernels


@given(SCALES, st.sampled_from(WIDTHS), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_a_scale_on_the_device_gives_the_same_bits_as_one_read_from_it(scale, bits, seed):
    """On a GPU the scale is not read as a number, since that would wait; the result must not change by that."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x = torch.randn(500, generator=torch.Generator().manual_seed(seed)) * scale * high
    step = torch.tensor(scale)
    y = round_to_grid(x, step, Grid(bits))
    assert torch.equal(y, torch.fake_quantize_per_tensor_affine(x, float(step), 0, low, high))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_quantizing_on_a_gpu_does_not_wait_for_it():
    quantizer = switched_on(FakeQuantize().cuda(), 0.1)
    x = torch.randn(64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            y = quantizer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(y.cpu(), switched_on(FakeQuantize(), 0.1)(x.cpu()))


# -- off


def test_off_hands_on_the_same_tensor_object():
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    activation, weights = FakeQuantize(), WeightFakeQuantize(4)
    activation.set_scale(0.1)
    weights.set_scale(torch.full((4,), 0.1), weight)
    assert activation(x) is x
    assert weights(weight) is weight
    activation.mode = Mode.OBSERVE
    assert activation(x) is x


def test_whole_detector_with_all_quantizers_off_is_bit_identical():
    torch.manual_seed(0)
    network = fold_detector(build_detector("yolov9t", 3)).network
    images = torch.rand(1, 3, 64, 64)
    model = insert(network, place(network)).eval()
    with torch.no_grad():
        for expected, got in zip(network(images), model(images), strict=True):
            assert torch.equal(expected[0], got[0])
            assert torch.equal(expected[1], got[1])


def test_off_leaves_a_float64_network_in_float64():
    network = small_net().double()
    model = insert(network, place(network)).eval()
    images = small_images().double()
    assert torch.equal(model(images), network(images))


# -- forward


@pytest.mark.parametrize("bits", WIDTHS)
def test_activations_equal_pytorch_quantization(bits):
    nvidia = pytest.importorskip(
        "pytorch_quantization.tensor_quant", reason="pytorch-quantization 2.1.3 is not installed"
    )
    x = torch.randn(64, 33) * 2.0
    amax = torch.tensor(3.7)
    high = 2 ** (bits - 1) - 1
    quantizer = switched_on(FakeQuantize(Grid(bits)), amax / high)
    # its narrow_range=False grid is ours: [-2^(bits-1), 2^(bits-1) - 1]
    expected = nvidia.fake_tensor_quant(x, amax, bits, False, False)
    torch.testing.assert_close(quantizer(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("axis", [0, 1])
def test_weights_equal_pytorch_quantization_per_channel(bits, axis):
    nvidia = pytest.importorskip(
        "pytorch_quantization.tensor_quant", reason="pytorch-quantization 2.1.3 is not installed"
    )
    descriptor = nvidia.QuantDescriptor(num_bits=bits, axis=axis)
    assert (
        descriptor.narrow_range is False
    )  # its weights are narrow through the `narrow_range` argument below
    weight = torch.randn(8, 6, 3, 3)
    others = [d for d in range(4) if d != axis]
    amax = weight.abs().amax(others, keepdim=True) * 0.8
    quantizer = WeightFakeQuantize(weight.shape[axis], axis, Grid(bits, symmetric=True))
    switched_on(quantizer, amax.flatten() / quantizer.grid.high, weight)
    expected = nvidia.fake_tensor_quant(weight, amax, bits, False, True)
    torch.testing.assert_close(quantizer(weight), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_fill_the_documented_ranges(bits):
    x = torch.linspace(-1000.0, 1000.0, 4001)
    activation = switched_on(FakeQuantize(Grid(bits)), 1.0)
    weights = switched_on(WeightFakeQuantize(1, grid=Grid(bits, symmetric=True)), torch.ones(1), x[None])
    assert activation(x).unique().tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    assert weights(x[None]).unique().tolist() == list(range(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1)))


def test_int8_ranges_are_those_of_the_engines():
    assert (FakeQuantize().grid.low, FakeQuantize().grid.high) == (-128, 127)
    assert (WeightFakeQuantize(1).grid.low, WeightFakeQuantize(1).grid.high) == (-127, 127)


@pytest.mark.parametrize("bits", [1, 9, 16])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match=f"{bits} bits .* 2 to 8"):
        FakeQuantize(Grid(bits))
    with pytest.raises(ValueError, match=f"{bits} bits .* 2 to 8"):
        WeightFakeQuantize(1, grid=Grid(bits, symmetric=True))


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), scale=SCALES, seed=st.integers(0, 2**31))
def test_quantizing_twice_changes_nothing(bits, scale, seed):
    x = torch.randn(256, generator=torch.Generator().manual_seed(seed)) * scale * 2 ** (bits - 1)
    activation = switched_on(FakeQuantize(Grid(bits)), scale)
    once = activation(x)
    assert torch.equal(activation(once), once)
    weights = switched_on(
        WeightFakeQuantize(4, grid=Grid(bits, symmetric=True)), torch.full((4,), scale), x.reshape(4, -1)
    )
    once = weights(x.reshape(4, -1))
    assert torch.equal(weights(once), once)


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(2, 8), scale=SCALES, seed=st.integers(0, 2**31))
def test_error_is_at_most_half_a_step_inside_the_range(bits, scale, seed):
    quantizer = switched_on(FakeQuantize(Grid(bits)), scale)
    step = float(quantizer.scale)
    x = (
        (torch.rand(256, generator=torch.Generator().manual_seed(seed)) - 0.5)
        * 2
        * step
        * quantizer.grid.high
    )
    assert float((quantizer(x) - x).detach().abs().max()) <= step * 0.5001


def test_with_and_without_gradients_the_values_are_the_same():
    quantizer = switched_on(FakeQuantize(), 0.037)
    x = torch.randn(1000)
    with torch.no_grad():
        plain = quantizer(x)
    assert torch.equal(quantizer(x.clone().requires_grad_()), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_type_of_the_input_comes_back(dtype):
    x = torch.randn(4, 16, dtype=dtype)
    activation = switched_on(FakeQuantize(), 0.05)
    weights = switched_on(WeightFakeQuantize(4), torch.full((4,), 0.05), x)
    for quantizer in (activation, weights):
        y = quantizer(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y, quantizer(x.float()).to(dtype), rtol=0, atol=0)
    x.requires_grad_()
    activation(x).sum().backward()
    assert x.grad.dtype == dtype


def test_bfloat16_autocast_gives_float32_and_a_float32_scale_gradient():
    quantizer = switched_on(FakeQuantize(), 0.05)
    conv = nn.Conv2d(3, 4, 1)
    with torch.autocast("cpu", torch.bfloat16):
        y = quantizer(conv(torch.randn(1, 3, 4, 4)))
    assert y.dtype == torch.float32
    y.float().sum().backward()
    assert quantizer.log_scale.grad.dtype == torch.float32
    assert torch.isfinite(conv.weight.grad).all()


# -- gradients


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_activation_gradients_equal_lsq(bits):
    quantizer = switched_on(FakeQuantize(Grid(bits)), 0.11)
    spread = quantizer.scale * quantizer.grid.high * 0.8  # a good share is clipped
    x = (torch.randn(3, 5, 7, 7) * spread).requires_grad_()
    g = torch.randn(3, 5, 7, 7)
    quantizer(x).backward(g)

    x64 = x.detach().double().requires_grad_()
    log_scale = quantizer.log_scale.detach().double().requires_grad_()
    expected = lsq(x64, log_scale, quantizer.grid.low, quantizer.grid.high)
    expected.backward(g.double())

    assert ((x.grad == 0) & (g != 0)).any()
    torch.testing.assert_close(quantizer(x).double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(quantizer.log_scale.grad.double(), log_scale.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_gradients_equal_lsq(bits, axis):
    quantizer = WeightFakeQuantize(6, axis, Grid(bits, symmetric=True))
    shape = (6, 5, 3, 3) if axis == 0 else (5, 6, 3, 3)
    weight = torch.randn(shape)
    switched_on(quantizer, quantizer.amax_scale(weight) * torch.linspace(0.3, 1.1, 6), weight)
    weight.requires_grad_()
    g = torch.randn(shape)
    quantizer(weight).backward(g)

    weight64 = weight.detach().double().requires_grad_()
    log_scale = quantizer.log_scale.detach().double().requires_grad_()
    per_channel = log_scale.reshape((-1, 1, 1, 1) if axis == 0 else (1, -1, 1, 1))
    expected = lsq(weight64, per_channel, quantizer.grid.low, quantizer.grid.high)
    expected.backward(g.double())

    assert ((weight.grad == 0) & (g != 0)).any()
    torch.testing.assert_close(weight.grad.double(), weight64.grad, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(quantizer.log_scale.grad.double(), log_scale.grad, rtol=1e-4, atol=1e-5)


def test_scale_gradient_of_values_that_can_be_counted_by_hand():
    """Step 1, grid [-2, 1]: 0.3 -> 0, 0.8 -> 1, 5 -> 1 (clipped), -7 -> -2 (clipped).

    s * dy/ds is -0.3, 0.2, 1 and -2, in all -1.1.
    """
    quantizer = switched_on(FakeQuantize(Grid(2)), 1.0)
    x = torch.tensor([0.3, 0.8, 5.0, -7.0], requires_grad=True)
    y = quantizer(x)
    y.sum().backward()
    assert y.tolist() == [0.0, 1.0, 1.0, -2.0]
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert float(quantizer.log_scale.grad) == pytest.approx(-1.1, abs=1e-6)


def test_a_step_against_the_gradient_lowers_the_quantization_error():
    torch.manual_seed(0)
    x = torch.randn(5000)
    quantizer = switched_on(FakeQuantize(Grid(4)), 1.5)  # much too coarse
    optimizer = torch.optim.Adam([quantizer.log_scale], 0.02)
    errors = []
    for _ in range(100):
        loss = (quantizer(x) - x).square().mean()
        errors.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert errors[-1] < 0.1 * errors[0]


def test_gradient_reaches_the_input_when_the_scale_is_fixed():
    quantizer = switched_on(FakeQuantize(learned=False), 0.1)
    x = torch.tensor([0.5, 100.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [1.0, 0.0]
    assert quantizer.log_scale.grad is None


# -- scales


@pytest.mark.parametrize("scale", [0.0, -0.1, math.nan, math.inf, -math.inf])
def test_a_scale_that_is_not_positive_and_finite_is_refused(scale):
    activation, weights, weight = FakeQuantize(), WeightFakeQuantize(3), torch.randn(3, 4)
    activation.set_scale(0.5)
    with pytest.raises(ValueError, match="not positive and finite"):
        activation.set_scale(scale)
    with pytest.raises(ValueError, match="not positive and finite"):
        weights.set_scale(torch.tensor([0.1, scale, 0.1]), weight)
    assert float(activation.scale) == pytest.approx(0.5)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-9, 1e29))
def test_scales_survive_the_log_domain(scale):
    quantizer = FakeQuantize()
    quantizer.set_scale(scale)
    assert float(quantizer.scale) == pytest.approx(scale, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-38, 1e38])
def test_extreme_scales_are_limited_to_what_float32_and_engines_hold(scale):
    quantizer = FakeQuantize()
    quantizer.set_scale(scale)
    assert MIN_SCALE * 0.999 <= float(quantizer.scale) <= MAX_SCALE * 1.001


def test_scales_stay_positive_whatever_the_optimizer_does():
    quantizer = switched_on(FakeQuantize(), 1e-3)
    optimizer = torch.optim.SGD([quantizer.log_scale], lr=5.0)
    for _ in range(20):
        optimizer.zero_grad()
        quantizer.log_scale.grad = torch.tensor(1.0)
        optimizer.step()
        assert float(quantizer.scale) > 0.0
    for _ in range(40):
        quantizer.log_scale.grad = torch.tensor(-1.0)
        optimizer.step()
        assert math.isfinite(float(quantizer.scale))


def test_weight_scales_that_are_not_learned_follow_the_weights_in_training_only():
    weight = torch.randn(4, 10)
    quantizer = WeightFakeQuantize(4, learned=False)
    calibrated = weight.abs().amax(1) / 127 * torch.tensor([1.0, 0.9, 0.8, 0.5])
    switched_on(quantizer, calibrated, weight)
    quantizer.eval()(weight * 3)
    torch.testing.assert_close(quantizer.scale, calibrated)
    quantizer.train()(weight * 3)
    torch.testing.assert_close(quantizer.scale, calibrated * 3)
    assert not quantizer.log_scale.requires_grad


@pytest.mark.parametrize("dead", [0.0, 1e-12])
def test_a_dead_channel_that_comes_alive_gets_a_scale_that_fits_it(dead):
    """Its calibrated step (1, by convention) says nothing about the weights it will have."""
    weight = torch.randn(3, 10)
    weight[1] = dead
    quantizer = WeightFakeQuantize(3, learned=False)
    switched_on(quantizer, choose_weight_scale(weight, 0, "mse", INT8_WEIGHTS), weight)
    quantizer.train()
    torch.testing.assert_close(quantizer(weight)[1], torch.zeros(10), rtol=0, atol=1e-9)
    weight[1] = 0.01 * torch.randn(10)
    error = (quantizer(weight)[1] - weight[1]).detach().abs().max()
    assert float(error) <= float(weight[1].abs().max()) / 127


def test_a_dead_channel_has_no_say_in_its_scale():
    weight = torch.zeros(2, 10)
    assert WeightFakeQuantize(2).amax_scale(weight).tolist() == [1.0, 1.0]
