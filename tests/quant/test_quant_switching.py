"""Outputs with one unit switched are those of a whole pass, bit for bit, with fewer operators run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from quant_networks import NeckNet, folded, small_images, small_net
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from quant import (
    Mode,
    SwitchedUnits,
    activation_quantizers,
    calibrate,
    insert,
    measure_sqnr,
    place,
    placement_of,
    quantized_layers,
    set_mode,
)

IMAGES = small_images(2, size=64)


class InPlace(nn.Module):
    """A sum that changes what another branch reads."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)
        self.act, self.output = nn.ReLU(inplace=in_place), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.output(self.act(y) + self.second(y))


NETWORKS = {
    "small": small_net,
    "neck": lambda: folded(NeckNet()),
    "in place": lambda: InPlace(True).eval(),
}


def calibrated(name: str) -> fx.GraphModule:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    model = insert(network, place(network)).eval()
    calibrate(model, [IMAGES])
    return model


def units_of(model: fx.GraphModule) -> list[str]:
    return [group.name for group in placement_of(model).groups]


def by_hand(model: fx.GraphModule, unit: str, quantized: bool, images: Tensor) -> list[Tensor]:
    """A whole pass with every quantizer set, one after the other."""
    set_mode(model, Mode.QUANTIZE if quantized else Mode.OFF)
    switched = Mode.OFF if quantized else Mode.QUANTIZE
    group = next(group for group in placement_of(model).groups if group.name == unit)
    activation_quantizers(model)[unit].mode = switched
    for layer in group.layers:
        quantized_layers(model)[layer].weight_quantizer.mode = switched
    with torch.inference_mode():
        return tree_leaves(model(images))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[type]]:
    """How often each type of layer is called."""
    counter: Counter[type] = Counter()
    forward = nn.Conv2d._conv_forward

    def counted(self: nn.Conv2d, *arguments: Any) -> Tensor:
        counter[nn.Conv2d] += 1
        return forward(self, *arguments)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", counted)
    return counter


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("limit", [0, 1 << 30])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_a_whole_pass(
    name: str, quantized: bool, limit: int, memory_format: torch.memory_format
) -> None:
    model, reference = calibrated(name), calibrated(name)
    images = IMAGES.contiguous(memory_format=memory_format)
    switched = SwitchedUnits(model, quantized, images, limit)
    units = units_of(model)
    groups = switched.groups(units)
    assert [unit for group in groups for unit in group] == units
    assert len(groups) == (len(units) if limit == 0 else 1)
    different = 0
    for group in groups:
        with torch.inference_mode():
            for unit, outputs in zip(group, switched.outputs(group, images), strict=True):
                whole = by_hand(reference, unit, quantized, images)
                assert all(map(torch.equal, tree_leaves(outputs), whole))
                set_mode(reference, Mode.QUANTIZE if quantized else Mode.OFF)
                different += not all(map(torch.equal, whole, tree_leaves(reference(images))))
    assert different == len(units)  # every unit makes a difference


def test_what_lies_before_a_unit_is_computed_once(calls: Counter[type]) -> None:
    model = calibrated("neck")
    units = units_of(model)
    switched = SwitchedUnits(model, True, IMAGES)
    calls.clear()
    with torch.inference_mode():
        for unit in units:
            by_hand(model, unit, True, IMAGES)
    whole = calls.total()
    calls.clear()
    with torch.inference_mode():
        for _ in switched.outputs(units, IMAGES):
            pass
    assert whole == len(units) * len(quantized_layers(model) | unquantized(model))
    assert calls.total() < 0.6 * whole


def unquantized(model: fx.GraphModule) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


@pytest.mark.parametrize(("in_place", "expected"), [(True, True), (False, False)])
def test_tensors_changed_in_place_are_noticed(in_place: bool, expected: bool) -> None:
    network = InPlace(in_place).eval()
    model = insert(network, place(network)).eval()
    calibrate(model, [IMAGES])
    assert SwitchedUnits(model, True, IMAGES).works_in_place is expected


def test_a_group_keeps_no_more_than_the_limit() -> None:
    model = calibrated("neck")
    units = units_of(model)
    whole = SwitchedUnits(model, False, IMAGES, most=100)
    assert whole.groups(units) == [units]
    needed = {node for unit in units for node in whole.needed[unit]}
    size = sum(whole.sizes[node] for node in needed)
    halves = SwitchedUnits(model, False, IMAGES, limit=size // 2).groups(units)
    for group in halves:
        kept = {node for unit in group for node in whole.needed[unit]}
        assert len(group) == 1 or sum(whole.sizes[node] for node in kept) <= size // 2
    assert 1 < len(halves) < len(units)
    assert max(map(len, SwitchedUnits(model, False, IMAGES, most=3).groups(units))) == 3


def test_sqnr_scores_do_not_depend_on_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    together = list(measure_sqnr(calibrated("neck"), [IMAGES]))
    monkeypatch.setattr(
        "quant.sensitivity.switching.SwitchedUnits.groups", lambda self, units: [[unit] for unit in units]
    )
    assert list(measure_sqnr(calibrated("neck"), [IMAGES])) == together
