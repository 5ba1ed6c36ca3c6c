"""The graph check: silent on good graphs, and for every rule a graph that breaks it, made by hand."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from check_edits import SIZE, add_pair, conv, edited, exported, rules
from deploy_networks import QuantizedConv, ReluResidual, SmallDetector, SplitConcat
from onnx import helper
from torch import nn
from torch.nn import functional as F

from deploy import TARGETS, check_graph, export_onnx, inspect_graph
from deploy.check.command import format_report, main
from deploy.check.report import inspect_model


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("module", [SmallDetector, SplitConcat, ReluResidual])
def test_our_exports_have_no_findings(tmp_path, target, module):
    images = [np.random.default_rng(0).random((1, 3, *SIZE), np.float32)]
    path = export_onnx(module(), tmp_path / "m.onnx", SIZE, target, output_names=("x",), images=images).path
    assert check_graph(path) == []


def test_a_conv_without_a_grid_for_its_result_is_told_for_onnxruntime(tmp_path):
    path = export_onnx(SmallDetector(), tmp_path / "m.onnx", SIZE, "onnxruntime").path
    report = inspect_graph(path)
    (finding,) = report.findings
    assert (finding.rule, "ONNX Runtime then runs it in float" in finding.hazard) == ("conv-float", True)
    assert report.summary.num_int8_convs == 4
    assert inspect_graph(path, target="openvino").summary.num_int8_convs == 5


def test_summary_against_hand_counted_work(good):
    summary = inspect_graph(good).summary
    convs = [(32 * 48, 16, 3, 9), (8 * 12, 32, 16, 9), *[(8 * 12, 32, 16, 9)] * 2, (16 * 24, 32, 64, 9)]
    inner = sum(pixels * outputs * inputs * kernel for pixels, outputs, inputs, kernel in convs)
    head = 16 * 24 * 67 * 32
    assert (summary.num_convs, summary.num_int8_convs, summary.num_output_convs) == (6, 5, 1)
    assert (summary.macs, summary.int8_macs) == (inner + head, inner)
    assert summary.inner_int8_share == 1.0
    assert summary.precision_changes == 1  # the image


def test_conv_left_float_names_the_reason(good):
    def float_weight(graph):
        node = conv(graph, 1)
        graph.constants["w"] = np.ones((32, 16, 3, 3), np.float32)
        node.input[1] = "w"

    def float_data(graph):
        node = conv(graph, 1)
        dequantize = graph.producers[node.input[0]]
        node.input[0] = graph.producers[dequantize.input[0]].input[0]

    (finding,) = (f for f in inspect_model(edited(good, float_weight)).findings if f.rule == "conv-float")
    assert "reads INT8 data but its weight is float" in finding.hazard
    findings = inspect_model(edited(good, float_data)).findings
    (finding,) = (f for f in findings if f.rule == "conv-float")
    assert "comes from Mul '/stem/Mul' without Q/DQ" in finding.hazard
    assert "dangling-q" in [f.rule for f in findings]


class Elan(SplitConcat):
    """SplitConcat with mistakes of other tools: scales not shared, or one concat input dropped."""

    def __init__(self, scales=(0.02, 0.02, 0.02, 0.02), dropped=False):
        super().__init__()
        self.scales, self.dropped = scales, dropped

    def forward(self, images):
        def at(index, x):
            return torch.fake_quantize_per_tensor_affine(x, self.scales[index], 0, -128, 127)

        left, right = self.entry(images).chunk(2, 1)
        right = at(1, right)
        first = at(2, F.silu(self._conv(self.first, right)))
        second = at(3, F.silu(self._conv(self.second, first)))
        left = left if self.dropped else at(0, left)
        return F.relu(self._conv(self.exit, torch.cat([left, right, first, second], 1)))


def test_unequal_scales_around_a_split_and_a_concat(tmp_path):
    assert rules(exported(Elan(), tmp_path / "a.onnx")) == []
    report = inspect_model(exported(Elan((0.02, 0.03, 0.02, 0.02)), tmp_path / "b.onnx"))
    # the split tensor is wanted on two scales, and the concat joins two: its conv has no single input scale
    assert sorted(finding.rule for finding in report.findings) == ["conv-float", "unequal-scales"]
    by_rule = {finding.rule: finding for finding in report.findings}
    assert "0.02, 0.03" in by_rule["unequal-scales"].hazard
    assert by_rule["unequal-scales"].reformats == 1
    assert "2 scales" in by_rule["conv-float"].hazard
    (finding,) = inspect_model(exported(Elan(dropped=True), tmp_path / "c.onnx")).findings
    assert finding.rule == "conv-float"
    assert "joins 4 tensors" in finding.hazard


class PerModule(nn.Module):
    """Every conv quantizes its own input with its own scale, as tools that wrap modules do."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = (
            QuantizedConv(3, 16, 0.01),
            QuantizedConv(16, 16, 0.011),
            QuantizedConv(16, 16, 0.012),
        )
        self.pool, self.last = QuantizedConv(16, 16, 0.013), QuantizedConv(48, 8, 0.014)

    def forward(self, x):
        x = self.first(x)
        return self.last(torch.cat([self.left(x), self.right(x), self.pool(F.max_pool2d(x, 3, 1, 1))], 1))


def test_a_naive_per_module_graph(tmp_path):
    report = inspect_model(exported(PerModule(), tmp_path / "m.onnx"))
    (finding,) = report.findings
    # one tensor, three readers (one behind a max-pool), three scales
    assert finding.rule == "unequal-scales"
    assert finding.reformats == 2
    assert "0.011, 0.012, 0.013" in finding.hazard
    assert report.summary.precision_changes == 3


def test_quantizer_between_conv_and_activation(good):
    assert "q-inside-conv" in rules(edited(good, lambda graph: add_pair(graph, conv(graph, 1).output[0])))

    def behind_sigmoid(graph):
        sigmoid = next(
            node for node in graph.consumers[conv(graph, 1).output[0]] if node.op_type == "Sigmoid"
        )
        add_pair(graph, sigmoid.output[0])

    assert "q-inside-conv" in rules(edited(good, behind_sigmoid))


def test_unfolded_batch_norm(good):
    def add_norm(graph):
        result = conv(graph, 1).output[0]
        for name in ("gamma", "beta", "mean", "variance"):
            graph.constants[name] = np.ones(32, np.float32)
        graph.rewire(result, "normed")
        inputs = [result, "gamma", "beta", "mean", "variance"]
        graph.insert([helper.make_node("BatchNormalization", inputs, ["normed"], "norm")])

    assert rules(edited(good, add_norm)) == ["batch-norm"]


class Residual(nn.Module):
    def __init__(self, skip=True, branch=False):
        super().__init__()
        self.entry, self.first, self.second = (
            QuantizedConv(3, 16),
            QuantizedConv(16, 16),
            QuantizedConv(16, 16),
        )
        self.exit = QuantizedConv(16, 16)
        self.skip, self.branch = skip, branch

    def forward(self, images):
        x = self.entry(images)
        quantized = self.first.quantized_input(x)
        y = self.second(F.silu(F.conv2d(quantized, self.first.quantized_weight(), None, 1, 1)))
        y = self.exit.quantized_input(y) if self.branch else y
        return self.exit((quantized if self.skip else x) + y)


@pytest.mark.parametrize(
    ("skip", "branch", "words"), [(False, False, "neither"), (True, True, "on the branch")]
)
def test_residual_sums(tmp_path, skip, branch, words):
    assert rules(exported(Residual(), tmp_path / "good.onnx")) == []
    findings = inspect_model(exported(Residual(skip, branch), tmp_path / "bad.onnx")).findings
    (finding,) = (f for f in findings if f.rule == "residual")
    assert words in finding.hazard


class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.thin, self.last = QuantizedConv(3, 8), QuantizedConv(8, 8), QuantizedConv(8, 20)
        self.deep = QuantizedConv(20, 16)

    def forward(self, x):
        return self.deep(self.last(self.thin(self.first(x))))


def test_narrow_convs(tmp_path):
    findings = inspect_model(exported(Narrow(), tmp_path / "m.onnx")).findings
    # the first conv reads the image, which is allowed; 8 -> 8 is not; 8 -> 20 and 20 -> 16 have a side of 16 or more
    assert [(f.rule, f.name) for f in findings] == [("narrow-conv", "/thin/Conv")]


def test_duplicate_output_and_useless_quantizers(good):
    def duplicate(graph):
        quantize = next(
            node for node in graph.nodes if node.op_type == "QuantizeLinear" and "again" in node.name
        )
        copy = helper.make_node("QuantizeLinear", list(quantize.input), ["twice"], "twice/Q")
        back = helper.make_node(
            "DequantizeLinear", ["twice", *quantize.input[1:]], ["twice_values"], "twice/DQ"
        )
        use = helper.make_node(
            "Conv", ["twice_values", conv(graph, 4).input[1]], ["twice_conv"], "twice/Conv", pads=[1] * 4
        )
        end = helper.make_node("Add", [conv(graph, 4).output[0], "twice_conv"], ["sum"], "sum")
        graph.rewire(conv(graph, 4).output[0], "sum")
        graph.insert([copy, back, use, end])

    assert "duplicate-q" in rules(edited(good, duplicate))

    def at_output(graph):
        final = graph.producers["output0"]
        final.output[0] = "inner"
        graph.reindex()
        add_pair(graph, "inner")
        graph.producers["extra_values"].output[0] = "output0"

    assert rules(edited(good, at_output)) == ["q-at-output"]

    def in_decode(graph):
        softmax = next(node for node in graph.nodes if node.op_type == "Softmax")
        add_pair(graph, softmax.input[0])

    assert rules(edited(good, in_decode)) == ["q-in-decode"]

    def before_the_sums_of_the_boxes(graph):
        """An Add reads this one, but no conv comes after it: 8 bits for distances of boxes."""
        distance = next(node for node in graph.nodes if node.op_type == "ReduceSum")
        add_pair(graph, distance.output[0], 0.25)

    (finding,) = inspect_model(edited(good, before_the_sums_of_the_boxes)).findings
    assert finding.rule == "q-in-decode"
    assert "steps of 0.25" in finding.hazard

    def inside_the_network(graph):
        tensor = graph.producers[graph.producers[conv(graph, 1).input[0]].input[0]].input[0]
        graph.rewire(tensor, "magnitude")
        graph.insert([helper.make_node("Abs", [tensor], ["magnitude"], "magnitude")])
        add_pair(graph, tensor)

    (finding,) = inspect_model(edited(good, inside_the_network)).findings
    assert finding.rule == "useless-q"
    assert "only Abs reads" in finding.hazard

    def requantize(graph):
        quantize = next(
            node for node in graph.nodes if node.op_type == "QuantizeLinear" and "again" in node.name
        )
        add_pair(graph, quantize.input[0])

    found = rules(edited(good, requantize))
    assert "unequal-scales" in found


class Pooled(nn.Module):
    """conv -> average-pool -> conv, with Q/DQ in front of the pool or behind it only."""

    def __init__(self, in_front):
        super().__init__()
        self.first, self.last = QuantizedConv(3, 16), QuantizedConv(16, 16)
        self.in_front = in_front

    def forward(self, x):
        x = self.first(x)
        return self.last(F.avg_pool2d(self.first.quantized_input(x) if self.in_front else x, 2))


def test_average_pool_in_float(tmp_path):
    assert rules(exported(Pooled(True), tmp_path / "good.onnx")) == []
    (finding,) = inspect_model(exported(Pooled(False), tmp_path / "bad.onnx")).findings
    assert (finding.rule, finding.name) == ("float-pool", "/AveragePool")


def test_quantizers_of_one_hazard_are_told_once(good):
    """A pair around an activation: one finding for the place, none for float readers, none for its DQ."""
    found = rules(edited(good, lambda graph: add_pair(graph, conv(graph, 1).output[0], 0.05, np.int8(3))))
    assert found == ["q-inside-conv", "zero-point"]


def test_float_islands_and_half_decode(tmp_path):
    path = export_onnx(SmallDetector(), tmp_path / "t.onnx", SIZE, "trt11").path

    def island(graph):
        sigmoid = next(
            node for node in graph.consumers[conv(graph, 1).output[0]] if node.op_type == "Sigmoid"
        )
        source, result = sigmoid.input[0], sigmoid.output[0]
        sigmoid.input[0], sigmoid.output[0] = "up", "wide"
        graph.insert(
            [
                helper.make_node("Cast", [source], ["up"], "up", to=onnx.TensorProto.FLOAT),
                helper.make_node("Cast", ["wide"], [result], "down", to=onnx.TensorProto.FLOAT16),
            ]
        )

    assert rules(edited(path, island)) == ["fp32-island"]

    def half_decode(graph):
        softmax = next(node for node in graph.nodes if node.op_type == "Softmax")
        source, result = softmax.input[0], softmax.output[0]
        softmax.input[0], softmax.output[0] = "low", "low_result"
        graph.insert(
            [
                helper.make_node("Cast", [source], ["low"], "low", to=onnx.TensorProto.FLOAT16),
                helper.make_node("Cast", ["low_result"], [result], "back", to=onnx.TensorProto.FLOAT),
            ]
        )

    assert rules(edited(path, half_decode)) == ["fp16-decode"]


def test_command_line(good, tmp_path, capsys):
    outputs = [tmp_path / "r.json", tmp_path / "g.svg"]
    assert main([str(good), "--strict", "--json", str(outputs[0]), "--svg", str(outputs[1])]) == 0
    assert "0 findings" in capsys.readouterr().out
    report = json.loads(outputs[0].read_text())
    assert report["summary"]["num_int8_convs"] == 5
    root = ElementTree.parse(outputs[1]).getroot()
    titles = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    convs = [title.split()[-1] for title in titles if "/Conv Conv" in title]
    assert sorted(convs) == ["fp32", *["int8"] * 5]
    bad = tmp_path / "bad.onnx"
    onnx.save(exported(PerModule(), tmp_path / "m.onnx"), bad)
    assert main([str(bad)]) == 0
    assert main([str(bad), "--strict"]) == 4
    assert "unequal-scales" in format_report(inspect_graph(bad))
    assert main([str(tmp_path / "none.onnx")]) == 3


def test_runs_as_a_module(good):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "deploy.check", str(good), "--strict"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "100.00% without the output convs" in result.stdout
