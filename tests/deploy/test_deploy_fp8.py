"""FP8 graphs: what is stored, ONNX Runtime against torch code by code, the graph check, and builds without a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from onnx import TensorProto
from torch import nn

from core.errors import DeployError
from deploy import compare_codes, export_onnx
from deploy.check.command import main
from deploy.check.report import inspect_graph, inspect_model
from deploy.graph.model import Graph, load_onnx
from deploy.graph.quantizers import quantized_precision
from deploy.graph.view import View
from deploy.runtimes.onnxruntime import CodeRecorder, run_model
from deploy.runtimes.tensorrt_builder import check_codes, read_facts
from quant import PlacementOptions, Rule, calibrate, insert, place, quantized_layers
from quant.codes import activation_codes

E4M3 = ml_dtypes.float8_e4m3fn
rtx = pytest.mark.skipif(
    not importlib.util.find_spec("tensorrt_rtx"),
    reason="TensorRT for RTX is not installed: pip install 'octet[tensorrt-rtx]'",
)


class Net(nn.Module):
    """Two max-pools in a row, upsampling and a concat between convolutions; the last one stays float."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.down = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 32, 3, 2, 1)
        self.pool, self.pyramid = nn.MaxPool2d(5, 1, 2), nn.Conv2d(96, 32, 1)
        self.up, self.join = nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(64, 32, 1)
        self.act, self.last = nn.SiLU(), nn.Conv2d(32, 8, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.act(self.stem(images))
        y = self.act(self.down(x))
        once = self.pool(y)
        y = self.act(self.pyramid(torch.cat([y, once, self.pool(once)], 1)))
        return self.last(self.act(self.join(torch.cat([self.up(y), x], 1))))


IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def quantized(*rules: Rule, grid: str = "fp8") -> nn.Module:
    """Every layer in FP8, that of the image included, unless other rules say otherwise."""
    network = Net().eval()
    rules = (Rule("input.images", grid="fp8"), *rules) if grid == "fp8" else rules
    model = insert(network, place(network, PlacementOptions(grid=grid), rules)).eval()
    calibrate(model, [IMAGES])
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return quantized()


@pytest.fixture(scope="module")
def exported(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp8") / "net.onnx"
    export_onnx(model, path, (64, 64), "trt11")
    return path


# -- the file


@pytest.mark.parametrize(("scale_type", "opset"), [("fp16", 19), ("fp32", 23)])
def test_weights_and_codes_are_e4m3(model: nn.Module, tmp_path: Path, scale_type: str, opset: int) -> None:
    path = tmp_path / "net.onnx"
    report = export_onnx(model, path, (64, 64), "trt11", scale_type=scale_type)
    assert (report.opset, report.num_fp8_weights, report.num_int8_weights) == (opset, 4, 0)
    view = View(load_onnx(path))
    layers = quantized_layers(model)
    for node, layer in zip(view.weighted()[:4], layers.values(), strict=True):
        dequantize = view.weight_dequantizer(node)
        assert dequantize is not None
        stored = view.graph.constants[dequantize.input[0]]
        assert view.graph.constants[dequantize.input[1]].shape == ()
        step = layer.weight_quantizer.scale.numpy().item()
        wanted = (layer.weight.detach().numpy() / np.float32(step)).clip(-448, 448).astype(E4M3)
        assert np.array_equal(stored.view(np.uint8), wanted.view(np.uint8))
    for node in view.quantizers("QuantizeLinear"):
        assert view.types[node.output[0]] == TensorProto.FLOAT8E4M3FN
        assert view.graph.constants[node.input[1]].shape == ()


@pytest.mark.parametrize("scale_type", ["fp16", "fp32"])
@pytest.mark.parametrize(
    ("rules", "grid", "wanted"),
    [
        ((), "fp8", "fp8"),
        ((), "integer", "int8"),
        ((Rule("input.images", grid="integer"),), "fp8", "int8-fp8"),
        ((Rule("*", keep_float=True),), "fp8", None),
    ],
)
def test_a_graph_is_called_by_its_codes(
    tmp_path: Path, rules: tuple[Rule, ...], grid: str, wanted: str | None, scale_type: str
) -> None:
    path = tmp_path / "net.onnx"
    export_onnx(
        quantized(*rules, grid=grid), path, (64, 64), "trt11", scale_type=scale_type, quantized=bool(wanted)
    )
    assert quantized_precision(load_onnx(path)) == wanted


def test_a_build_for_other_codes_is_refused(exported: Path, tmp_path: Path) -> None:
    facts = read_facts(exported)
    check_codes(facts, None, "trt11")
    check_codes(facts, "fp8", "trt11")
    with pytest.raises(DeployError, match="precision=int8, but the graph's codes are fp8"):
        check_codes(facts, "int8", "trt11")


def test_onnxruntime_computes_the_codes_of_torch(model: nn.Module, tmp_path: Path) -> None:
    """The graph with a float32 part; ONNX Runtime has no kernels for the FP16 part of trt11's."""
    path = tmp_path / "net.onnx"
    export_onnx(model, path, (64, 64), "trt10", opset=19)
    images = IMAGES.numpy()
    with torch.no_grad():
        wanted = model(IMAGES).numpy()
    np.testing.assert_allclose(run_model(load_onnx(path), images), wanted, rtol=0, atol=1e-4)
    ours = {name: codes.numpy() for name, codes in activation_codes(model, IMAGES).items()}
    theirs = [codes for name, codes in CodeRecorder(path).codes(images).items() if "_repeated" not in name]
    report = compare_codes([(dict(zip(ours, theirs, strict=True)), ours)])
    assert report.values > 100_000
    assert report.share < 1e-4  # sums in another order, at the border between two codes
    assert set(report.steps) <= {1}
    assert min(codes.min() for codes in ours.values()) < 0
    assert max(codes.max() for codes in ours.values()) > 100


# -- the check


def test_the_check_knows_fp8(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect_graph(exported)
    assert report.findings == ()
    summary = report.summary
    assert (summary.num_fp8_convs, summary.num_int8_convs, summary.num_convs) == (4, 0, 5)
    assert (summary.inner_fp8_share, summary.int8_share) == (1.0, 0.0)
    assert main([str(exported), "--svg", str(tmp_path / "net.svg")]) == 0
    assert "4 of 5 convs in FP8" in capsys.readouterr().out
    assert "/join/Conv Conv join fp8" in (tmp_path / "net.svg").read_text()
    view = View(load_onnx(exported))
    (resize,) = [node for node in view.graph.nodes if node.op_type == "Resize"]
    assert view.node_precision(resize) == "fp8"


def test_data_and_weights_of_two_kinds_are_a_finding(exported: Path) -> None:
    model = load_onnx(exported)
    graph = Graph(model)
    node = next(node for node in graph.nodes if node.name == "/down/Conv")
    dequantize = graph.producers[node.input[1]]
    graph.constants[dequantize.input[0]] = graph.constants[dequantize.input[0]].astype(np.int8)
    graph.constants["zero"] = np.zeros((), np.int8)
    dequantize.input[2] = "zero"
    graph.commit()
    found = {finding.rule: finding for finding in inspect_model(model).findings}
    assert set(found) == {"conv-float", "per-tensor-weight"}
    assert {finding.name for finding in found.values()} == {"/down/Conv"}
    assert "2 kinds (fp8, int8)" in found["conv-float"].hazard


# -- real builds, without a GPU


@rtx
@pytest.mark.parametrize("capability", ["SM89", "SM120"])
def test_every_quantized_convolution_runs_in_fp8(exported: Path, capability: str) -> None:
    from deploy.compile.report import inspect_build

    report = inspect_build(load_onnx(exported), capability)
    assert report.findings == ()
    assert report.engine.convolutions == {"fp16": 1, "fp8": 4}
    assert [layer.is_quantized for layer in report.layers] == [True, True, True, True, False]
    # one scale for all weights of a layer lets the kernel finish its convolution
    assert {layer.result for layer in report.layers} == {"fp16"}


@rtx
def test_a_convolution_behind_a_bare_max_pool_is_a_finding(exported: Path) -> None:
    from deploy.compile.report import inspect_build

    model = load_onnx(exported)
    graph = Graph(model)
    for pool in [node for node in graph.nodes if node.op_type == "MaxPool"]:
        quantize = next(n for n in graph.consumers[pool.output[0]] if n.op_type == "QuantizeLinear")
        (dequantize,) = graph.consumers[quantize.output[0]]
        graph.rewire(dequantize.output[0], pool.output[0])
        graph.remove([quantize, dequantize])
    graph.commit()
    (finding,) = inspect_build(model, "SM89").findings
    assert (finding.name, finding.rule) == ("/pyramid/Conv", "float-in-engine")
    assert "MaxPool" in finding.hazard


@rtx
def test_float32_scales_compile_too(model: nn.Module, tmp_path: Path) -> None:
    from deploy.compile.report import inspect_build

    export_onnx(model, tmp_path / "net.onnx", (64, 64), "trt11", scale_type="fp32")
    assert inspect_build(load_onnx(tmp_path / "net.onnx"), "SM89").engine.convolutions == {
        "fp16": 1,
        "fp8": 4,
    }


@rtx
def test_a_mixed_plan_runs_each_layer_as_planned(tmp_path: Path) -> None:
    from deploy.compile.report import inspect_build

    mixed = quantized(Rule("input.images", grid="fp8"), grid="integer")
    export_onnx(mixed, tmp_path / "net.onnx", (64, 64), "trt11")
    report = inspect_build(load_onnx(tmp_path / "net.onnx"), "SM89")
    precisions = [(layer.name, layer.precision) for layer in report.layers]
    assert precisions == [
        ("/stem/Conv", "fp8"),
        ("/down/Conv", "int8"),
        ("/pyramid/Conv", "int8"),
        ("/join/Conv", "int8"),
        ("/last/Conv", "fp16"),
    ]
    assert report.findings == ()


@rtx
@pytest.mark.parametrize("capability", ["SM80", "SM86"])
def test_gpus_without_fp8_are_named_before_the_build(exported: Path, capability: str) -> None:
    from deploy.compile.report import inspect_build

    with pytest.raises(
        DeployError, match=f"FP8 codes, which {capability} does not run: build for SM89, SM120, SM121"
    ):
        inspect_build(load_onnx(exported), capability)
