"""The engine command: builds, FP16 graphs for TensorRT 11, and pictures of engines."""

import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import onnx
import pytest
import torch
from deploy_networks import FloatDetector, SmallDetector
from tensorrt_double import Double

from core.errors import DeployError
from deploy import OpenVINORuntime, export_onnx
from deploy.engine import draw_engine, main
from deploy.runtimes.tensorrt_builder import write_half

SIZE = (64, 96)
DETAILS = {
    "Layers": [
        {
            "Name": "conv + silu",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "images", "Format/Datatype": "Int8 NC/32HW32"}],
            "Outputs": [{"Name": "a"}],
        },
        {
            "Name": "reformat",
            "LayerType": "Reformat",
            "Inputs": [{"Name": "a", "Format/Datatype": "Half NCHW"}],
            "Outputs": [{"Name": "output0"}],
        },
    ],
}


def test_engines_are_drawn_by_precision():
    root = ElementTree.fromstring(draw_engine(DETAILS))
    space = "{http://www.w3.org/2000/svg}"
    titles = [element.text for element in root.iter(f"{space}title")]
    assert titles == ["conv + silu CaskConvolution int8", "reformat Reformat fp16"]
    assert len(list(root.iter(f"{space}path"))) == 1
    with pytest.raises(DeployError, match="detailed profiling verbosity"):
        draw_engine({"Layers": ["conv + silu"]})


def test_build_command(tmp_path, capsys, monkeypatch):
    path = export_onnx(SmallDetector(), tmp_path / "m.onnx", SIZE, "openvino").path
    assert main(["build", str(path), str(tmp_path / "out"), "--runtime", "openvino"]) == 0
    built = capsys.readouterr().out.splitlines()[-1]
    assert OpenVINORuntime(tmp_path / "out" / "m.xml", threads=1).precision == "int8"
    assert built == str(tmp_path / "out" / "m.xml")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert main(["version"]) == 3
    assert "not installed" in capsys.readouterr().err


@pytest.mark.parametrize(("version", "typed"), [("10.3.0", False), ("11.4.0.106", True)])
def test_fp16_builds_of_a_float_graph(tmp_path, monkeypatch, version, typed):
    path = export_onnx(FloatDetector(), tmp_path / "f.onnx", SIZE, "openvino", quantized=False).path
    double = Double(version)
    monkeypatch.setitem(sys.modules, "tensorrt", double.module)
    assert main(["build", str(path), str(tmp_path / "out"), "--precision", "fp16"]) == 0
    read = bytes(double.called("OnnxParser.parse")[0]["model"])
    model = onnx.ModelProto.FromString(read)
    tensors = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    weights = {tensors[node.input[1]] for node in model.graph.node if node.op_type == "Conv"}
    assert weights == {onnx.TensorProto.FLOAT16 if typed else onnx.TensorProto.FLOAT}


def test_half_graph_computes_the_same(tmp_path):
    module = FloatDetector().eval()
    path = export_onnx(module, tmp_path / "f.onnx", SIZE, "openvino", quantized=False).path
    half = write_half(path, tmp_path / "half.onnx")
    images = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        expected = module(images).numpy()
    with OpenVINORuntime(half, threads=1) as runtime:
        assert np.abs(runtime.infer(images.numpy()) - expected).max() < 0.1
    quantized = export_onnx(SmallDetector(), tmp_path / "q.onnx", SIZE, "trt10").path
    with pytest.raises(DeployError, match="target=trt11"):
        write_half(quantized, tmp_path / "h.onnx")
