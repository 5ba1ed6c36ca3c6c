"""Autotune: the roofline against loops by hand, the front against all subsets, blocks and costs against real builds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from placed import export_named, quantized
from torch import nn

from core.errors import ConfigError, DeployError
from deploy import load_onnx
from deploy.autotune.blocks import INPUT, Blocks, find_blocks
from deploy.autotune.costs import CostTable, plans_to_build
from deploy.autotune.gpus import GPU, SHIPPED, load_gpus
from deploy.autotune.measure import measure_blocks
from deploy.autotune.roofline import count_products, estimate_blocks, kernel_milliseconds
from deploy.autotune.search import Point, Search, pareto_front
from deploy.compile.compiler import compile_graph
from deploy.compile.kernels import Kernel, KernelTensor
from deploy.compile.report import fixed_shapes, half_precision
from deploy.graph.view import View
from deploy.runtimes.base import EngineRequest
from deploy.runtimes.engines import open_engine
from quant import place, without_units

rtx = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("tensorrt_rtx"),
    reason="TensorRT for RTX is not installed: pip install 'octet[tensorrt-rtx]'",
)
SIZE = (160, 160)
TOY = GPU("toy", "Toy", "SM89", 100.0, {"fp32": 0.5, "fp16": 1.0, "int8": 4.0}, 3.0, "made up")


# -- GPUs


def test_the_gpus_that_come_along() -> None:
    gpus = load_gpus()
    assert list(gpus) == ["rtx3060", "rtx4060", "rtx4090", "rtx5090", "l4", "a10", "orin"]
    for gpu in gpus.values():
        # dense rates double from FP16 to INT8, on tensor cores of every generation since Ampere
        assert gpu.teraops["int8"] == pytest.approx(2 * gpu.teraops["fp16"], rel=0.01)
        assert gpu.source
    # figures that NVIDIA prints: 330.3 TFLOPS and 1008 GB/s; 485 TOPS with sparsity and 300 GB/s
    assert (gpus["rtx4090"].teraops["fp16"], gpus["rtx4090"].gigabytes_per_second) == (330.3, 1008)
    assert (2 * gpus["l4"].teraops["int8"], gpus["l4"].gigabytes_per_second) == (485, 300)
    with pytest.raises(
        ConfigError, match=r"Unknown GPU 'rtx4080'; expected one of rtx3060, .*closest: rtx4060"
    ):
        gpus["rtx4080"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capability": "SM87"}, "capability 'SM87': expected one of SM75"),
        ({"gigabytes_per_second": 0}, "gigabytes_per_second is 0: expected a positive number"),
        ({"gigabytes_per_second": True}, "expected a positive number"),
        ({"kernel_microseconds": "2 us"}, "kernel_microseconds is '2 us'"),
        ({"teraops": {"fp16": 1, "int8": 2}}, "expected figures for fp32, fp16, int8"),
        ({"teraops": {"fp32": 1, "fp16": 1, "int8": -2}}, "teraops.int8 is -2"),
        ({"teraops": {"fp32": 1, "fp16": 1, "int8": 2, "int4": 4}}, "and fp8 where it has it"),
        ({"capability": "SM86", "teraops": {"fp32": 1, "fp16": 1, "int8": 2, "fp8": 2}}, "SM86 does not run"),
        ({"bandwidth": 5}, "has 'bandwidth', .*: expected title, capability"),
    ],
)
def test_a_wrong_gpu_file_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    entry = yaml.safe_load(SHIPPED.read_text())["l4"]
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"mine": {**entry, **change}}))
    with pytest.raises(ConfigError, match=message):
        load_gpus(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "names no GPU"), ("[1]", "names no GPU"), ("a: [", "cannot be read"), ("a: 1", "has 1")],
)
def test_a_file_without_gpus_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    with pytest.raises(ConfigError, match="cannot be read"):
        load_gpus(path)
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_gpus(path)


# -- the roofline


def tensor(shape: tuple[int, ...], kind: str) -> KernelTensor:
    return KernelTensor("t", shape, kind)


def test_a_kernel_costs_its_bytes_or_its_products_whichever_is_more_and_the_launch() -> None:
    # 16 x 40 x 40 codes in, 32 x 40 x 40 sums out in FP32, weights of 32 x 16 x 3 x 3
    conv = Kernel(
        "conv",
        "correlation",
        (tensor((1, 16, 40, 40), "Int8"),),
        (tensor((32, 16, 3, 3), "Int8"),),
        (tensor((1, 32, 40, 40), "Float"),),
        (),
    )
    num_bytes, macs = 0, 0
    for _row, _column in itertools.product(range(40), range(40)):
        num_bytes += 16 * 1 + 32 * 4
        macs += 32 * 16 * 3 * 3
    num_bytes += 32 * 16 * 3 * 3
    by_memory = num_bytes / 100e9 * 1e3
    by_products = 2 * macs / 4e12 * 1e3
    assert by_products > by_memory
    assert kernel_milliseconds(conv, macs, TOY) == pytest.approx(by_products + 3e-3, rel=1e-12)
    assert kernel_milliseconds(conv, 1, TOY) == pytest.approx(by_memory + 3e-3, rel=1e-12)
    assert kernel_milliseconds(conv, 0, TOY) == pytest.approx(by_memory + 3e-3, rel=1e-12)


def test_a_precision_without_throughput_is_named() -> None:
    conv = Kernel("conv", "correlation", (tensor((1, 16, 4, 4), "FP8"),), (), (tensor((1,), "Half"),), ())
    with pytest.raises(DeployError, match="Toy has no throughput for fp8"):
        kernel_milliseconds(conv, 1000, TOY)


# -- blocks, on a network whose answer can be told by hand


class Net(nn.Module):
    """stem -> split -> one half through `left` -> concat with the other -> join -> deep -> last, the output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.left = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.join, self.deep = nn.Conv2d(32, 32, 3, 1, 1), nn.Conv2d(32, 32, 3, 2, 1)
        self.last = nn.Conv2d(32, 8, 1)
        self.act = nn.ModuleList(nn.SiLU() for _ in range(4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first, second = self.act[0](self.stem(images)).chunk(2, 1)
        joined = torch.cat([self.act[1](self.left(first)), second], 1)
        return self.last(self.act[3](self.deep(self.act[2](self.join(joined)))))


class Setting:
    """The network, its placement, and graphs of plans."""

    def __init__(self, folder: Path, target: str) -> None:
        self.network, self.folder, self.target = Net().eval(), folder, target
        self.placement = place(self.network)
        self.units = [group.name for group in self.placement.groups]
        self.tensors = {site.name: group.name for group in self.placement.groups for site in group.tensors}
        self.blocks = find_blocks(load_onnx(self.write(dict.fromkeys(self.units, "int8"))), self.tensors)

    def write(self, plan: dict[str, str]) -> Path:
        """Export a plan; an all-float one for the float graph of the target."""
        kept = [unit for unit, precision in plan.items() if precision == "float"]
        path = self.folder / f"{self.target}-{'-'.join(map(str, map(self.units.index, kept)))}.onnx"
        is_quantized = len(kept) < len(self.units)
        target = self.target if is_quantized or self.target == "openvino" else "trt10"
        network = self.network
        if is_quantized:
            network = quantized(network, without_units(self.placement, kept, "test"))
        return export_named(network, nn.Identity(), path, SIZE, target, is_quantized=is_quantized)

    def plans(self) -> list[dict[str, str]]:
        """All of them."""
        choices = itertools.product(("int8", "float"), repeat=len(self.units))
        return [dict(zip(self.units, chosen, strict=True)) for chosen in choices]


@pytest.fixture(scope="module")
def rtx_setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("plans"), "tensorrt_rtx")


def test_blocks_and_the_units_that_touch_them(rtx_setting: Setting) -> None:
    # the concat shares one scale: act.0 (split) and act.1 are one unit
    assert rtx_setting.units == ["input.images", "act.0", "act.2"]
    assert dict(rtx_setting.blocks.units) == {
        INPUT: ("input.images",),
        "stem": ("input.images", "act.0"),
        "left": ("act.0",),
        "join": ("act.0", "act.2"),
        "deep": ("act.2",),  # its result is read by the output convolution, in float
        "last": (),
    }


def test_kernels_and_layers_find_their_block(rtx_setting: Setting) -> None:
    blocks = rtx_setting.blocks
    # a convolution names the DQ of its input, which was computed in another block; a second kernel finishes it
    assert blocks.of_kernel(["left", "act.0/quantizer", "left/weight_quantizer/DequantizeLinear"]) == "left"
    assert blocks.of_kernel(["act.1/Sigmoid", "act.1", "left", "cat"]) == "left"
    assert blocks.of_kernel(["nobody"]) == INPUT
    names = [
        "images_f32_abcd_u8_acdb_stem/WithoutBiases", "stem/WithoutBiases", "Multiply_100",
        "act.0/quantizer_u8_f32_left",         "join/WithoutBiases + act.2", "Multiply_7",
    ]  # fmt: skip
    assert blocks.of_layers(names) == [INPUT, "stem", "stem", "stem", "join", "join"]


@rtx
@pytest.mark.slow
def test_costs_of_a_few_builds_tell_those_of_all_plans(rtx_setting: Setting) -> None:
    """The table is filled with some plans; every plan is compiled, and its own kernels are the oracle."""
    gpu = load_gpus()["rtx4060"]
    real: dict[tuple[str, ...], dict[str, float]] = {}
    for plan in rtx_setting.plans():
        model = load_onnx(rtx_setting.write(plan))
        if set(plan.values()) == {"float"}:
            model = half_precision(model)
        kernels = compile_graph(model, [gpu.capability], fixed_shapes(View(model))).kernels
        macs = count_products(model, kernels)
        # by hand: 80 x 80 results of every convolution, products of each as its weight has input values
        assert sum(macs.values()) == 80 * 80 * 9 * (32 * 3 + 16 * 16 + 32 * 32) + 40 * 40 * (
            9 * 32 * 32 + 8 * 32
        )
        costs = estimate_blocks(kernels, macs, rtx_setting.blocks, gpu)
        total = sum(costs.values())
        assert total > len(kernels) * gpu.kernel_microseconds / 1e3
        real[tuple(plan.values())] = costs
    built = plans_to_build(rtx_setting.blocks, *choices(rtx_setting.units), 2)
    assert len(built) == 4
    table = CostTable(rtx_setting.blocks)
    for plan in built:
        table.add(plan, real[tuple(plan.values())])
    for plan in rtx_setting.plans():
        assert table.latency(plan) == pytest.approx(sum(real[tuple(plan.values())].values()), rel=0.05)
    int8, floating = (sum(real[(kind,) * 3].values()) for kind in ("int8", "float"))
    assert int8 > floating  # the second kernel of every INT8 convolution, on a network this small


def test_measured_costs_are_the_least_times_of_the_layers(tmp_path: Path) -> None:
    setting = Setting(tmp_path, "openvino")
    plans = [dict.fromkeys(setting.units, "int8"), dict.fromkeys(setting.units, "float")]
    request = EngineRequest(precision="f32", int8_hint="f32", threads=1, batch=1, profile=tmp_path)
    engines = [open_engine("openvino", setting.write(plan), request) for plan in plans]
    found = measure_blocks(engines, (1, 3, *SIZE), 0.05, setting.blocks)
    for engine, costs in zip(engines, found, strict=True):
        samples = engine.layer_samples()
        assert min(map(len, samples.values())) >= 3
        assert sum(costs.values()) == pytest.approx(sum(min(times) for times in samples.values()))
        means = {layer.name: layer.milliseconds for layer in engine.layer_times()}
        assert means == pytest.approx({name: np.mean(times) for name, times in samples.items()})
        assert {"stem", "left", "join", "deep", "last"} <= set(costs)
        named = {name: times for name, times in samples.items() if name.startswith("join/")}
        assert costs["join"] >= sum(map(min, named.values())) > 0
        engine.close()


# -- costs


def table_of(blocks: dict[str, tuple[str, ...]]) -> CostTable:
    return CostTable(Blocks(blocks, {}, frozenset()))


def test_a_state_costs_the_median_of_what_was_seen_or_of_the_nearest() -> None:
    table = table_of({"a": ("u",), "b": ("u", "v", "w"), "c": ()})
    table.add({"u": "float", "v": "float", "w": "float"}, {"a": 1.0, "b": 10.0, "c": 5.0})
    table.add({"u": "float", "v": "int8", "w": "float"}, {"a": 3.0, "b": 20.0, "c": 7.0})
    table.add({"u": "int8", "v": "int8", "w": "int8"}, {"a": 9.0, "b": 70.0})
    assert table.latency({"u": "float", "v": "float", "w": "float"}) == 2.0 + 10.0 + 5.0
    # (float, float, int8) of b: one step from the first, two from the others
    assert table.latency({"u": "float", "v": "float", "w": "int8"}) == 2.0 + 10.0 + 5.0
    # (int8, int8, float) of b: one step from the second and from the third
    assert table.latency({"u": "int8", "v": "int8", "w": "float"}) == 9.0 + (20.0 + 70.0) / 2 + 5.0


def choices(units: Iterable[str]) -> tuple[dict[str, list[str]], list[dict[str, str]]]:
    """Float or INT8 for each unit, and the two uniform plans."""
    names = ["float", "int8"]
    return dict.fromkeys(units, names), [dict.fromkeys(units, name) for name in names]


def test_mixtures_are_built_only_where_they_show_something_new() -> None:
    alone = {"a": ("u",), "b": ("v",)}
    assert plans_to_build(Blocks(alone, {}, frozenset()), *choices("uv"), 5) == [
        {"u": "float", "v": "float"},
        {"u": "int8", "v": "int8"},
    ]
    border = Blocks({"a": ("u", "v")}, {}, frozenset())
    plans = plans_to_build(border, *choices("uv"), 5)
    assert {tuple(plan.values()) for plan in plans} == set(itertools.product(["float", "int8"], repeat=2))


def test_mixtures_keep_to_what_a_unit_can_be() -> None:
    options = {"u": ["float", "int8"], "v": ["float", "int8", "fp8"]}
    border = Blocks({"a": ("u", "v"), "b": ("v",)}, {}, frozenset())
    uniform = [{"u": "float", "v": "float"}, {"u": "int8", "v": "int8"}, {"u": "float", "v": "fp8"}]
    plans = plans_to_build(border, options, uniform, 9)
    assert plans[:3] == uniform
    assert {tuple(plan.values()) for plan in plans} == set(itertools.product(options["u"], options["v"]))


# -- the front


def random_search(seed: int, border: float, num_units: int = 6) -> Search:
    """A chain of blocks, each between two units; a block costs more where these differ."""
    rng = random.Random(seed)
    units = [f"u{index}" for index in range(num_units)]
    blocks = {unit: (units[index - 1], unit) if index else (unit,) for index, unit in enumerate(units)}
    table = table_of(blocks)
    times = {unit: {"float": rng.random(), "int8": rng.random()} for unit in units}
    fees = {unit: border * rng.random() for unit in units}
    for chosen in itertools.product(("float", "int8"), repeat=num_units):
        plan = dict(zip(units, chosen, strict=True))
        costs = {unit: times[unit][plan[unit]] for unit in units}
        for unit, touched in blocks.items():
            costs[unit] += fees[unit] * (len({plan[one] for one in touched}) > 1)
        table.add(plan, costs)
    return Search(table, {unit: {"float": 0.0, "int8": rng.random()} for unit in units})


@pytest.mark.parametrize("border", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("seed", range(6))
def test_no_subset_beats_the_front_at_any_weight(seed: int, border: float) -> None:
    search = random_search(seed, border)
    front = search.front()
    subsets = [
        search.point(dict(zip(search.losses, chosen, strict=True)))
        for chosen in itertools.product(("float", "int8"), repeat=len(search.losses))
    ]
    best = pareto_front(subsets)
    assert (front[0].milliseconds, front[-1].loss) == pytest.approx((best[0].milliseconds, best[-1].loss))
    for weight in [0.0, *(10 ** (step / 10) for step in range(-30, 31))]:
        wanted = min(point.weighted(weight) for point in subsets)
        assert min(point.weighted(weight) for point in front) == pytest.approx(wanted, rel=1e-9)
    for point in front:  # what it says of a plan is what the plan costs
        again = search.point(point.plan)
        assert (again.milliseconds, again.loss) == pytest.approx((point.milliseconds, point.loss))


def test_the_front_of_points() -> None:
    points = [
        Point({"u": str(i)}, *pair) for i, pair in enumerate([(3, 1), (1, 3), (2, 2), (2, 3), (3, 2), (1, 4)])
    ]
    for point in pareto_front(points):  # by definition: nothing is at least as good in both and better in one
        assert not any(
            other.milliseconds <= point.milliseconds
            and other.loss <= point.loss
            and (other.milliseconds, other.loss) != (point.milliseconds, point.loss)
            for other in points
        )
    assert [(point.milliseconds, point.loss) for point in pareto_front(points)] == [(1, 3), (2, 2), (3, 1)]


def test_a_change_costs_the_difference_of_two_plans() -> None:
    search = random_search(7, 1.0)
    plan = {unit: random.Random(unit).choice(["float", "int8"]) for unit in search.losses}
    changes = {"u1": "int8", "u2": "int8", "u4": "float"}
    before, after = search.point(plan), search.point({**plan, **changes})
    milliseconds, loss = search.change(plan, changes)
    assert milliseconds == pytest.approx(after.milliseconds - before.milliseconds)
    assert loss == pytest.approx(after.loss - before.loss)


def test_three_precisions_are_searched() -> None:
    table = table_of({"a": ("u",), "b": ("v",)})
    for precision, milliseconds in (("float", 3.0), ("int8", 2.0), ("fp8", 1.0)):
        table.add(dict.fromkeys("uv", precision), {"a": milliseconds, "b": milliseconds})
    losses = {
        "u": {"float": 0.0, "int8": 0.05, "fp8": 0.15},
        "v": {"float": 0.0, "int8": 0.06, "fp8": 0.17},
    }
    front = Search(table, losses).front()
    found = [(point.milliseconds, round(point.loss, 3)) for point in front]
    assert found == [(2, 0.32), (3, 0.21), (4, 0.11), (5, 0.05), (6, 0)]
