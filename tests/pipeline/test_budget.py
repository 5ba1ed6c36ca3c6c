"""The accuracy budget on a real network: every set of units against explicit loops over all sets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from core.rows import FLOAT, ResultRow
from pipeline.evaluation.measuring import CustomMetrics
from pipeline.run.directory import Run
from pipeline.run.sweep import Sweep
from pipeline.stages import budget
from pipeline.stages.budget import keep_budget, switch_units
from quant import (
    Mode,
    Placement,
    PlacementOptions,
    Rule,
    activation_quantizers,
    calibrate,
    insert,
    place,
    placement_of,
    quantized_layers,
    search_budget,
    set_mode,
    without_units,
)
from training.team import ALONE

IMAGES = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Levels(nn.Module):
    """A shared output convolution over two levels, and a convolution of its own for each: several units read `head`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.fine, self.coarse = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, 2, 1)
        self.head = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        stem = torch.relu(self.stem(x))
        return self.head(torch.relu(self.fine(stem))), self.head(torch.relu(self.coarse(stem)))


def quantized(network: nn.Module, placement: Placement | None = None) -> fx.GraphModule:
    options = PlacementOptions(quantize_outputs=True, quantize_narrow=True)
    model = insert(network, placement or place(network, options, (Rule("*", bits=3),))).eval()
    calibrate(model, [IMAGES])
    return model


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return Levels().eval()


def subsets(units: list[str]) -> Iterator[tuple[str, ...]]:
    for size in range(len(units) + 1):
        yield from itertools.combinations(units, size)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([level.flatten() for level in model(IMAGES)])


def test_the_smaller_placement_computes_what_the_switched_model_computes(network: nn.Module) -> None:
    model = quantized(network)
    units = [group.name for group in placement_of(model).groups]
    assert len(units) == 4
    for kept in subsets(units):
        switch_units(model, set(units) - set(kept))
        placement = without_units(placement_of(model), kept, "budget")
        smaller = insert(network, placement).eval()
        for name, quantizer in activation_quantizers(smaller).items():
            quantizer.load_state_dict(activation_quantizers(model)[name].state_dict())
        for name, layer in quantized_layers(smaller).items():
            layer.weight_quantizer.load_state_dict(
                quantized_layers(model)[name].weight_quantizer.state_dict()
            )
        set_mode(smaller, Mode.QUANTIZE)
        torch.testing.assert_close(outputs(smaller), outputs(model), rtol=1e-5, atol=1e-6)
        assert set(quantized_layers(smaller)) | set(placement.kept_float) == set(quantized_layers(model))
        feeding = {group.name for group in placement.groups}
        assert all(site.group in feeding for site in placement.weights)


def test_the_search_finds_a_set_from_which_nothing_can_be_taken(network: nn.Module) -> None:
    model = quantized(network)
    units = [group.name for group in placement_of(model).groups]
    exact = outputs(network)
    accuracy: dict[frozenset[str], float] = {}
    for kept in subsets(units):
        switch_units(model, set(units) - set(kept))
        accuracy[frozenset(kept)] = 1 - float((outputs(model) - exact).norm() / exact.norm())
    ranking = sorted(units, key=lambda unit: -accuracy[frozenset([unit])])
    for target in [*sorted(accuracy.values()), 1.1]:
        result = search_budget(ranking, accuracy.__getitem__, target)
        assert result.met is (target <= 1)  # with every unit in float the error is 0
        assert result.accuracy == accuracy[frozenset(result.units)]
        if not result.met:
            continue
        assert result.accuracy >= target
        chosen = frozenset(result.units)
        for unit in reversed(result.units):  # in the order of the search, so that each was the last chance
            without = chosen - {unit}
            assert accuracy[without] < target


def test_a_stopped_search_goes_on_at_the_trial(
    network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured before the stop is not measured again, and the result is that of an undisturbed search."""
    ranking = ["a", "b", "c", "d", "e", "f"]
    kept: frozenset[str] = frozenset()
    measured: list[frozenset[str]] = []
    results: list[Any] = []
    limit = 100

    def switch(_: Any, quantized_units: set[str]) -> None:
        nonlocal kept
        kept = frozenset(ranking) - quantized_units

    def measure(*_: Any) -> CustomMetrics:
        if len(measured) == limit:
            raise KeyboardInterrupt
        measured.append(kept)
        return CustomMetrics(0.9 if {"b", "d"} <= kept else 0.1)

    monkeypatch.setattr(budget, "switch_units", switch)
    monkeypatch.setattr(budget, "_write", lambda job, model, result, target: results.append(result))
    monkeypatch.setattr(budget, "_keep_mixed", lambda *_: None)
    monkeypatch.setattr(budget, "without_units", lambda *_: None)
    monkeypatch.setattr(budget, "placement_of", lambda *_: None)
    job: Any = SimpleNamespace(
        run=Run(tmp_path),
        stage_team=ALONE,
        config=SimpleNamespace(metric=SimpleNamespace(factory="m:f")),
        splits=SimpleNamespace(task="detect"),
        evaluator=SimpleNamespace(measure=measure),
        predictor=lambda model: None,
    )
    job.run.write_row(ResultRow.of(FLOAT, {"metric": 0.9}))
    keep_budget(job, None, ranking, 0.0, Sweep(tmp_path / "straight"))  # type: ignore[arg-type]
    straight, limit = list(measured), 3
    measured.clear()
    with pytest.raises(KeyboardInterrupt):
        keep_budget(job, None, ranking, 0.0, Sweep(tmp_path / "stopped"))  # type: ignore[arg-type]
    limit = 100
    keep_budget(job, None, ranking, 0.0, Sweep(tmp_path / "stopped"))  # type: ignore[arg-type]
    assert measured == straight
    assert len(straight) > 4
    assert results[0] == results[1]
    assert set(results[0].units) == {"b", "d"}
