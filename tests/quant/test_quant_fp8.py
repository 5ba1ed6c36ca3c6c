"""FP8 E4M3 as a kind of grid: against all 256 codes written down, ml_dtypes, slow searches and autograd."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import yaml
from quant_networks import small_images, small_net
from torch import Tensor

from core.errors import CalibrationError, ConfigError, PlacementError, PolicyError
from core.grid import FP8_E4M3, FP8_WEIGHTS, INT8, INT8_WEIGHTS, Grid
from quant import (
    FakeQuantize,
    Mode,
    Placement,
    PlacementOptions,
    Rule,
    WeightFakeQuantize,
    calibrate,
    dump_placement,
    insert,
    load_placement,
    place,
    quantized_layers,
    reconstruct,
    set_mode,
)
from quant.calibration.observers import Histogram, choose_scale, choose_weight_scale
from quant.codes import activation_codes
from quant.finetuning.oscillation import OscillationTracker, dampening_loss


def table() -> list[float]:
    """The value of each code 0..255 by arXiv:2209.05433, table 1: exponent bias 7, S.1111.111 is NaN."""
    values = []
    for code in range(256):
        sign, exponent, mantissa = -1.0 if code >> 7 else 1.0, (code >> 3) & 15, code & 7
        if exponent == 15 and mantissa == 7:
            values.append(math.nan)
        elif exponent == 0:
            values.append(sign * mantissa / 8 * 2.0**-6)
        else:
            values.append(sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return values


LEVELS = [value for value in table()[:127]]  # magnitudes in rising order: the place is the code itself


def nearest(x: float) -> float:
    """The level closest to x, of two the one with the even code; saturating."""
    magnitude = min(abs(x), 448.0)
    best = min(range(127), key=lambda code: (abs(LEVELS[code] - magnitude), code % 2))
    return math.copysign(LEVELS[best], x)


def fp8_placement(*rules: Rule) -> Placement:
    """Everything in FP8, the input included, unless other rules say otherwise."""
    return place(small_net(), PlacementOptions(grid="fp8"), (Rule("input.x", grid="fp8"), *rules))


# -- the grid


def test_every_code_is_a_fixed_point_and_the_table_is_that_of_ml_dtypes() -> None:
    theirs = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(theirs, np.asarray(table(), np.float32), equal_nan=True)
    values = torch.tensor([value for value in table() if not math.isnan(value)])
    assert torch.equal(FP8_E4M3.codes(values, 1.0), values)
    assert (FP8_E4M3.low, FP8_E4M3.high, FP8_E4M3.name) == (-448, 448, "FP8")
    assert len(set(values.tolist())) == 253


def test_values_between_codes_go_to_the_nearest_and_halves_to_the_even_code() -> None:
    halves = [(low + high) / 2 for low, high in itertools.pairwise(LEVELS)]
    close = [value * factor for value in halves for factor in (1 - 2**-20, 1 + 2**-20)]
    x = torch.tensor(
        [*halves, *close, 448.1, 460.0, 464.0, 480.0, 1e9, 1e-9, *torch.randn(999).mul(90).tolist()]
    )
    x = torch.cat((x, -x))
    found = FP8_E4M3.codes(x, 1.0)
    assert found.tolist() == [nearest(value) for value in x.tolist()]
    theirs = x.clamp(-448, 448).numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(found.numpy(), theirs)


def test_a_scale_divides_before_and_multiplies_after() -> None:
    x = torch.randn(3, 50) * 7
    scale = torch.tensor([[0.01], [0.02], [3.0]])
    found = FP8_E4M3.round(x, scale)
    for row in range(3):
        expected = [nearest(float(v / scale[row, 0])) for v in x[row]]
        assert torch.equal(found[row], torch.tensor(expected) * scale[row, 0])


def test_ranks_number_the_codes_and_lead_back() -> None:
    codes = torch.tensor([-value for value in LEVELS[:0:-1]] + LEVELS)
    ranks = FP8_E4M3.ranks(codes)
    assert ranks.tolist() == list(range(-126, 127))
    assert torch.equal(FP8_E4M3.ranked(ranks), codes)
    whole = torch.arange(-128.0, 128.0)
    assert torch.equal(INT8.ranks(whole).float(), whole)
    assert torch.equal(INT8.ranked(INT8.ranks(whole)), whole)


@pytest.mark.parametrize("arguments", [{"bits": 4}, {"signed": False}])
def test_other_fp8_grids_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="FP8 grid has 8 bits"):
        Grid(kind="fp8", **arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="integer, fp8"):
        Grid(kind="fp4")


# -- quantizers


def switched_on(quantizer: FakeQuantize | WeightFakeQuantize, *scale: Tensor | float) -> FakeQuantize:
    quantizer.set_scale(*scale)  # type: ignore[arg-type]
    quantizer.mode = Mode.QUANTIZE
    return quantizer  # type: ignore[return-value]


def straight_through(x: Tensor, log_scale: Tensor) -> Tensor:
    """y = s q(x / s) with dq/dx of 1 inside and 0 outside, by autograd and the table."""
    scale = log_scale.exp()
    v = x / scale
    code = torch.tensor([nearest(value) for value in v.flatten().tolist()]).reshape(v.shape)
    return torch.where(v.abs() <= 448, v + (code - v).detach(), code) * scale


def test_activation_gradients_are_those_of_autograd_through_the_table() -> None:
    x = torch.randn(4, 64) * 300
    x[0, :2] = torch.tensor([448.0, -448.0])
    weight = torch.randn_like(x)
    quantizer = switched_on(FakeQuantize(FP8_E4M3), 0.7)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    log_scale = quantizer.log_scale.detach().clone().requires_grad_()
    y, wanted = quantizer(mine), straight_through(theirs, log_scale)
    (y * weight).sum().backward()
    (wanted * weight).sum().backward()
    assert torch.equal(y, wanted)
    assert theirs.grad is not None
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=0)
    torch.testing.assert_close(quantizer.log_scale.grad, log_scale.grad, rtol=1e-4, atol=1e-3)
    assert 0 < int((theirs.grad == 0).sum()) < x.numel()
    with torch.no_grad():
        assert torch.equal(quantizer(x), wanted)


@pytest.mark.parametrize("axis", [0, 1])
def test_weight_gradients_are_those_of_autograd_through_the_table(axis: int) -> None:
    weight = torch.randn(5, 5, 3, 3)
    scales = torch.tensor([0.001, 0.002, 0.004, 0.01, 0.02])
    quantizer = WeightFakeQuantize(5, axis, FP8_WEIGHTS)
    quantizer.set_scale(scales, weight)
    quantizer.mode = Mode.QUANTIZE
    upstream = torch.randn_like(weight)
    mine, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    log_scale = quantizer.log_scale.detach().clone().requires_grad_()
    shape = [5 if dimension == axis else 1 for dimension in range(4)]
    y, wanted = quantizer(mine), straight_through(theirs, log_scale.reshape(shape))
    (y * upstream).sum().backward()
    (wanted * upstream).sum().backward()
    assert torch.equal(y, wanted)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=0)
    torch.testing.assert_close(quantizer.log_scale.grad, log_scale.grad, rtol=1e-3, atol=1e-4)


def test_weights_of_a_layer_have_one_scale_and_its_gradient() -> None:
    model = insert(small_net(), fp8_placement())
    calibrate(model, [small_images()], weight_method="minmax")
    for layer in quantized_layers(model).values():
        quantizer, weight = layer.weight_quantizer, layer.weight.detach().clone()
        assert quantizer.scale.tolist() == pytest.approx([float(weight.abs().max()) / 448])
        with torch.no_grad():
            layer.weight.mul_(3)
        quantizer.follow(layer.weight)
        assert quantizer.scale.tolist() == pytest.approx([3 * float(weight.abs().max()) / 448])
    upstream = torch.randn_like(layer.weight)
    log_scale = quantizer.log_scale.detach().clone().requires_grad_()
    (quantizer(layer.weight) * upstream).sum().backward()
    (straight_through(layer.weight.detach(), log_scale.reshape(1, 1, 1, 1)) * upstream).sum().backward()
    torch.testing.assert_close(quantizer.log_scale.grad, log_scale.grad, rtol=1e-3, atol=1e-4)


def test_layers_multiply_values_not_whole_numbers() -> None:
    """An FP8 code such as 0.4375 must not be rounded to an integer on the way, in evaluation and under autocast."""
    images = small_images()
    model = insert(small_net(), fp8_placement())
    calibrate(model, [images])
    with torch.no_grad():
        plain = model(images)
        with torch.autocast("cpu"):
            mixed = model(images)
    reference = insert(small_net(), fp8_placement()).eval()
    reference.load_state_dict(model.state_dict())
    set_mode(reference, Mode.QUANTIZE)
    for name, layer in quantized_layers(reference).items():
        steps = layer.weight_quantizer.steps(layer.weight.ndim)
        values = [nearest(v) for v in (layer.weight / steps).flatten().tolist()]
        layer.weight.data = torch.tensor(values).reshape(layer.weight.shape) * steps
        layer.weight_quantizer.mode = Mode.OFF
        assert not bool((torch.tensor(values) == torch.tensor(values).round()).all()), name
    with torch.no_grad():
        torch.testing.assert_close(plain, reference(images), rtol=1e-4, atol=1e-5)
    # float layers compute in bfloat16 there: 8 bits, so that a few values fall to a neighbouring code
    assert float((mixed.float() - plain).norm() / plain.norm()) < 0.1


# -- scales


@pytest.mark.parametrize("kind", ["normal", "rectified", "outliers"])
def test_activation_scales_by_amax_and_by_least_squared_error(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(20_000, generator=generator)
    x = {"normal": x, "rectified": x.relu(), "outliers": torch.cat((x, torch.tensor([70.0, -100.0])))}[kind]
    histogram = Histogram()
    histogram.update(x)
    amax = float(x.abs().max())
    assert choose_scale(histogram, "minmax", FP8_E4M3).scale == pytest.approx(amax / 448)

    def error(scale: float) -> float:
        codes = (x.numpy() / scale).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        return float(((codes * scale - x.numpy()) ** 2).sum())

    found = choose_scale(histogram, "mse", FP8_E4M3)
    best = min(error(amax * fraction / 448) for fraction in np.geomspace(1 / 128, 1, 300))
    assert error(found.scale) <= best * 1.01
    with pytest.raises(ValueError, match="steps of equal size"):
        choose_scale(histogram, "entropy", FP8_E4M3)


def test_weight_scales_by_amax_and_by_least_squared_error() -> None:
    weight = (
        torch.randn(6, 40, generator=torch.Generator().manual_seed(5)) * torch.logspace(-3, 2, 6)[:, None]
    )
    amax = weight.abs().amax(1)
    torch.testing.assert_close(choose_weight_scale(weight, 0, "minmax", FP8_WEIGHTS), amax / 448)

    def errors(scale: Tensor) -> np.ndarray:
        steps = scale.double().numpy()[:, None]
        codes = (weight.double().numpy() / steps).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
        return np.asarray(((codes.astype(np.float64) * steps - weight.double().numpy()) ** 2).sum(1))

    found = errors(choose_weight_scale(weight, 0, "mse", FP8_WEIGHTS))
    tried = [errors(amax * fraction / 448) for fraction in np.linspace(1, 0.4, 128)]
    assert np.all(found <= np.min(tried, axis=0) * 1.0001)


def test_entropy_is_refused_before_an_image_is_read() -> None:
    model = insert(small_net(), fp8_placement(Rule("stem.act", observer="entropy")))
    with pytest.raises(CalibrationError, match=r"'stem\.act' is FP8.*choose mse"):
        calibrate(model, iter([]))


# -- placement


def test_a_rule_sets_the_kind_of_a_group_and_of_the_weights_that_read_it() -> None:
    placement = place(small_net(), PlacementOptions(unsigned=True), (Rule("stem.act", grid="fp8"),))
    kinds = {group.name: group.grid for group in placement.groups}
    assert kinds["stem.act"] == FP8_E4M3
    assert not kinds["input.x"].is_fp8
    for site in placement.weights:
        assert site.grid == (FP8_WEIGHTS if site.group == "stem.act" else INT8_WEIGHTS)
    assert any(site.group == "stem.act" for site in placement.weights)
    mixed = fp8_placement(Rule("stem.act", grid="integer", bits=4))
    assert {group.name: group.grid for group in mixed.groups}["stem.act"] == Grid(4)
    assert "(FP8, " in mixed.describe()
    with pytest.raises(PolicyError, match="4 bits; an FP8 grid has 8"):
        Rule("stem.act", grid="fp8", bits=4)
    with pytest.raises(PolicyError, match="expected one of integer, fp8"):
        Rule("stem.act", grid="int8")


@pytest.mark.parametrize(
    ("rules", "stem"),
    [
        ((), None),
        ((Rule("input.x", grid="integer"),), INT8_WEIGHTS),
        ((Rule("stem.conv", keep_float=False),), FP8_WEIGHTS),
        ((Rule("*", bits=8),), None),
    ],
)
def test_layers_that_read_the_image_stay_float_unless_a_rule_wants_codes(
    rules: tuple[Rule, ...], stem: Grid | None
) -> None:
    placement = place(small_net(), PlacementOptions(grid="fp8"), rules)
    grids = {site.layer: site.grid for site in placement.weights}
    assert grids.pop("stem.conv", None) == stem
    assert set(grids.values()) == {FP8_WEIGHTS}
    assert ("FP8 is too coarse" in placement.kept_float.get("stem.conv", "")) == (stem is None)
    assert ("input.x" in {group.name for group in placement.groups}) == (stem is not None)


def test_images_lose_more_in_fp8_than_in_int8() -> None:
    """The reason for the rule above: the mean squared rounding error of values spread evenly over [0, 1]."""
    image = torch.linspace(0, 1, 256)
    errors = {
        grid.name: float((grid.round(image, 1 / grid.high) - image).square().mean())
        for grid in (FP8_E4M3, INT8)
    }
    # steps of 2^-k relative to the next power of two in FP8, of 1/127 in INT8: step^2 / 12 each
    assert errors["INT8"] == pytest.approx((1 / 127) ** 2 / 12, rel=0.1)
    assert errors["FP8"] > 30 * errors["INT8"]


def test_a_plan_with_fp8_is_a_file(tmp_path: Path) -> None:
    placement, path = fp8_placement(Rule("stem.act", grid="integer")), tmp_path / "placement.yaml"
    path.write_text(dump_placement(placement))
    assert load_placement(path) == placement
    content = yaml.safe_load(path.read_text())
    grids = {entry["name"]: entry.get("grid") for entry in content["groups"]}
    assert (grids["input.x"], grids["stem.act"]) == ("fp8", None)
    content["groups"][0]["grid"] = "fp9"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(PlacementError, match="fp9"):
        load_placement(path)


# -- what works on codes


def test_codes_of_a_network_are_ranks_and_can_be_forced() -> None:
    images = small_images()
    model = insert(small_net(), fp8_placement())
    calibrate(model, [images])
    codes = activation_codes(model, images)
    scale = float(next(m for m in model.modules() if isinstance(m, FakeQuantize)).scale)
    expected = [LEVELS.index(nearest(value / scale)) for value in images.flatten()[:200].tolist()]
    assert codes["input.x"].flatten()[:200].tolist() == expected
    again = activation_codes(model, images, codes)
    assert all(torch.equal(again[name], codes[name]) for name in codes)


def test_oscillating_weights_freeze_on_a_code_and_dampening_pulls_to_codes() -> None:
    model = insert(small_net(), fp8_placement())
    calibrate(model, [small_images()])
    name, layer = next(iter(quantized_layers(model).items()))
    scale = float(layer.weight_quantizer.scale[0])
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = scale * 14
    tracker = OscillationTracker(model, momentum=0.5)
    for step in range(6):
        with torch.no_grad():
            layer.weight[0, 0, 0, 0] = scale * (14.0 if step % 2 else 15.0)  # neighbours between 8 and 16
        tracker.update(threshold=0.1)
    assert int(tracker.frozen.sum()) == 1, name
    assert float(layer.weight.detach()[0, 0, 0, 0]) / scale in (pytest.approx(14.0), pytest.approx(15.0))

    with torch.no_grad():
        for one in quantized_layers(model).values():
            one.weight.copy_(one.weight_quantizer(one.weight))
        assert float(dampening_loss(model)) < 1e-9
        layer.weight[0, 0, 0, 0] = scale * 14.25
    assert dampening_loss(model).item() == pytest.approx((0.25 * scale) ** 2, rel=1e-2)


def test_greedy_rounding_leaves_fp8_weights_alone() -> None:
    images = small_images()
    model = insert(small_net(), fp8_placement())
    calibrate(model, [images])
    before = {name: layer.weight.clone() for name, layer in quantized_layers(model).items()}
    repairs = reconstruct(model, images, rounding=True, correct_bias=False)
    assert all(repair.error_rounded is None for repair in repairs)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in quantized_layers(model).items())
