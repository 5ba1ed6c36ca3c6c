"""Codes of a graph beside those of torch: equal where the arithmetic is, counted where it is not."""

import numpy as np
import onnx
import pytest
import torch
from deploy_networks import FloatDetector, SmallDetector

from core.errors import DeployError
from deploy import compare_codes, export_onnx
from deploy.runtimes.onnxruntime import CodeRecorder

SIZE = (64, 96)


def codes(*values):
    return np.array(values, np.int16)


def test_steps_are_counted_over_images():
    pairs = [
        ({"a": codes(1, 2, 3), "b": codes(0)}, {"a": codes(1, 2, 3), "b": codes(1)}),
        ({"a": codes(1, 2, -3), "b": codes(0)}, {"a": codes(2, 2, 3), "b": codes(0)}),
    ]
    report = compare_codes(pairs)
    assert (report.images, report.values, report.steps) == (2, 8, {1: 2, 6: 1})
    assert report.share == pytest.approx(3 / 8)
    a, b = report.tensors
    assert (a.name, a.values, a.differing, a.largest) == ("a", 6, 2, 6)
    assert (b.differing, b.largest) == (1, 1)
    assert (
        "37.5000% of 0.0 M codes of 2 tensors differ, 66.7% of them by one step, at most by 6"
        in report.describe()
    )
    assert report.as_dict()["steps"] == {"1": 2, "6": 1}
    assert "are the same" in compare_codes([({"a": codes(1)}, {"a": codes(1)})]).describe()


def test_other_models_are_refused():
    with pytest.raises(DeployError, match="'b' in torch"):
        compare_codes([({"a": codes(1)}, {"a": codes(1), "b": codes(1)})])
    with pytest.raises(DeployError, match="shape"):
        compare_codes([({"a": codes(1, 2)}, {"a": codes(1)})])


@pytest.mark.parametrize("target", ["trt10", "openvino"])
def test_recorded_codes_are_those_of_the_values(tmp_path, target):
    """Signed and unsigned graphs give the same codes; those of the image are known without any runtime."""
    path = export_onnx(SmallDetector(), tmp_path / "m.onnx", SIZE, target).path
    images = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(0)).numpy()
    found = CodeRecorder(path).codes(images)
    model = onnx.load(path)
    nodes = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert set(found) == {node.name for node in nodes}
    first = next(node for node in nodes if node.input[0] == "images")
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    wanted = np.clip(np.rint(images / tensors[first.input[1]]), -128, 127)
    np.testing.assert_array_equal(found[first.name], wanted)
    assert min(int(values.min()) for values in found.values()) < 0


def test_a_float_graph_has_no_codes(tmp_path):
    path = export_onnx(FloatDetector(), tmp_path / "f.onnx", SIZE, "trt10", quantized=False).path
    with pytest.raises(DeployError, match="no QuantizeLinear"):
        CodeRecorder(path)
