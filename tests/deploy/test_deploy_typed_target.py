"""The strongly typed graph: a walk over the tensors' types, and parity with torch."""

import numpy as np
import onnx
import pytest
import torch
from deploy_networks import FloatDetector, ReluResidual, SmallDetector
from onnx.reference import ReferenceEvaluator

from core.errors import DeployError
from deploy import ONNXRuntime, export_onnx
from deploy.graph.model import Graph

SIZE = (64, 96)
FLOAT, HALF, INT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8


def tensor_types(path):
    """Types by onnx's own strict inference, an independent oracle."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, check_type=True)
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in [*graph.input, *graph.output, *graph.value_info]}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return model, types


@pytest.mark.parametrize("scale_type", ["fp16", "fp32"])
def test_the_float_part_is_half_and_the_decode_is_float(tmp_path, scale_type):
    report = export_onnx(SmallDetector(), tmp_path / "m.onnx", SIZE, "trt11", scale_type=scale_type)
    assert report.opset == {"fp16": 19, "fp32": 23}[scale_type]
    model, types = tensor_types(report.path)
    for node in model.graph.node:
        if node.op_type == "Conv":
            assert [types[name] for name in [*node.input, *node.output]] == [HALF] * 4, node.name
        if node.name.startswith("/decode") and node.op_type not in ("Cast", "Shape"):
            assert types[node.output[0]] == FLOAT, node.name
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            image = node.input[0] == "images"
            assert types[node.input[1]] == (FLOAT if image or scale_type == "fp32" else HALF)
            assert types[node.output[0]] == (INT8 if node.op_type == "QuantizeLinear" else HALF)
            assert len(node.input) == (3 if scale_type == "fp16" else 2)
    assert types["images"] == types["output0"] == FLOAT
    assert sum(node.op_type == "Cast" for node in model.graph.node) <= 2  # at the border to the decode only


@pytest.mark.parametrize("scale_type", ["fp16", "fp32"])
def test_it_computes_what_torch_computes(tmp_path, scale_type):
    module = SmallDetector().eval()
    path = export_onnx(module, tmp_path / "m.onnx", SIZE, "trt11", scale_type=scale_type).path
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = module(images).numpy()
    output = ReferenceEvaluator(str(path)).run(None, {"images": images.numpy()})[0]
    difference = np.abs(output - expected)
    assert difference[:, :4].mean() < 0.05
    assert difference[:, 4:].max() < 0.01
    if scale_type == "fp16":
        with ONNXRuntime(path, threads=1) as runtime:
            assert np.abs(runtime.infer(images.numpy()) - expected)[:, :4].mean() < 0.05


def test_q_and_dq_of_one_tensor_hold_the_same_scale(tmp_path):
    graph = Graph(onnx.load(export_onnx(SmallDetector(), tmp_path / "m.onnx", SIZE, "trt11").path))
    pairs = 0
    for node in graph.nodes:
        if node.op_type == "QuantizeLinear":
            (reader,) = graph.consumers[node.output[0]]
            assert float(graph.constants[node.input[1]]) == float(graph.constants[reader.input[1]])
            pairs += 1
    assert pairs == 5


def test_raw_and_float_graphs(tmp_path):
    _, types = tensor_types(
        export_onnx(ReluResidual(), tmp_path / "r.onnx", SIZE, "trt11", output_names=("x",)).path
    )
    assert types["x"] == FLOAT
    model, types = tensor_types(
        export_onnx(FloatDetector(), tmp_path / "f.onnx", SIZE, "trt11", quantized=False).path
    )
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    assert {types[name] for node in convs for name in node.input} == {HALF}


def test_a_weight_that_half_cannot_hold_is_named(tmp_path):
    module = SmallDetector()
    with torch.no_grad():
        module.head.bias[3] = 1e6
    with pytest.raises(DeployError, match=r"'head\.bias' holds 1000000\.0, beyond FP16's 65504"):
        export_onnx(module, tmp_path / "m.onnx", SIZE, "trt11")
    with pytest.raises(DeployError, match="bf16"):
        export_onnx(module, tmp_path / "m.onnx", SIZE, "trt11", scale_type="bf16")


def test_tiny_scales_stay_positive(tmp_path):
    module = SmallDetector()
    with torch.no_grad():
        module.left.conv.weight[2] *= 1e-7
    graph = Graph(onnx.load(export_onnx(module, tmp_path / "m.onnx", SIZE, "trt11").path))
    scales = [graph.constants[node.input[1]] for node in graph.nodes if node.op_type == "DequantizeLinear"]
    assert min(float(scale.min()) for scale in scales) > 0
