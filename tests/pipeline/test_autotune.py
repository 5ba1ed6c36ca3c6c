"""Autotune's plans: as placements and models they compute what switching units off computes; choices and errors."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from configs.compose import compose
from configs.schema import Config
from core.errors import ConfigError, DeployError
from core.grid import FP8_E4M3, FP8_WEIGHTS
from deploy.autotune.blocks import Blocks
from deploy.autotune.costs import CostTable
from deploy.autotune.search import Point, Search
from pipeline.run.directory import Run
from pipeline.stages.autotune import (
    check_autotune,
    compare_precisions,
    estimate_losses,
    explain,
    quantize_more,
    spread,
)
from pipeline.stages.budget import switch_units
from pipeline.stages.order import stages_of
from pipeline.stages.plans import Plans
from pipeline.stages.variants import converted, options_of, precisions_of
from quant import (
    Placement,
    PlacementOptions,
    Rule,
    activation_quantizers,
    calibrate,
    insert,
    parse_placement,
    place,
    placement_of,
    quantized_layers,
)
from quant.placement.files import dump_placement

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """Three convolutions and an output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.third, self.last = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.last(torch.nn.functional.silu(self.third(x)))


class Attention(nn.Module):
    """A product of two computed tensors between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.left = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.right, self.after, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last(torch.relu(self.after(torch.relu(self.left(x)) @ torch.relu(self.right(x)))))


def calibrated(network: nn.Module, placement: Placement) -> fx.GraphModule:
    model = insert(network, placement).eval()
    calibrate(model, [IMAGES])
    return model


@pytest.fixture
def plans() -> Plans:
    network = Network().eval()
    placement = place(network)
    fp8 = dataclasses.replace(
        placement,
        groups=tuple(dataclasses.replace(group, grid=FP8_E4M3) for group in placement.groups),
        weights=tuple(dataclasses.replace(site, grid=FP8_WEIGHTS) for site in placement.weights),
    )
    models = {"int8": calibrated(network, placement), "fp8": calibrated(network, fp8)}
    job: Any = SimpleNamespace(
        networks=SimpleNamespace(insert=lambda placement: insert(network, placement).eval())
    )
    return Plans(job, models)


def test_a_plan_computes_what_its_units_switched_off_compute(plans: Plans) -> None:
    names = plans.units
    assert len(names) == 3
    for kept in range(7):  # all sets of float units but that of all
        floats = {name for bit, name in enumerate(names) if kept >> bit & 1}
        plan = {name: "float" if name in floats else "int8" for name in names}
        base = plans.models["int8"]
        switch_units(base, set(names) - floats)
        with torch.no_grad():
            assert torch.equal(plans.model(plan)(IMAGES), base(IMAGES))


def test_precisions_meet_in_one_model(plans: Plans) -> None:
    first, second, third = plans.units
    plan = {first: "int8", second: "fp8", third: "float"}
    placement = plans.placement(plan, {third: "because"})
    assert [(group.name, group.grid.name) for group in placement.groups] == [(first, "INT8"), (second, "FP8")]
    assert [(site.layer, site.grid.name) for site in placement.weights] == [
        ("first", "INT8"),
        ("second", "FP8"),
    ]
    assert placement.kept_float["third"] == "because"
    assert parse_placement(dump_placement(placement), "x") == placement
    model = plans.model(plan)
    assert placement_of(model) == plans.placement(plan)
    for name, source in ((first, "int8"), (second, "fp8")):
        found, wanted = activation_quantizers(model)[name], activation_quantizers(plans.models[source])[name]
        assert found.scale == wanted.scale
        assert found.grid == wanted.grid
    scale = quantized_layers(model)["second"].weight_quantizer.scale
    assert torch.equal(scale, quantized_layers(plans.models["fp8"])["second"].weight_quantizer.scale)
    assert plans.describe(plan) == "1 float, 1 int8, 1 fp8"


# -- three precisions


def named(network: nn.Module) -> Any:
    """Stands for the run's networks."""
    return SimpleNamespace(student=network)


def test_a_unit_can_be_what_all_of_its_layers_can() -> None:
    """Of a 7x7 convolution there is no FP8 kernel, and what reads the image is too coarse in FP8."""
    network = Network().eval()
    network.third = nn.Conv2d(16, 16, 7, padding=3)
    placement = place(network)
    units = [group.name for group in placement.groups]
    options = options_of(named(network), placement, ["int8", "fp8"])
    assert list(options.items()) == [
        (units[0], ("float", "int8")),  # first, on the image
        (units[1], ("float", "int8", "fp8")),  # second
        (units[2], ("float", "int8")),  # third
    ]
    assert set(options_of(named(network), placement, ["int8"]).values()) == {("float", "int8")}
    # in a run with quant=fp8 the placement has left these out already
    coarse = place(network, PlacementOptions(grid="fp8"))
    assert options_of(named(network), coarse, ["fp8", "int8"]) == {units[1]: ("float", "fp8", "int8")}
    # a rule has made the input FP8: it keeps that, where FP8 is among the precisions
    ruled = place(network, rules=(Rule("input.*", grid="fp8"),))
    assert options_of(named(network), ruled, ["int8", "fp8"])[units[0]] == ("float", "fp8")
    assert options_of(named(network), ruled, ["int8"])[units[0]] == ("float",)


def test_a_placement_in_other_codes_keeps_fixed_ranges() -> None:
    network = Network().eval()
    placement = place(network, rules=(Rule("input.*", scale=1 / 127, observer="entropy"),))
    fp8 = converted(placement, "fp8")
    assert [group.grid.name for group in fp8.groups] == ["FP8"] * 3
    assert [site.grid.name for site in fp8.weights] == ["FP8"] * 3
    assert fp8.groups[0].scale == pytest.approx(1 / 448)
    assert [group.name for group in fp8.groups] == [group.name for group in placement.groups]
    back = converted(fp8, "int8")
    assert back.groups[0].scale == pytest.approx(1 / 127)
    assert fp8.groups[0].observer is None  # FP8 has no entropy
    assert dataclasses.replace(back, groups=placement.groups) == placement


def test_uniform_plans_leave_units_float_that_cannot_have_the_precision(plans: Plans) -> None:
    first, second, third = plans.units
    options = {first: ("float", "int8"), second: ("float", "int8", "fp8"), third: ("float", "fp8")}
    limited = Plans(plans.job, plans.models, options)
    assert limited.uniform("fp8") == {first: "float", second: "fp8", third: "fp8"}
    assert limited.own == {first: "int8", second: "int8", third: "fp8"}
    assert limited.all_uniform[0] == dict.fromkeys(plans.units, "float")
    plan = {first: "int8", second: "fp8", third: "float"}
    assert limited.planned(plan) == {"first": "int8", "second": "fp8", "third": "float", "last": "float"}


def test_layers_that_the_engine_runs_otherwise_are_named() -> None:
    planned = {"a": "int8", "b": "fp8", "c": "float", "d": "float", "e": "fp8", "f": "int8"}
    built = {"a": "int8", "b": "fp16", "c": "fp16", "d": "int8", "e": "fp8"}
    assert compare_precisions(planned, built) == [
        {"layer": "b", "planned": "fp8", "built": "fp16"},
        {"layer": "d", "planned": "float", "built": "int8"},
        {"layer": "f", "planned": "int8", "built": "missing"},
    ]
    assert compare_precisions(planned, {**planned, "c": "fp32", "d": "bf16"}) == []
    assert compare_precisions(planned, None) is None


def test_products_of_two_kinds_of_codes_are_float() -> None:
    network = Attention().eval()
    placement = place(network, PlacementOptions(attention="matmul", quantize_narrow=True))
    (product,) = placement.matmuls
    fp8 = converted(placement, "fp8")
    models: Any = {
        "int8": SimpleNamespace(meta={"placement": placement}),
        "fp8": SimpleNamespace(meta={"placement": fp8}),
    }
    plans = Plans(None, models)  # type: ignore[arg-type]
    for left, right in itertools.product(("int8", "fp8"), repeat=2):
        plan = {**plans.uniform("int8"), product.groups[0]: left, product.groups[1]: right}
        found = plans.placement(plan)
        assert [site.name for site in found.matmuls] == ([product.name] if left == right else [])
        assert (product.name in found.kept_float) == (left != right)


# -- choices


def test_losses_are_shares_of_the_drop() -> None:
    scores = {"int8": {"a": 3.0, "b": 1.0}, "fp8": {"a": 6.0, "b": 0.0}}
    assert estimate_losses(scores, 0.04) == {
        "a": {"float": 0.0, "int8": pytest.approx(0.03), "fp8": pytest.approx(0.06)},
        "b": {"float": 0.0, "int8": pytest.approx(0.01), "fp8": 0.0},
    }
    # a model that lost nothing: the trade-off stays in sight, at a size that no AP resolves
    assert estimate_losses({"int8": {"a": 3.0, "b": 1.0}}, -0.01)["a"]["int8"] == pytest.approx(0.00075)


def test_points_are_spread_over_the_allowed_part_of_the_front() -> None:
    front = [Point({}, float(index), 0.1 * (9 - index)) for index in range(10)]
    assert [point.milliseconds for point in spread(front, 3, 0.45)] == [5, 7, 9]
    assert [point.milliseconds for point in spread(front, 1, 0.45)] == [5]
    assert [point.milliseconds for point in spread(front, 99, 0.25)] == [7, 8, 9]
    assert [point.milliseconds for point in spread(front, 2, -1)] == [9]


def small_search() -> Search:
    """INT8 is faster for `a`, slower for `b` and `c`."""
    table = CostTable(Blocks({unit: (unit,) for unit in "abc"}, {}, frozenset()))
    table.add(dict.fromkeys("abc", "float"), {"a": 2.0, "b": 1.0, "c": 1.0})
    table.add(dict.fromkeys("abc", "int8"), {"a": 1.0, "b": 1.5, "c": 1.25})
    losses = {"a": 0.003, "b": 0.002, "c": 0.004}
    return Search(table, {unit: {"float": 0.0, "int8": loss} for unit, loss in losses.items()})


def test_a_unit_that_is_slower_in_int8_stays_float_and_the_plan_says_so() -> None:
    search = small_search()
    fastest = search.front()[0]
    assert dict(fastest.plan) == {"a": "int8", "b": "float", "c": "float"}
    assert explain(search, fastest.plan, "estimated") == {
        "b": "autotune: int8 is estimated 500.0 us slower",
        "c": "autotune: int8 is estimated 250.0 us slower",
    }
    assert explain(search, dict.fromkeys("abc", "float"), "measured")["a"] == "autotune: accuracy"


def test_it_is_quantized_where_that_is_asked_for_as_far_as_the_loss_allows() -> None:
    search = small_search()
    fastest = search.front()[0]
    assert dict(quantize_more(search, fastest, 0.0055).plan) == {"a": "int8", "b": "int8", "c": "float"}
    assert set(quantize_more(search, fastest, 0.01).plan.values()) == {"int8"}
    assert dict(quantize_more(search, fastest, 0.004).plan) == dict(fastest.plan)


# -- before any long work


def job_of(*overrides: str) -> Any:
    base = ("+experiment=demo", "stages=[train,float,calibrate,sensitivity,autotune]")
    return SimpleNamespace(config=compose([*base, *overrides]))


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["autotune.gpu=rtx4080"], ConfigError, "Unknown GPU 'rtx4080'; expected one of rtx3060, rtx4060"),
        (["autotune.gpu=l4", "autotune.gpu_file=none.yaml"], ConfigError, r"none.yaml cannot be read"),
        (
            ["deploy=onnxruntime"],
            DeployError,
            "no costs for ONNX Runtime, which does not report times by layer of the graph: set autotune.gpu",
        ),
        (["autotune.gpu=l4", "quant.activations.unsigned=true"], ConfigError, "TensorRT takes signed codes"),
        (["autotune.gpu=l4", "deploy.outputs=onnx_nms"], ConfigError, "expected one of decoded, raw"),
        (["quant=fp8"], ConfigError, "OpenVINO on this machine has no costs for FP8"),
        (["quant=fp8", "autotune.gpu=a10"], ConfigError, "A10 has no FP8: choose a GPU that has it"),
        (
            ["autotune.gpu=l4", "autotune.precisions=[fp8]"],
            ConfigError,
            r"autotune.precisions=\[fp8\] with quant.grid=integer: the run's calibrated model is int8, so add int8",
        ),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_autotune(job_of(*overrides))


def test_what_the_hardware_does_not_run_is_left_out() -> None:
    assert precisions_of(job_of("autotune.gpu=l4"), ["int8", "fp8"]) == ["int8", "fp8"]
    assert precisions_of(job_of("autotune.gpu=a10"), ["int8"]) == ["int8"]
    assert precisions_of(job_of("autotune.gpu=l4", "quant=fp8"), ["int8", "fp8"]) == ["fp8", "int8"]
    only = job_of("autotune.gpu=l4", "autotune.precisions=[int8]")
    assert precisions_of(only, ["int8", "fp8"]) == ["int8"]


def test_autotune_needs_scores() -> None:
    with pytest.raises(ConfigError, match=r"autotune with sensitivity.method=none"):
        job_of("sensitivity.method=none")


def test_autotune_brings_its_stages_along(tmp_path: Path) -> None:
    config = Config(experiment="x", stages=["calibrate", "autotune"])
    names = [stage.name for stage in stages_of(config, Run(tmp_path))]
    assert names == ["load", "float", "place", "calibrate", "sensitivity", "autotune"]
