"""Graphs for the tests of the check: exports, and edits that break one rule each."""

import numpy as np
import onnx
from onnx import helper

from deploy import export_onnx
from deploy.check.report import inspect_model
from deploy.graph.model import Graph

SIZE = (64, 96)


def rules(model):
    return sorted(finding.rule for finding in inspect_model(model).findings)


def edited(path, edit):
    model = onnx.load(path)
    graph = Graph(model)
    edit(graph)
    return graph.commit()


def conv(graph, number):
    return [node for node in graph.nodes if node.op_type == "Conv"][number]


def add_pair(graph, tensor, scale=0.05, zero_point=None):
    """Q/DQ for every reader of a tensor."""
    graph.constants["extra_scale"] = np.float32(scale) if np.isscalar(scale) else scale
    graph.constants["extra_zero"] = np.int8(0) if zero_point is None else zero_point
    graph.rewire(tensor, "extra_values")
    parameters = ["extra_scale", "extra_zero"]
    graph.insert(
        [
            helper.make_node("QuantizeLinear", [tensor, *parameters], ["extra_codes"], "extra/Q"),
            helper.make_node("DequantizeLinear", ["extra_codes", *parameters], ["extra_values"], "extra/DQ"),
        ]
    )


def exported(module, path):
    return onnx.load(export_onnx(module, path, SIZE, "trt10", output_names=("x",)).path)
