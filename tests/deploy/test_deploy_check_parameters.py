"""The graph check on single quantizers: scales, zero points, codes, weights, biases."""

import numpy as np
import onnx
import pytest
from check_edits import SIZE, conv, edited, rules
from deploy_networks import SmallDetector
from onnx import helper

from deploy import export_onnx
from deploy.check.command import main
from deploy.check.report import inspect_model


@pytest.mark.parametrize("value", [0.0, -0.1, np.nan, np.inf])
def test_bad_scales(good, value):
    def spoil(graph):
        name = graph.producers[conv(graph, 2).input[1]].input[1]
        graph.constants[name] = graph.constants[name].copy()
        graph.constants[name][3] = value

    assert rules(edited(good, spoil)) == ["bad-scale"]


def test_weights_and_zero_points(good, tmp_path):
    def per_tensor(graph):
        node = graph.producers[conv(graph, 2).input[1]]
        graph.constants["one"], graph.constants["none"] = np.float32(0.1), np.int8(0)
        node.input[1], node.input[2] = "one", "none"

    assert rules(edited(good, per_tensor)) == ["per-tensor-weight"]

    def bias(graph):
        graph.constants["b"], graph.constants["s"] = np.ones(32, np.int32), np.float32(0.1)
        graph.insert([helper.make_node("DequantizeLinear", ["b", "s"], ["bias"], "bias/DQ")])
        conv(graph, 2).input[2] = "bias"

    assert rules(edited(good, bias)) == ["quantized-bias"]
    # the unsigned graph for OpenVINO is fine there, and a mistake when handed to TensorRT
    path = export_onnx(SmallDetector(), tmp_path / "u.onnx", SIZE, "openvino").path
    model = onnx.load(path)
    assert rules(model) == []
    del model.metadata_props[:]
    assert set(rules(model)) == {"zero-point"}


def test_unsigned_codes_without_a_zero_point(good):
    """NNCF's form of tensors that are never negative: uint8, zero point 0, stated or left out."""

    def unsigned(graph, stated):
        graph.constants["byte_zero"] = np.uint8(0)
        image = next(node for node in graph.nodes if node.input[0] == "images")
        for node in (image, *graph.consumers[image.output[0]]):
            del node.input[2:]
            node.input.extend(["byte_zero"] if stated else [])

    for stated in (True, False):
        (finding,) = inspect_model(edited(good, lambda graph, s=stated: unsigned(graph, s))).findings
        assert finding.rule == "zero-point"
        assert "uint8" in finding.hazard


def test_target_of_graphs_that_other_tools_quantized(tmp_path, capsys):
    """A tool that keeps the metadata of our float file does not make the graph ours."""
    path = export_onnx(SmallDetector(), tmp_path / "u.onnx", SIZE, "openvino").path
    model = onnx.load(path)
    entries = {entry.key: entry for entry in model.metadata_props}
    assert entries["octet.quantized"].value == "true"
    entries["octet.quantized"].value = "false"
    assert set(rules(model)) == {"zero-point"}
    onnx.save(model, path)
    assert main([str(path), "--target", "openvino", "--strict"]) == 0
    assert main([str(path), "--strict"]) == 4
    assert "TensorRT assumed" in capsys.readouterr().out


def test_dequantizer_that_does_not_fit_its_quantizer(good):
    def change(graph):
        graph.constants["other_scale"] = np.float32(0.5)
        graph.producers[conv(graph, 1).input[0]].input[1] = "other_scale"

    (finding,) = (f for f in inspect_model(edited(good, change)).findings if f.rule == "pair-mismatch")
    assert "values change" in finding.hazard
