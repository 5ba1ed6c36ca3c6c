"""Lines from quantized to float logits: fitted as looped by hand, folded exactly, the order of scores kept."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from core.choices import FP8
from quant import Mode, PlacementOptions, calibrate, insert, place, recalibrate_scores, set_mode
from quant.repair.recalibration import LEAST_EVIDENCE, ScoreLine, fit_line, fold_lines

CLASSES = 16
LAYERS = ["scores.0", "scores.1"]


class Network(nn.Module):
    """Images to class logits at two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1)
        self.act = nn.SiLU()
        self.scores = nn.ModuleList([nn.Conv2d(16, CLASSES, 1), nn.Conv2d(16, CLASSES, 1)])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.act(self.stem(images))
        return self.scores[0](fine), self.scores[1](self.act(self.down(fine)))


def images(number: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(number)
    return [torch.rand(2, 3, 32, 32, generator=generator) for _ in range(number)]


def networks(bits: int = 8, grid: str = "integer") -> tuple[nn.Module, nn.Module]:
    """A float network with logits of some size, and its calibrated copy."""
    torch.manual_seed(0)
    network = Network().eval()
    with torch.no_grad():
        for layer in network.scores:
            layer.weight.mul_(8)
    options = PlacementOptions(
        weight_bits=bits, activation_bits=bits, edge_bits=bits, grid=grid, quantize_outputs=True
    )
    model = insert(network, place(network, options)).eval()
    calibrate(model, images())
    set_mode(model, Mode.QUANTIZE)
    return network, model


def logits_of(network: nn.Module, batch: Tensor) -> Tensor:
    """[K, N] of both levels."""
    with torch.no_grad():
        return torch.cat([level.transpose(0, 1).flatten(1) for level in network(batch)], dim=1)


def line_by_hand(found: list[float], wanted: list[float]) -> tuple[float, float]:
    """Weighted least squares by its normal equations, one sum after the other."""
    s = sx = sy = sxx = sxy = 0.0
    for x, y in zip(found, wanted, strict=True):
        p = 1 / (1 + math.exp(-y))
        w = (p * (1 - p)) ** 2
        s, sx, sy, sxx, sxy = s + w, sx + w * x, sy + w * y, sxx + w * x * x, sxy + w * x * y
    slope = (s * sxy - sx * sy) / (s * sxx - sx * sx)
    return slope, (sy - slope * sx) / s


def test_the_line_is_weighted_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(400, generator=generator) * 2
    found = 0.8 * wanted - 0.3 + 0.2 * torch.randn(400, generator=generator)
    line = fit_line(found, wanted)
    slope, offset = line_by_hand(found.tolist(), wanted.tolist())
    assert line.slope == pytest.approx(slope, rel=1e-6)
    assert line.offset == pytest.approx(offset, rel=1e-6)
    assert line.slope == pytest.approx(1.25, abs=0.08)

    def error(z: Tensor) -> float:
        return math.sqrt(
            sum((a - b) ** 2 for a, b in zip(z.sigmoid().tolist(), wanted.sigmoid().tolist(), strict=True))
            / 400
        )

    assert line.error_before == pytest.approx(error(found), rel=1e-5)
    assert line.error_after == pytest.approx(error(line.slope * found + line.offset), rel=1e-5)
    assert line.error_after < 0.6 * line.error_before


@pytest.mark.parametrize(
    "found", [torch.zeros(0), torch.linspace(-1, 1, LEAST_EVIDENCE - 1), torch.ones(200)]
)
def test_without_evidence_a_class_keeps_its_logits(found: Tensor) -> None:
    line = fit_line(found, found + 1)
    assert (line.slope, line.anchors) == (1.0, len(found))
    assert line.offset == 0.0


def test_the_slope_stays_positive() -> None:
    wanted = torch.linspace(-2, 2, 200)
    assert fit_line(-wanted, wanted).slope == 0.5
    assert fit_line(wanted / 10, wanted).slope == 2.0


@pytest.mark.parametrize("name", LAYERS)
def test_folding_scales_and_shifts_the_output_and_leaves_the_codes(name: str) -> None:
    _, model = networks()
    lines = [ScoreLine(0.7 + 0.05 * k, 0.1 * k - 0.5, 0, None, None) for k in range(CLASSES)]
    layer = model.get_submodule(name)
    assert layer.weight_quantizer.mode is Mode.QUANTIZE, "the last layers are quantized"
    codes = layer.weight_quantizer.codes(layer.weight)[0].clone()
    x = torch.rand(2, 16, 5, 5, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = layer(x)
        fold_lines(layer, lines)
        after = layer(x)
    slope, offset = (torch.tensor([getattr(line, key) for line in lines]) for key in ("slope", "offset"))
    torch.testing.assert_close(
        after, before * slope[:, None, None] + offset[:, None, None], atol=1e-5, rtol=1e-5
    )
    assert torch.equal(layer.weight_quantizer.codes(layer.weight)[0], codes)
    with torch.no_grad():
        fold_lines(layer, [line.inverse for line in lines])
        torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=1e-5)


def test_a_layer_that_stays_float_and_one_in_fp8_take_lines_too() -> None:
    lines = [ScoreLine(0.5 + 0.1 * k, 0.2 * k, 0, None, None) for k in range(CLASSES)]
    slope, offset = (torch.tensor([getattr(line, key) for line in lines]) for key in ("slope", "offset"))
    x = torch.rand(2, 16, 5, 5, generator=torch.Generator().manual_seed(3))
    fp8 = networks(grid=FP8)[1].get_submodule(LAYERS[0])
    assert fp8.weight_quantizer.grid.is_fp8
    for layer, tolerance in ((nn.Conv2d(16, CLASSES, 1), 1e-6), (fp8, 0.05)):  # FP8 weights are rounded anew
        with torch.no_grad():
            wanted = layer(x) * slope[:, None, None] + offset[:, None, None]
            fold_lines(layer, lines)
            assert float((layer(x) - wanted).abs().max() / wanted.abs().max()) < tolerance


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, CLASSES, 1, bias=False), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(CLASSES)]
)
def test_a_layer_that_cannot_take_lines_is_named(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match="16 lines"):
        fold_lines(layer, [ScoreLine(1.0, 0.0, 0, None, None)] * CLASSES)


@pytest.mark.parametrize("lowest", [0.0, 0.3])
def test_scores_come_closer_to_float_and_keep_their_order(lowest: float) -> None:
    """At 4 bits, where logits are visibly off; on other images than those of the fit, too."""
    network, model = networks(bits=4)
    before = copy.deepcopy(model)
    lines = recalibrate_scores(model, network, images(), LAYERS, lowest)
    assert len(lines) == CLASSES
    assert all(line.slope > 0 for line in lines)
    found, wanted = (torch.cat([logits_of(n, batch) for batch in images()], dim=1) for n in (before, network))
    for k, line in enumerate(lines):
        seen = wanted[k].sigmoid() >= lowest
        assert line.anchors == int(seen.sum())
        slope, offset = line_by_hand(found[k][seen].tolist(), wanted[k][seen].tolist())
        assert line.slope == pytest.approx(slope, abs=1e-4)
        assert line.offset == pytest.approx(offset, abs=1e-4)
    errors = []
    for batch in images(3):
        old, new, target = (logits_of(n, batch) for n in (before, model, network))
        straight = torch.stack([line.slope * old[k] + line.offset for k, line in enumerate(lines)])
        torch.testing.assert_close(new, straight, atol=1e-4, rtol=1e-4)
        assert float(new.gather(1, old.argsort(dim=1)).diff(dim=1).min()) > -1e-4, (
            "the order is kept, up to rounding"
        )
        seen = target.sigmoid() >= max(lowest, 0.1)
        errors.append([float((x.sigmoid() - target.sigmoid())[seen].square().mean()) for x in (old, new)])
    assert sum(new for _, new in errors) < 0.9 * sum(old for old, _ in errors)


def test_hooks_are_gone_and_no_layer_is_refused() -> None:
    network, model = networks()
    recalibrate_scores(model, network, images(1), LAYERS, 0.1)
    assert not any(module._forward_hooks for n in (network, model) for module in n.modules())
    with pytest.raises(ValueError, match="no layer"):
        recalibrate_scores(model, network, images(1), [], 0.1)
