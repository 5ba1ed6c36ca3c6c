"""Unsigned grids: which groups get them, what they hold, and what the CPU engines make of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from deploy import ONNXRuntime, OpenVINORuntime, export_onnx
from quant import (
    PlacementOptions,
    activation_quantizers,
    calibrate,
    dump_placement,
    insert,
    load_placement,
    place,
    placement_of,
)


class Block(nn.Module):
    """ReLU convolutions with a residual sum, a concat and a pool, then a convolution behind a SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.inner = nn.Conv2d(16, 16, 3, padding=1)
        self.smooth = nn.Conv2d(32, 16, 1)
        self.last = nn.Conv2d(16, 16, 3)
        self.out = nn.Conv2d(16, 16, 1)
        self.pool = nn.MaxPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.stem(x))
        b = a + torch.relu(self.inner(a))
        c = nn.functional.silu(self.smooth(torch.cat([self.pool(b), a], 1)))
        return self.out(torch.relu(self.last(c)))


def calibrated(unsigned: bool, images: Tensor) -> fx.GraphModule:
    torch.manual_seed(0)
    network = Block().eval()
    model = insert(network, place(network, PlacementOptions(unsigned=unsigned, quantize_narrow=True)))
    calibrate(model, [images], "minmax", "minmax")
    return model.eval()


def test_only_tensors_that_are_never_negative_become_unsigned() -> None:
    plan = place(Block(), PlacementOptions(unsigned=True, quantize_narrow=True))
    signed = {site.name: group.grid.signed for group in plan.groups for site in group.tensors}
    assert signed == {"input.x": False, "relu_0": False, "add": False, "silu": True}
    assert all(group.grid.signed for group in place(Block(), PlacementOptions(quantize_narrow=True)).groups)


def test_the_step_is_half_and_the_codes_reach_255(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 16, 16)
    signed, unsigned = calibrated(False, images), calibrated(True, images)
    for (name, narrow), wide in zip(
        activation_quantizers(signed).items(), activation_quantizers(unsigned).values(), strict=True
    ):
        expected = 1.0 if name == "silu" else 127 / 255
        assert float(wide.scale / narrow.scale) == pytest.approx(expected, rel=1e-6)
    image_grid = next(iter(activation_quantizers(unsigned).values()))
    with torch.no_grad():
        codes = torch.round(image_grid(images) / image_grid.scale)
    assert (float(codes.min()), float(codes.max())) == (0, 255)
    path = tmp_path / "plan.yaml"
    path.write_text(dump_placement(placement_of(unsigned)))
    assert load_placement(path) == placement_of(unsigned)
    assert "unsigned" in placement_of(unsigned).describe()


def test_a_camera_image_is_exact_on_an_unsigned_grid() -> None:
    images = torch.arange(256).float().div(255).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    image_grid = next(iter(activation_quantizers(calibrated(True, images)).values()))
    with torch.no_grad():
        torch.testing.assert_close(image_grid(images), images, rtol=0, atol=1e-6)
        assert (
            float(
                (next(iter(activation_quantizers(calibrated(False, images)).values()))(images) - images)
                .abs()
                .max()
            )
            > 1e-3
        )


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_engines_compute_what_torch_computes(tmp_path: Path, target: str) -> None:
    torch.manual_seed(1)
    images = torch.rand(2, 3, 16, 16)
    model = calibrated(True, images)
    report = export_onnx(model, tmp_path / "model.onnx", (16, 16), target, None)  # type: ignore[arg-type]
    with torch.inference_mode():
        expected = model(images).numpy()
    runtime = OpenVINORuntime(report.path) if target == "openvino" else ONNXRuntime(report.path)
    found = runtime.infer(images.numpy())
    runtime.close()
    # rounding ties may fall the other way; a lost zero point or range would change everything
    assert float(np.abs(found - expected).mean()) < 0.01 * float(expected.std())
