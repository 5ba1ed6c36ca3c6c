"""Attention in exported graphs: what the check says, what ONNX Runtime runs, what NVIDIA's compiler makes of it."""

from __future__ import annotations

import collections
import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from placed import export_named, placed_file, quantized
from torch import Tensor, nn

from core.families import ARCHITECTURES
from core.targets import TARGETS
from deploy import ONNXRuntime, inspect_graph
from deploy.check.command import main
from deploy.graph.model import load_onnx
from models import build_detector, fold_detector
from models.attention import C2PSA
from models.blocks import ConvBlock
from models.folding import fold_network
from quant import Group, PlacementOptions, Rule, TensorSite, calibrate, insert, place, with_named_nodes

SIZE = (16, 24)
ASKED = PlacementOptions(attention="matmul")
rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed"
)


class AttentionNet(nn.Module):
    """Images [B, 3, H, W] to [B, 4, H / 2, W / 2] through a C2PSA of two heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = ConvBlock(3, 256, 3, 2)
        self.block = C2PSA(256, 1, "silu")
        self.output = nn.Conv2d(256, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.block(self.stem(x)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    made = AttentionNet()
    fold_network(made)
    return made.eval()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("attention", ["float", "matmul"])
def test_no_findings(network: nn.Module, target: str, attention: str, tmp_path: Path) -> None:
    path = placed_file(network, tmp_path / "m.onnx", target, PlacementOptions(attention=attention), size=SIZE)
    report = inspect_graph(path)
    assert report.findings == ()
    summary = report.summary
    assert (summary.num_convs, summary.num_int8_convs) == (9, 8)
    # queries and keys are on the scale of the values, which a convolution reads
    assert (summary.num_matmuls, summary.num_quantized_matmuls) == (2, {"float": 1, "matmul": 2}[attention])


def test_products_count(network: nn.Module, tmp_path: Path) -> None:
    """By hand, 8 x 12 cells: convolutions have weights x cells, products heads x N x N x channels of a head."""
    cells = 8 * 12
    weights = 256 * 27 + 256 * 256 * 2 + 128 * 256 + 128 * 128 + 128 * 9 + 2 * 128 * 256 + 256 * 4
    first, second = 2 * cells * cells * 32, 2 * cells * cells * 64
    summary = inspect_graph(placed_file(network, tmp_path / "f.onnx", size=SIZE)).summary
    assert summary.macs == weights * cells + first + second
    assert summary.int8_macs == (weights - 256 * 4) * cells + first
    summary = inspect_graph(placed_file(network, tmp_path / "m.onnx", options=ASKED, size=SIZE)).summary
    assert summary.int8_macs == (weights - 256 * 4) * cells + first + second


def test_a_product_with_one_rounded_operand_is_a_finding(
    network: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "block.blocks.0.attention.softmax"
    placement = place(
        network, rules=(Rule("*.position.conv", keep_float=True),)
    )  # nobody else reads the values
    lonely = Group(name, (TensorSite(name, "softmax", ("transpose_1",)),), ())
    model = quantized(network, replace(placement, groups=(*placement.groups, lonely)))
    path = export_named(model, nn.Identity(), tmp_path / "m.onnx", SIZE, "trt10")
    convolution, finding = inspect_graph(path).findings
    assert convolution.rule == "conv-float"
    assert (finding.rule, finding.name) == ("useless-q", name)
    assert "both operands" in finding.remedy
    assert main([str(path), "--fix", str(tmp_path / "fixed.onnx")]) == 0
    printed = capsys.readouterr().out
    assert "0 of 2 products of two tensors read quantized data" in printed
    assert "1 findings: conv-float 1" in printed


@pytest.mark.parametrize("attention", ["float", "matmul"])
def test_onnxruntime_runs_integer_kernels(network: nn.Module, attention: str, tmp_path: Path) -> None:
    """Also the convolutions without activation: of queries, keys and values, in front of a sum, on both sides of it."""
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    model = insert(network, place(network, PlacementOptions(attention=attention))).eval()
    calibrate(model, [images], "minmax", "minmax")
    named, _ = with_named_nodes(model)
    path = export_named(model, nn.Identity(), tmp_path / "m.onnx", SIZE, "onnxruntime")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    counts = collections.Counter(node.op_type for node in nodes)
    assert counts["QLinearConv"] == 8
    assert counts["Conv"] + counts["FusedConv"] == 1
    assert counts["QLinearAdd"] == 3
    integer = counts["QLinearMatMul"] + counts["MatMulIntegerToFloat"]
    assert integer == {"float": 1, "matmul": 2}[attention]
    with torch.no_grad():
        wanted = named(images).numpy()
    with ONNXRuntime(path, threads=1) as runtime:
        found = runtime.infer(images.numpy())
    assert np.abs(found - wanted).mean() < 0.05 * np.abs(wanted).std()


class FloatReader(nn.Module):
    """A quantized convolution without activation whose result a float operator and a quantized convolution read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 16, 1)
        self.output = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        halves = self.first(x).reshape(x.shape[0], 2, 16, *SIZE).transpose(1, 2).flatten(1, 2)
        gate = halves.exp()
        return self.output(self.second(halves).repeat(1, 2, 1, 1) * gate)  # type: ignore[no-any-return]


def test_a_result_that_is_read_in_float_gets_a_grid_from_images(tmp_path: Path) -> None:
    network = FloatReader().eval()
    path = placed_file(network, tmp_path / "m.onnx", "onnxruntime", size=SIZE)
    assert inspect_graph(path).findings == ()


@rtx
@pytest.mark.parametrize(
    ("attention", "precisions"), [("float", ["int8", "fp16"]), ("matmul", ["int8", "int8"])]
)
def test_the_compiler_runs_quantized_products_in_int8(
    network: nn.Module, attention: str, precisions: list[str], tmp_path: Path
) -> None:
    from deploy.compile.report import inspect_build

    path = placed_file(
        network, tmp_path / "m.onnx", "tensorrt_rtx", PlacementOptions(attention=attention), size=SIZE
    )
    report = inspect_build(load_onnx(path), "SM89")
    assert report.findings == ()
    assert [layer.precision for layer in report.matmuls] == precisions
    assert [layer.name.rpartition(".")[2] for layer in report.matmuls] == ["matmul_0", "matmul_1"]
    assert report.engine.convolutions == {"fp16": 1, "int8": 8}


@rtx
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name.endswith(("n", "nu", "t", "n-seg"))])
@pytest.mark.parametrize("attention", ["float", "matmul"])
def test_every_quantized_layer_of_every_family_is_confirmed(
    name: str, attention: str, tmp_path: Path
) -> None:
    from deploy.compile.report import inspect_build

    torch.manual_seed(0)
    model = fold_detector(build_detector(name, 3)).eval()
    placement = place(model.network, PlacementOptions(attention=attention))
    outputs = ("output0", "output1") if model.task == "segment" else ("output0",)
    path = export_named(
        quantized(model.network, placement), model.decode, tmp_path / "m.onnx", (160, 160), "tensorrt_rtx", outputs
    )  # fmt: skip
    report = inspect_build(load_onnx(path), "SM89")
    assert report.findings == ()
    in_file = {
        layer.name for layer in report.layers
    }  # of a network with two heads, those of the deployed one
    wanted = {site.layer for site in placement.weights} & in_file
    assert {layer.name for layer in report.layers if layer.precision == "int8"} == wanted
    assert in_file - wanted <= set(placement.kept_float)
    assert [layer.precision for layer in report.matmuls].count("int8") >= len(placement.matmuls)
