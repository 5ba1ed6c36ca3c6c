"""Names of an exported file: paths in place of the exporter's names, and nothing else changes."""

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from deploy import export_onnx
from deploy.naming import module_path

SIZE = (8, 8)
NAMES = {"parts.0": "stem.conv", "parts.1": "stem.act", "parts.10": "tail.conv", "parts.11": "tail.cut"}


class Cut(nn.Module):
    def forward(self, x):
        return x[:, :2] * 2


class Parts(nn.Module):
    """Submodules with numbers of one and two digits; `parts.11` makes its result in two operators."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict(
            {"0": nn.Conv2d(3, 4, 1), "1": nn.SiLU(), "10": nn.Conv2d(4, 4, 1), "11": Cut()}
        )

    def forward(self, x):
        for part in self.parts.values():
            x = part(x)
        return x + 1


def test_nodes_tensors_and_parameters_take_the_paths(tmp_path):
    module = Parts().eval()
    plain, named = (
        onnx.load(
            export_onnx(
                module, tmp_path / f"{bool(names)}.onnx", SIZE, "openvino", quantized=False, names=names
            ).path
        )
        for names in (None, NAMES)
    )
    assert [node.op_type for node in named.graph.node] == [node.op_type for node in plain.graph.node]
    nodes = {node.name: node for node in named.graph.node}
    assert list(nodes) == [
        "stem.conv",
        "stem.act/Sigmoid",
        "stem.act",
        "tail.conv",
        "tail.cut/Slice",
        "tail.cut",
        "/Add",
    ]
    assert list(nodes["stem.conv"].input) == ["images", "stem.conv.weight", "stem.conv.bias"]
    assert nodes["tail.conv"].input[0] == "stem.act"
    assert list(nodes["tail.conv"].output) == ["tail.conv"]
    assert list(nodes["/Add"].output) == ["output0"]
    images = np.random.default_rng(0).random((2, 3, *SIZE), np.float32)
    results = [ReferenceEvaluator(model).run(None, {"images": images})[0] for model in (plain, named)]
    np.testing.assert_array_equal(*results)
    np.testing.assert_allclose(results[1], module(torch.from_numpy(images)).detach(), atol=1e-5)


def test_the_path_in_a_name():
    assert module_path("stem.act/quantizer/QuantizeLinear") == "stem.act"
    assert module_path("stem.conv") == "stem.conv"
    assert module_path("/decode/Add_6") == "/decode/Add_6"
