"""TensorRT for RTX: its log is read strictly, its engines are compared with the file, and real plans are built here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from placed import placed_file
from torch import nn

from core.errors import DeployError
from core.operators import unsupported_reason
from deploy import export_onnx
from deploy.check.command import main
from deploy.compile.kernels import Kernel, KernelTensor, read_kernels, total_bytes
from deploy.compile.report import inspect_build, write_float32
from deploy.graph.model import Graph, load_onnx
from deploy.graph.passes import run_pass
from deploy.targets.resize import quantize_behind_resize
from quant import Mode, PlacementOptions, insert, place, set_mode

rtx = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("tensorrt_rtx"),
    reason="TensorRT for RTX is not installed: pip install 'octet[tensorrt-rtx]'",
)

FORMAT = "Format: (NHWC) Channel major format"
CONV = (
    "Name: /network/conv_1/Conv_myl0_5, LayerType: correlation, Inputs: [ { Name: data, Dimensions: [1,16,160,160], "
    f"Strides: [409600,1,2560,16], StrideOrder: [3,0,2,1], Datatype: Int8, {FORMAT} }}], Constants: [ {{ Name: weight, "
    f"Dimensions: [32,16,3,3], Strides: [144,1,48,16], StrideOrder: [3,0,2,1], Datatype: Int8, {FORMAT} }}], Outputs: "
    f"[ {{ Name: sum, Dimensions: [1,32,80,80], Strides: [204800,1,2560,32], StrideOrder: [3,0,2,1], Datatype: Float, "
    f"{FORMAT} }}], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: /network/conv_1/Conv]\x1f"
    "[ONNX Layer: /network/activation_quantizers.1/DequantizeLinear]"
)
FINISH = (
    "Name: __myl_MulCast_myl0_4, LayerType: kgen, Inputs: [ { Name: sum, Dimensions: [1,32,80,80], Strides: "
    f"[204800,1,2560,32], StrideOrder: [3,0,2,1], Datatype: Float, {FORMAT} }}, {{ Name: skip, Dimensions: [8,2], "
    f"Strides: [2,1], StrideOrder: [1,0], Datatype: Half, {FORMAT} }}], Constants: [], Outputs: [ {{ Name: codes, "
    f"Dimensions: [1,32,80,80], Strides: [204800,1,2560,32], StrideOrder: [3,0,2,1], Datatype: Int8, {FORMAT} }}], "
    "TacticName: __myl_MulCast_0xcaf8, StreamId: 1, Metadata: [ONNX Layer: /network/act/Mul]"
)
SIGNAL = (
    "Name: entry^bb^signal^2, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, "
    "EventId: 24, Metadata: "
)


def log(*lines: str) -> list[str]:
    return ["Building ...", "Layers:\n" + "\n".join(lines) + "\n\nBindings:", "more"]


# -- the log


def test_kernels_are_read_with_types_shapes_and_nodes() -> None:
    conv, finish = read_kernels(log(SIGNAL, CONV, FINISH))
    assert (conv.name, conv.kind) == ("/network/conv_1/Conv_myl0_5", "correlation")
    assert conv.inputs == (KernelTensor("data", (1, 16, 160, 160), "Int8"),)
    assert conv.constants == (KernelTensor("weight", (32, 16, 3, 3), "Int8"),)
    assert conv.outputs == (KernelTensor("sum", (1, 32, 80, 80), "Float"),)
    assert conv.nodes == ("/network/conv_1/Conv", "/network/activation_quantizers.1/DequantizeLinear")
    assert [tensor.name for tensor in finish.inputs] == ["sum", "skip"]
    # by hand: 16*160*160 codes in, 32*80*80 float32 out; then the sums, 16 halves and the codes
    assert conv.moved_bytes == 409_600 + 4 * 204_800
    assert total_bytes([conv, finish]) == (409_600 + 819_200) + (819_200 + 32 + 204_800)


def test_a_1x1_convolution_may_be_a_matrix_product() -> None:
    """As the compiler writes it for the wide 1x1 convolutions of an FP16 YOLOv9-c."""
    product = CONV.replace("/network/conv_1/Conv]", "/network/conv_1/Conv]__gemm_from_conv1x1")
    assert product != CONV
    assert read_kernels(log(product))[0].nodes == read_kernels(log(CONV))[0].nodes
    with pytest.raises(DeployError, match="metadata of unknown form"):
        read_kernels(log(product.replace("__gemm_from_conv1x1", "__gemm_from_conv3x3")))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("LayerType", "Type"),
        ("Inputs", "Sources"),
        ("Constants: ", ""),
        ("Dimensions", "Shape"),
        ("Datatype: Int8", "Datatype: Int9"),
        ("Datatype", "Type"),
        ("StrideOrder", "Order"),
        ("Format", "Layout"),
        ("TacticName", "Tactic"),
        ("StreamId: 0, ", ""),
        ("Metadata", "Meta"),
        ("[ONNX Layer: ", "[Layer: "),
        ("16,160", "a,160"),
    ],
)
def test_a_line_of_another_form_is_an_error(old: str, new: str) -> None:
    assert old in CONV
    with pytest.raises(DeployError, match=r"unknown form|lists no kernel"):
        read_kernels(log(SIGNAL, CONV.replace(old, new), FINISH))


def test_dimensions_that_a_profile_leaves_open_have_no_size() -> None:
    line = CONV.replace("[1,16,160,160]", "[-1,16,-1,-1]").replace("[409600,1,2560,16]", "[-1,1,-1,16]")
    (conv,) = read_kernels(log(line))
    assert conv.inputs[0].shape == (-1, 16, -1, -1)
    assert math.isnan(conv.moved_bytes)
    assert conv.outputs[0].num_bytes == 819_200


@pytest.mark.parametrize("messages", [[], ["Layers"], log(), log(SIGNAL)])
def test_a_log_without_kernels_is_an_error(messages: list[str]) -> None:
    with pytest.raises(DeployError, match="lists no kernel"):
        read_kernels(messages)


def test_sizes_of_all_types() -> None:
    sizes = {"Float": 4.0, "Half": 2.0, "Int8": 1.0, "FP8": 1.0, "Int32": 4.0, "Bool": 1.0}
    for name, size in sizes.items():
        tensor = KernelTensor("x", (3, 5), name)
        assert tensor.num_bytes == 15 * size
    assert Kernel("k", "kgen", (), (), (), ()).moved_bytes == 0


# -- the pair behind a Resize


class Neck(nn.Module):
    """Convolution -> upsampling -> concat with an earlier map -> convolution, as in a top-down neck stage."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.down = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 32, 3, 2, 1)
        self.up, self.join = nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(64, 32, 1)
        self.act, self.last = nn.SiLU(), nn.Conv2d(32, 8, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.act(self.stem(images))
        y = self.act(self.down(x))
        return self.last(self.act(self.join(torch.cat([self.up(y), x], 1))))


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    network = Neck().eval()
    model = insert(network, place(network)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("log_scale"):
            parameter.data.fill_(-4.0)
    set_mode(model, Mode.QUANTIZE)
    return model


@pytest.fixture(scope="module")
def exported(quantized: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rtx") / "neck.onnx"
    export_onnx(quantized, path, (160, 160), "trt11")
    return path


def test_a_pair_with_the_same_scale_stands_behind_every_nearest_resize(
    quantized: nn.Module, tmp_path: Path
) -> None:
    """Values are the same to the bit: the repeated pair rounds what is on the grid already."""
    for target in ("trt10", "openvino"):
        export_onnx(quantized, tmp_path / f"{target}.onnx", (160, 160), target)
    graph = Graph(load_onnx(tmp_path / "trt10.onnx"))
    (resize,) = [node for node in graph.nodes if node.op_type == "Resize"]
    (quantize,) = graph.consumers[resize.output[0]]
    before = graph.producers[resize.input[0]]
    assert quantize.op_type == "QuantizeLinear"
    assert before.op_type == "DequantizeLinear"
    scales = [graph.constants[node.input[1]] for node in (before, quantize)]
    assert scales[0] == scales[1]
    assert scales[0].shape == ()
    images = np.random.default_rng(0).random((1, 3, 160, 160), np.float32)
    results = [run(tmp_path / f"{target}.onnx", images) for target in ("trt10", "openvino")]
    np.testing.assert_array_equal(*results)


def run(path: Path, images: np.ndarray) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


def test_a_float_resize_and_one_that_has_its_pair_are_left_alone() -> None:
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Resize", ["x", "", "scales"], ["y"], name="up", mode="nearest")],
            "float",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 16, 16])],
            [numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    assert run_pass(model, quantize_behind_resize).edits == 0


# -- real builds, without a GPU


@rtx
def test_every_quantized_convolution_runs_in_int8(exported: Path, tmp_path: Path) -> None:
    report = inspect_build(load_onnx(exported), "SM89")
    precisions = {layer.name: layer.precision for layer in report.layers}
    assert precisions == {
        "/stem/Conv": "int8",
        "/down/Conv": "int8",
        "/join/Conv": "int8",
        "/last/Conv": "fp16",
    }
    assert report.findings == ()
    assert report.fp16.convolutions == {"fp16": 4}
    assert report.engine.moved_bytes > 0
    code = main([str(exported), "--compile", "SM89", "--strict", "--json", str(tmp_path / "check.json")])
    assert code == 0
    (stored,) = json.loads((tmp_path / "check.json").read_text())["compiled"]
    assert stored["engine"]["convolutions"] == {"fp16": 1, "int8": 3}


@rtx
def test_a_convolution_behind_a_bare_resize_is_a_finding(quantized: nn.Module, exported: Path) -> None:
    model = load_onnx(exported)
    graph = Graph(model)
    (resize,) = [node for node in graph.nodes if node.op_type == "Resize"]
    (quantize,) = graph.consumers[resize.output[0]]
    (dequantize,) = graph.consumers[quantize.output[0]]
    graph.rewire(dequantize.output[0], resize.output[0])
    graph.remove([quantize, dequantize])
    graph.commit()
    (finding,) = inspect_build(model, "SM89").findings
    assert (finding.name, finding.rule) == ("/join/Conv", "float-in-engine")
    assert "Resize" in finding.hazard


@rtx
def test_a_scale_of_shape_1_is_a_finding(exported: Path) -> None:
    model = load_onnx(exported)
    graph = Graph(model)
    for node in graph.nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[0] not in graph.constants:
            graph.constants[node.input[1]] = graph.constants[node.input[1]].reshape(1)
    graph.commit()
    findings = inspect_build(model, "SM89").findings
    assert {finding.name for finding in findings} >= {"/down/Conv", "/join/Conv"}
    assert all("shape [1]" in finding.hazard for finding in findings)


@rtx
def test_turing_has_no_int8_convolutions(exported: Path) -> None:
    findings = inspect_build(load_onnx(exported), "SM75").findings
    assert [finding.name for finding in findings] == ["/stem/Conv", "/down/Conv", "/join/Conv"]
    assert all("no INT8 convolutions" in finding.hazard for finding in findings)


@rtx
def test_refusals_have_the_compilers_words(
    exported: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = load_onnx(exported)
    model.graph.node.append(helper.make_node("NoSuchOperator", ["images"], ["nothing"], name="odd"))
    model.graph.output.append(helper.make_tensor_value_info("nothing", TensorProto.FLOAT, None))
    path = tmp_path / "odd.onnx"
    onnx.save(model, path)
    assert main([str(path), "--compile", "SM89"]) == 3
    assert "cannot read the graph" in capfd.readouterr().err
    assert main([str(exported), "--compile", "SM90"]) == 3
    assert "SM90: expected one of SM75, SM80" in capfd.readouterr().err


@rtx
def test_open_shapes_are_compiled_at_the_image_size(quantized: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "open.onnx"
    export_onnx(quantized, path, (160, 160), "trt11", dynamic_size=True)
    report = inspect_build(load_onnx(path), "SM86", (192, 160))
    assert report.engine.convolutions == {"fp16": 1, "int8": 3}


def test_the_float_twin_keeps_casts_of_whole_numbers() -> None:
    """A graph that computes with indices (TopK) has casts that make numbers of them; only those between floats go."""
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], "to_half", to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["half"], ["single"], "to_single", to=TensorProto.FLOAT),
        helper.make_node("TopK", ["single", "number"], ["best", "place"], "best"),
        helper.make_node("Cast", ["place"], ["place_number"], "to_number", to=TensorProto.FLOAT),
        helper.make_node("Add", ["best", "place_number"], ["y"], "add"),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, n]) for name, n in (("x", 9), ("y", 3))
    ]
    number = numpy_helper.from_array(np.array([3], np.int64), "number")
    model = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:], [number]),
        opset_imports=[helper.make_opsetid("", 19)],
    )
    run_pass(model, write_float32)
    assert [node.name for node in model.graph.node] == ["best", "to_number", "add"]
    onnx.checker.check_model(model, full_check=True)


@rtx
@pytest.mark.parametrize(
    ("layer", "grid", "wanted"),
    [
        (nn.ConvTranspose2d(16, 16, 2, 2), "integer", "fp16"),
        (nn.Conv2d(16, 16, 7, 1, 3, groups=16), "fp8", "fp16"),
        (nn.Conv2d(16, 16, 5, 1, 2, groups=16), "fp8", "fp8"),
    ],
    ids=["transposed", "depthwise 7x7", "depthwise 5x5"],
)
def test_what_the_compiler_does_not_run_in_8_bits_is_found_with_its_reason(
    layer: nn.Module, grid: str, wanted: str, tmp_path: Path
) -> None:
    """All quantized on request: the compiler decides, and the finding says what `unsupported_reason` says."""
    torch.manual_seed(0)
    chain = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.SiLU(), layer, nn.SiLU(), nn.Conv2d(16, 16, 1), nn.SiLU(), nn.Conv2d(16, 4, 1)
    ).eval()  # fmt: skip
    path = placed_file(
        chain, tmp_path / "m.onnx", "tensorrt_rtx", PlacementOptions(grid=grid, quantize_narrow=True)
    )
    report = inspect_build(load_onnx(path), "SM89")
    assert {built.name: built.precision for built in report.layers}["2"] == wanted
    found = [(finding.rule, finding.name) for finding in report.findings if finding.name == "2"]
    assert found == ([("float-in-engine", "2")] if wanted == "fp16" else [])
    reason = unsupported_reason(layer.kernel_size, isinstance(layer, nn.ConvTranspose2d), grid == "fp8")
    assert all(reason in finding.hazard for finding in report.findings if finding.name == "2")
