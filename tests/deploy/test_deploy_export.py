"""Exports against torch, and against numpy arithmetic on the file's own numbers."""

import collections

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from deploy_networks import FloatDetector, SmallDetector
from onnx import numpy_helper

from core.errors import DeployError
from deploy import TARGETS, export_onnx
from deploy.graph.model import Graph
from deploy.graph.passes import PassResult, run_pass

SIZE = (64, 96)


def run(path, images):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options)
    return session.run(None, {"images": images.numpy()})[0]


def types(path):
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("target", ["openvino", "trt10"])
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_torch_at_any_batch(tmp_path, target, batch):
    module = SmallDetector().eval()
    report = export_onnx(module, tmp_path / "m.onnx", SIZE, target)
    images = torch.rand(batch, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = module(images).numpy()
    output = run(report.path, images)
    assert output.shape == expected.shape == (batch, 7, 16 * 24)
    # boxes are up to 96 px: float32 leaves about 1e-5 of that
    np.testing.assert_allclose(output, expected, atol=2e-3)


def test_unsigned_codes_are_the_same_grid_to_its_ends(tmp_path):
    signed = export_onnx(SmallDetector(), tmp_path / "s.onnx", SIZE, "trt10").path
    unsigned = export_onnx(SmallDetector(), tmp_path / "u.onnx", SIZE, "openvino").path
    # beyond the images' range, so that both ends of the grid clip
    images = 6 * torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1)) - 3
    np.testing.assert_allclose(run(unsigned, images), run(signed, images), atol=1e-4)


@pytest.mark.parametrize("target", TARGETS)
def test_opset_metadata_and_counts(tmp_path, target):
    path = tmp_path / "m.onnx"
    report = export_onnx(SmallDetector(), path, SIZE, target, {"names": "a,b,c", "stride": "8"})
    model = onnx.load(path)
    assert model.opset_import[0].version == TARGETS[target].opset == report.opset
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["names"] == "a,b,c"
    assert metadata["octet.target"] == target
    counts = types(path)
    assert (report.num_quantize, report.num_dequantize) == (
        counts["QuantizeLinear"],
        counts["DequantizeLinear"],
    )
    assert report.num_int8_weights == 5
    assert report.size_bytes == path.stat().st_size
    first = report.passes[0]
    # torch wrote five activations and five weights
    assert (first.quantize_before, first.dequantize_before) == (10, 10)
    for before, after in zip(report.passes, report.passes[1:], strict=False):
        assert (before.quantize_after, before.dequantize_after) == (
            after.quantize_before,
            after.dequantize_before,
        )


def test_trt10_is_readable_by_tensorrt_8_6(tmp_path):
    assert export_onnx(SmallDetector(), tmp_path / "m.onnx", SIZE, "trt10").opset <= 17


def test_weights_are_stored_as_int8_per_channel_without_quantize(tmp_path):
    module = SmallDetector()
    path = export_onnx(module, tmp_path / "m.onnx", SIZE, "trt10").path
    graph = Graph(onnx.load(path))
    weights = [
        node
        for node in graph.nodes
        if node.op_type == "DequantizeLinear" and node.input[0] in graph.constants
    ]
    assert len(weights) == 5
    by_shape = {graph.constants[node.input[0]].shape: node for node in weights}
    node = by_shape[(16, 3, 3, 3)]
    stored, scale = graph.constants[node.input[0]], graph.constants[node.input[1]]
    weight = module.stem.conv.weight.detach().numpy()
    amax = np.abs(weight).max((1, 2, 3))
    expected = np.rint(weight / (amax / 127)[:, None, None, None])
    assert stored.dtype == np.int8
    assert stored.min() >= -127
    np.testing.assert_array_equal(stored, expected)
    np.testing.assert_allclose(scale, amax / 127, rtol=1e-6)
    assert next(a.i for a in node.attribute if a.name == "axis") == 0
    assert not any(
        name.dtype == np.float32 and name.shape == stored.shape for name in graph.constants.values()
    )


def test_the_dynamic_batch_costs_no_shape_arithmetic(tmp_path):
    counts = types(export_onnx(SmallDetector(), tmp_path / "m.onnx", SIZE, "openvino").path)
    wanted = "QuantizeLinear DequantizeLinear Conv Sigmoid Mul Split Concat Resize Reshape Softmax"
    wanted += " ReduceSum Sub Add Div"
    assert counts.keys() == set(wanted.split())
    # chunk(2), the head's split and, in the decode, the two ends of the distances
    assert counts["Split"] == 3


def test_static_batch(tmp_path):
    path = export_onnx(SmallDetector(), tmp_path / "m.onnx", SIZE, "openvino", dynamic_batch=False).path
    dims = [d.dim_value for d in onnx.load(path).graph.input[0].type.tensor_type.shape.dim]
    assert dims == [1, 3, *SIZE]


def test_dynamic_size(tmp_path):
    module = SmallDetector().eval()

    class Raw(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return self.inner.network(x)

    path = export_onnx(Raw(), tmp_path / "m.onnx", SIZE, "openvino", dynamic_size=True).path
    images = torch.rand(2, 3, 128, 64)
    with torch.no_grad():
        expected = module.network(images).numpy()
    np.testing.assert_allclose(run(path, images), expected, atol=1e-4)


def test_identical_quantizers_merge_and_unequal_ones_do_not(tmp_path):
    class TwoReaders(torch.nn.Module):
        def __init__(self, other):
            super().__init__()
            self.a, self.b = SmallDetector().left, SmallDetector().right
            self.b.scale.fill_(other)

        def forward(self, x):
            x = torch.cat([x, x, x, x, x, x], 1)[:, :16].relu()
            return self.a(x) + self.b(x)

    same = types(export_onnx(TwoReaders(0.008), tmp_path / "a.onnx", SIZE, "trt10").path)
    other = types(
        export_onnx(
            TwoReaders(float(np.nextafter(np.float32(0.008), 1))), tmp_path / "b.onnx", SIZE, "trt10"
        ).path
    )
    assert (same["QuantizeLinear"], same["DequantizeLinear"]) == (1, 3)
    assert (other["QuantizeLinear"], other["DequantizeLinear"]) == (2, 4)


def test_float_export(tmp_path):
    module = FloatDetector().eval()
    path = export_onnx(module, tmp_path / "m.onnx", SIZE, "openvino", quantized=False).path
    images = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        np.testing.assert_allclose(run(path, images), module(images).numpy(), atol=2e-3)
    with pytest.raises(DeployError, match=r"0 Q and 0 DQ .*quantized=False"):
        export_onnx(module, tmp_path / "n.onnx", SIZE, "openvino", quantized=True)
    assert not (tmp_path / "n.onnx").exists()
    with pytest.raises(DeployError, match="float export"):
        export_onnx(SmallDetector(), tmp_path / "n.onnx", SIZE, "openvino", quantized=False)


def test_module_is_left_in_its_mode(tmp_path):
    module = SmallDetector().train()
    export_onnx(module, tmp_path / "m.onnx", SIZE, "openvino")
    assert module.training


def test_unknown_target(tmp_path):
    with pytest.raises(DeployError, match=r"tensorflow.*openvino"):
        export_onnx(SmallDetector(), tmp_path / "m.onnx", SIZE, "tensorflow")


def test_bad_weight_scale_is_refused(tmp_path):
    module = SmallDetector()
    with torch.no_grad():
        module.left.conv.weight[3] = 0.0
    with pytest.raises(DeployError, match=r"scale of 0\.0"):
        export_onnx(module, tmp_path / "m.onnx", SIZE, "trt10")


def test_a_pass_that_loses_a_quantizer_is_caught(tmp_path):
    path = export_onnx(SmallDetector(), tmp_path / "m.onnx", SIZE, "openvino").path

    def careless(graph):
        node = next(node for node in graph.nodes if node.op_type == "QuantizeLinear")
        reader = graph.consumers[node.output[0]][0]
        graph.rewire(reader.output[0], node.input[0])
        graph.remove([node, reader])
        return PassResult(edits=1)

    with pytest.raises(DeployError, match="'careless' left"):
        run_pass(onnx.load(path), careless)


def test_half_way_values_round_to_even(tmp_path):
    from onnx import TensorProto, helper

    weight = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, -200.0]], np.float32)
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "d"),
        helper.make_node("Add", ["x", "d"], ["y"], "add"),
    ]
    constants = [
        numpy_helper.from_array(weight, "w"),
        numpy_helper.from_array(np.float32(1), "s"),
        numpy_helper.from_array(np.int8(0), "z"),
    ]
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 6]) for n in "xy"]
    for lowest in (-128, -127):
        model = helper.make_model(helper.make_graph(nodes, "g", value[:1], value[1:], constants))
        from deploy.graph.passes import fold_weights

        run_pass(model, fold_weights(lowest))
        stored = Graph(model).constants["q"]
        np.testing.assert_array_equal(stored, [[0, 2, 2, 0, -2, lowest]])
