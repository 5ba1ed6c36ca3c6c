"""Quantized products of two tensors: what they compute, what is trained, and what they leave in a file."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from quant_networks import Between, folded, small_images
from torch import Tensor, fx, nn

from core.errors import PlacementError
from deploy import ONNXRuntime, export_onnx
from models.attention import C2PSA
from quant import (
    Mode,
    PlacementOptions,
    activation_quantizers,
    calibrate,
    dump_placement,
    insert,
    parse_placement,
    place,
    placement_of,
    set_mode,
    trace,
    with_named_nodes,
    without_units,
)

ATTENTION = "block.blocks.0.attention"
FIRST, SECOND = f"{ATTENTION}.matmul_0", f"{ATTENTION}.matmul_1"


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return folded(Between(C2PSA(128, 1, "silu"), 128, 128))


def quantized(
    options: PlacementOptions = PlacementOptions(attention="matmul"),  # noqa: B008
    calibrated: bool = True,
) -> fx.GraphModule:
    float_network = network()
    model = insert(float_network, place(float_network, options)).eval()
    if calibrated:
        calibrate(model, [small_images(size=8)], "minmax", "minmax")
    return model


def operands_of(model: fx.GraphModule, name: str, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """What a product reads, and what it makes of it."""
    seen: list[tuple[tuple[Tensor, ...], Tensor]] = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda _module, inputs, output: seen.append((inputs, output))
    )
    model(x)
    handle.remove()
    return seen[0]


def test_off_is_bit_identical() -> None:
    model, images = quantized(calibrated=False), small_images(size=8)
    set_mode(model, Mode.OFF)
    with torch.no_grad():
        assert torch.equal(model(images), network()(images))


@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_a_product_is_the_whole_number_product_of_its_codes(name: str) -> None:
    model = quantized()
    product, images = model.get_submodule(name), small_images(size=8)
    with torch.no_grad():
        operands, found = operands_of(model, name, images)
    codes, steps = [], 1.0
    for values, quantizer in zip(operands, product.input_grids, strict=True):  # type: ignore[union-attr, arg-type]
        codes.append((values.double() / quantizer.scale.double()).round())
        torch.testing.assert_close(codes[-1] * quantizer.scale.double(), values.double(), rtol=1e-6, atol=0)
        steps *= float(quantizer.scale)
    wanted = np.zeros(found.shape)
    first, second = (part.numpy().astype(np.int64) for part in codes)
    for image, head in np.ndindex(*found.shape[:2]):
        wanted[image, head] = first[image, head] @ second[image, head]
    np.testing.assert_allclose(found.numpy(), wanted * steps, rtol=1e-6)


def test_the_softmax_has_codes_up_to_the_end_where_it_is_unsigned() -> None:
    """Its scale is calibrated: with 1/255 most weights of a wide softmax would be 0."""
    model = quantized(PlacementOptions(attention="matmul", unsigned=True))
    grids = {group.name: group.grid for group in placement_of(model).groups}
    assert not grids[f"{ATTENTION}.softmax"].signed
    assert grids[f"{ATTENTION}.qkv.conv"].signed
    scale = float(activation_quantizers(model)[f"{ATTENTION}.softmax"].scale)
    with torch.no_grad():
        operands, _ = operands_of(model, SECOND, small_images(size=8))
    assert float(operands[1].max() / scale) == pytest.approx(255, abs=0.5)
    assert scale < 1 / 255


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_multiplies_codes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized().train()
    seen: list[tuple[Tensor, Tensor]] = []
    multiply = torch.matmul

    def spy(first: Tensor, second: Tensor) -> Tensor:
        seen.append((first.detach(), second.detach()))
        return multiply(first, second)

    with monkeypatch.context() as patch, torch.autocast("cpu", dtype):
        patch.setattr(torch, "matmul", spy)
        model(small_images(size=8))
    assert [first.dtype for first, _ in seen] == [dtype, dtype]
    for operand in (tensor for pair in seen for tensor in pair):
        codes = operand.double() * 128  # units of 1/128, exact in both types
        assert torch.equal(codes, codes.round())
        assert codes.abs().max() > 64


class OnlyAttention(nn.Module):
    """One head between two convolutions, with nothing beside it: images [B, 3, H, W] -> [B, 16, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.qkv, self.last, self.output = nn.Conv2d(3, 48, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)
        with torch.no_grad():
            self.qkv.weight.mul_(3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).flatten(2).chunk(3, 1)
        weights = (query.transpose(1, 2) @ key).softmax(-1)
        mixed = torch.bmm(value, weights.transpose(1, 2))
        return self.output(self.last(mixed.view(x.shape[0], 16, x.shape[2], x.shape[3])))  # type: ignore[no-any-return]


def only_attention() -> fx.GraphModule:
    float_network = OnlyAttention().eval()
    options = PlacementOptions(attention="matmul", quantize_narrow=True)
    model = insert(float_network, place(float_network, options)).eval()
    calibrate(model, [small_images(4, size=8)], "minmax", "minmax")
    return model


def gradients(model: fx.GraphModule, dtype: torch.dtype | None) -> dict[str, Tensor]:
    model = copy.deepcopy(model).train()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        output = model(small_images(4, size=8))
    (output.float().square().sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_under_autocast_are_those_of_float32() -> None:
    model = only_attention()
    wanted, found = gradients(model, None), gradients(model, torch.bfloat16)
    assert "qkv.weight" in wanted
    for name in (name for name in wanted if name.endswith("weight")):
        assert float((found[name] - wanted[name]).norm() / wanted[name].norm()) < 0.1, name


def test_the_gradient_of_a_scale_is_that_of_lsq() -> None:
    """d loss / d log s = sum g * s * dy/ds, with dy/ds = q - x/s inside of the grid, q outside (LSQ, equation 3)."""
    model = only_attention()
    quantizer = activation_quantizers(model)["softmax"]
    quantizer.set_scale(float(quantizer.scale) / 2)  # some values are clipped
    seen: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.extend((inputs[0].detach(), output))
        output.retain_grad()

    quantizer.register_forward_hook(keep)
    model(small_images(4, size=8)).square().sum().backward()
    x, y = seen
    scale = float(quantizer.scale)
    codes = y.detach() / scale
    is_clipped = (x / scale).round() > quantizer.grid.high
    assert y.grad is not None
    assert is_clipped.any()
    wanted = float((y.grad * torch.where(is_clipped, codes, codes - x / scale) * scale).double().sum())
    assert float(quantizer.log_scale.grad) == pytest.approx(wanted, rel=1e-3)


def test_fine_tuning_learns_through_quantized_attention() -> None:
    """A student whose scales are too small by half comes closer to its teacher, and these scales grow."""
    model, images = only_attention().train(), small_images(4, size=8)
    with torch.no_grad():
        wanted = OnlyAttention()(images)
    scales = [activation_quantizers(model)[name] for name in ("qkv", "softmax")]
    for quantizer in scales:
        quantizer.set_scale(float(quantizer.scale) / 2)
    start = [float(quantizer.scale) for quantizer in scales]
    learned = [quantizer.log_scale for quantizer in scales]
    optimizer = torch.optim.AdamW(
        [{"params": learned, "lr": 0.03}, {"params": model.get_submodule("qkv").parameters(), "lr": 1e-3}]
    )
    losses = []
    for _ in range(20):
        loss = (model(images) - wanted).square().mean() / wanted.var()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    assert all(float(quantizer.scale) > 1.1 * scale for quantizer, scale in zip(scales, start, strict=True))


@pytest.mark.parametrize("target", ["trt10", "openvino"])
def test_onnx_computes_what_torch_computes(target: str, tmp_path: Path) -> None:
    """The file read literally, operator by operator: only the order of float sums differs."""
    model, images = quantized(), small_images(2, size=8)
    named, names = with_named_nodes(model)
    path = export_onnx(named.eval(), tmp_path / "model.onnx", (8, 8), target, names=names).path
    with torch.no_grad():
        wanted = model(images).numpy()
    with ONNXRuntime(path, threads=1, optimize=False) as runtime:
        found = runtime.infer(images.numpy())
    scale = float(activation_quantizers(model)["block.exit.act"].scale)
    assert np.abs(found - wanted).max() < 2 * scale  # a value in the middle of two codes may go to the other
    assert np.abs(found - wanted).mean() < 1e-2 * scale


def test_a_placement_with_products_survives_its_file() -> None:
    placement = place(network(), PlacementOptions(attention="matmul"))
    assert parse_placement(dump_placement(placement), "placement.yaml") == placement
    assert [site.name for site in placement.matmuls] == [FIRST, SECOND]
    assert placement.describe().count(f"matmul {SECOND}") == 2  # below each of the groups that it reads


def test_files_from_before_products_load() -> None:
    placement = place(network())
    text = dump_placement(placement)
    assert "matmuls: []\n" in text
    assert parse_placement(text.replace("matmuls: []\n", ""), "placement.yaml") == placement


def test_a_product_of_which_one_operand_is_float_is_refused() -> None:
    placement = place(network(), PlacementOptions(attention="matmul"))
    groups = tuple(group for group in placement.groups if not group.name.endswith("softmax"))
    with pytest.raises(PlacementError, match=r"matmul_1.*not each of its operands"):
        insert(network(), replace(placement, groups=groups))
    unknown = tuple(replace(site, node="matmul_7") for site in placement.matmuls)
    with pytest.raises(PlacementError, match="matmul_7"):
        insert(network(), replace(placement, matmuls=unknown))


def test_a_unit_left_float_takes_its_products_along() -> None:
    model, images = quantized(), small_images(size=8)
    softmax = f"{ATTENTION}.softmax"
    smaller = without_units(placement_of(model), [softmax], "budget")
    assert [site.name for site in smaller.matmuls] == [FIRST]
    assert smaller.kept_float[SECOND] == "budget"
    without = insert(network(), smaller).eval()
    calibrate(without, [small_images(size=8)], "minmax", "minmax")
    activation_quantizers(model)[softmax].mode = Mode.OFF
    with torch.no_grad():
        torch.testing.assert_close(without(images), model(images), rtol=1e-4, atol=1e-5)


class Methods(nn.Module):
    """A product written as a method, one with a parameter, and one that leaves the network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 1)
        self.after = nn.Conv2d(16, 16, 1)
        self.table = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = self.conv(x).relu()
        mixed = made.matmul(other=made.transpose(-1, -2)) @ self.table
        return self.after(mixed), made @ made


def test_what_counts_as_a_product_of_two_tensors() -> None:
    options = PlacementOptions(attention="matmul", quantize_outputs=False)
    placement = place(Methods().eval(), options)
    assert [site.name for site in placement.matmuls] == ["matmul_0"]
    assert placement.kept_float == {
        "after": "its result leaves the network",
        "matmul_2": "its result leaves the network",
    }
    model = insert(Methods().eval(), placement)
    assert "matmul_0" in dict(model.named_modules())
    assert trace(model) is model
