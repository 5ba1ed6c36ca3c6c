"""The check is silent on every architecture for every target, and its files name layers as the placement does."""

import copy
import importlib.util
import re

import onnx
import pytest
import torch
from placed import export_named, quantized
from torch import nn

import deploy.export
from core.choices import FP8, INTEGER
from core.families import ARCHITECTURES
from deploy import TARGETS, inspect_graph, load_onnx
from models import build_detector, fold_detector, select_head
from quant import PlacementOptions, place

SIZE = (64, 64)


def detector(name):
    torch.manual_seed(0)
    built = build_detector(name, 3)
    return fold_detector(select_head(built, built.deployed_head)).eval()


def outputs_of(model):
    return ("output0", "output1") if model.task == "segment" else ("output0",)


@pytest.fixture
def shared_traces(monkeypatch):
    """Targets of one opset share the trace, which is half of an export's time."""
    traced, trace = {}, deploy.export._trace

    def trace_once(module, image_size, opset, *args):
        if opset not in traced:
            traced[opset] = trace(module, image_size, opset, *args)
        return copy.deepcopy(traced[opset])

    monkeypatch.setattr(deploy.export, "_trace", trace_once)


def layers_in(path):
    """Names of the convs and matrix products outside the decode."""
    nodes = onnx.load(path).graph.node
    found = [node.name for node in nodes if node.op_type in {"Conv", "ConvTranspose", "Gemm", "MatMul"}]
    return [name for name in found if not name.startswith("/decode/")]


def pools_as_convs(model, target):
    """Names of the average-pools that a target's graph holds as depthwise convs."""
    pools = [name for name, module in model.network.named_modules() if isinstance(module, nn.AvgPool2d)]
    return pools if target == "onnxruntime" else []


def all_targets(name):
    """Whether a network is checked for every target: the larger sizes have the smallest one's blocks, only more."""
    return name.startswith("yolov9") or re.fullmatch(r"\D+\d+nu?(-seg)?", name) is not None


def without_other_head(names):
    """Names of layers without those of the one-to-many head where there is a one-to-one head, which is deployed."""
    others = {name.replace("head.one2one_", "head.", 1) for name in names if name.startswith("head.one2one_")}
    return [name for name in names if name not in others]


CASES = [
    ("yolov9t", ("trt10",)),
    ("yolo11n", ("trt10",)),  # attention, depthwise convolutions, sums without an activation
    pytest.param("yolov9m", ("trt10",), marks=pytest.mark.slow),  # with convolutions that are nearly narrow
    *(
        pytest.param(name, TARGETS if all_targets(name) else ("trt10",), marks=pytest.mark.exhaustive)
        for name in ARCHITECTURES
    ),
]


@pytest.mark.parametrize(("name", "targets"), CASES)
def test_no_findings_on_what_is_placed_and_exported(name, targets, tmp_path, shared_traces):
    model = detector(name)
    placement = place(model.network)
    network = quantized(model.network, placement)
    layers = without_other_head([site.layer for site in placement.weights])
    floating = without_other_head(list(placement.kept_float))
    found = {}
    for target in targets:
        path = export_named(
            network, model.decode, tmp_path / f"{target}.onnx", SIZE, target, outputs_of(model)
        )
        report = inspect_graph(path)
        found[target] = [(finding.rule, finding.name) for finding in report.findings]
        assert report.summary.num_int8_convs == len(layers)
        assert sorted(layers_in(path)) == sorted([*layers, *floating, *pools_as_convs(model, target)])
    assert found == {target: [] for target in targets}


@pytest.mark.parametrize("name", ["yolov9t", pytest.param("yolov9c-seg", marks=pytest.mark.exhaustive)])
def test_float_files_name_layers_as_the_placement_does(name, tmp_path):
    model = detector(name)
    placement = place(model.network)
    path = export_named(
        model.network, model.decode, tmp_path / "float.onnx", SIZE, "trt10", outputs_of(model), False
    )
    wanted = [*(site.layer for site in placement.weights), *placement.kept_float]
    assert sorted(layers_in(path)) == sorted(wanted)
    names = [node.name for node in onnx.load(path).graph.node]
    assert len(set(names)) == len(names)


COMPILED = [
    ("yolov9t", INTEGER),
    pytest.param("yolov9t", FP8, marks=pytest.mark.exhaustive),
    *(
        pytest.param(name, grid, marks=pytest.mark.exhaustive)
        for name in ARCHITECTURES
        if all_targets(name) and name != "yolov9t"
        for grid in (INTEGER, FP8)
    ),
]


@pytest.mark.skipif(
    not importlib.util.find_spec("tensorrt_rtx"),
    reason="TensorRT for RTX is not installed: pip install 'octet[tensorrt-rtx]'",
)
@pytest.mark.parametrize(("name", "grid"), COMPILED)
def test_the_compiler_runs_every_planned_layer_in_its_codes(name, grid, tmp_path):
    """One plan for all GPUs: what one of them does not run in 8 bits, none of them does."""
    from deploy.compile.report import BuildSummary, inspect_build

    model = detector(name)
    placement = place(model.network, PlacementOptions(grid=grid))
    network = quantized(model.network, placement)
    path = export_named(
        network, model.decode, tmp_path / "m.onnx", (160, 160), "tensorrt_rtx", outputs_of(model)
    )
    gpus = "SM89,SM120" if grid == FP8 else "SM80,SM86,SM89,SM120"
    report = inspect_build(load_onnx(path), gpus, fp16=BuildSummary(0, {}, 0))
    planned = {site.layer for site in placement.weights}
    found = {layer.name: layer.precision for layer in report.layers}
    assert {layer: found[layer] for layer in planned} == dict.fromkeys(
        planned, "fp8" if grid == FP8 else "int8"
    )
    assert {name for name, precision in found.items() if precision in ("int8", "fp8")} == planned
    assert report.findings == ()
