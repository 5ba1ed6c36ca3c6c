"""What torch's exporter makes of an inserted network: Q/DQ pairs with the same scales, in the same places."""

import collections
import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from quant_networks import small_images, small_net, small_quantized

from quant import Rule, activation_quantizers, calibrate, insert, place, placement_of, quantized_layers


def export(model, path, images):
    model.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself and about scales becoming constants
        torch.onnx.export(model, (images,), path, dynamo=False, opset_version=17, input_names=["images"])
    return onnx.load(path)


def run(path, images):
    """The file's own arithmetic: a runtime without optimisations."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.numpy()})[0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model, images = small_quantized(), small_images()
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    return model, export(model, path, images), path, images


def constants(graph):
    values = {initializer.name: numpy_helper.to_array(initializer) for initializer in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        elif node.op_type == "Identity" and node.input[0] in values:
            values[node.output[0]] = values[node.input[0]]
    return values


def test_every_rounding_is_a_pair_of_nodes(exported):
    model, onnx_model, _, _ = exported
    types = collections.Counter(node.op_type for node in onnx_model.graph.node)
    placement = placement_of(model)
    pairs = sum(len(group.tensors) for group in placement.groups) + len(placement.weights)
    assert types["QuantizeLinear"] == types["DequantizeLinear"] == pairs
    assert onnx_model.opset_import[0].version == 17


def test_scales_and_zero_points_are_those_of_the_model(exported):
    model, onnx_model, _, _ = exported
    values = constants(onnx_model.graph)
    scalars, vectors = [], []
    for node in onnx_model.graph.node:
        if node.op_type == "QuantizeLinear":
            scale, zero_point = values[node.input[1]], values[node.input[2]]
            assert zero_point.dtype == np.int8
            assert not zero_point.any()
            assert (scale > 0).all()
            (scalars if scale.ndim == 0 else vectors).append(scale)
    expected = [
        float(activation_quantizers(model)[group.name].scale)
        for group in placement_of(model).groups
        for _ in group.tensors
    ]
    np.testing.assert_allclose(sorted(float(s) for s in scalars), sorted(expected), rtol=1e-6)
    layers = [layer.weight_quantizer.scale.numpy() for layer in quantized_layers(model).values()]
    assert len(vectors) == len(layers)
    for layer in layers:
        assert any(v.shape == layer.shape and np.allclose(v, layer, rtol=1e-6) for v in vectors)


def test_every_quantized_convolution_reads_two_dequantized_tensors(exported):
    _, onnx_model, _, _ = exported
    made_by = {output: node for node in onnx_model.graph.node for output in node.output}
    values = constants(onnx_model.graph)

    def behind(name):
        while made_by[name].op_type in {"Concat", "Identity"}:
            name = made_by[name].input[0]
        return made_by[name].op_type

    convolutions = [node for node in onnx_model.graph.node if node.op_type == "Conv"]
    quantized = [node for node in convolutions if node.input[1] not in values]
    assert (len(convolutions), len(quantized)) == (6, 5)
    for node in quantized:
        assert behind(node.input[0]) == "DequantizeLinear"
        assert behind(node.input[1]) == "DequantizeLinear"
        assert node.input[2] in values  # the bias is float
    (sum_node,) = (node for node in onnx_model.graph.node if node.op_type == "Add")
    assert sorted(behind(name) for name in sum_node.input) == ["DequantizeLinear", "Mul"]


def test_the_file_computes_what_the_model_computes(exported):
    model, _, path, images = exported
    got = run(path, images)
    with torch.no_grad():
        expected = model(images).numpy()
    np.testing.assert_allclose(got, expected, atol=0.02 * expected.std())  # a tie may round the other way
    assert np.median(np.abs(got - expected)) < 1e-5


def test_no_weight_falls_on_the_lowest_code(tmp_path):
    """The exporter writes the range [-128, 127]; the weights must still use the symmetric grid."""
    network = small_net()
    model = insert(network, place(network))
    calibrate(model, [small_images()], "minmax", "minmax")
    with torch.no_grad():
        layer = quantized_layers(model)["side.conv"]
        layer.weight.mul_(1.6)  # beyond the calibrated range: clipped at -127, not at -128
    export(model, tmp_path / "clipped.onnx", small_images())
    expected = layer.weight_quantizer(layer.weight).detach()
    assert float((expected / layer.weight_quantizer.scale.reshape(-1, 1, 1, 1)).min()) == pytest.approx(-127)
    got = run(tmp_path / "clipped.onnx", small_images())
    with torch.no_grad():
        wanted = model(small_images()).numpy()
    np.testing.assert_allclose(got, wanted, atol=0.02 * wanted.std())
    assert np.median(np.abs(got - wanted)) < 1e-5


def test_fewer_bits_than_the_format_knows_are_refused(tmp_path):
    network = small_net()
    model = insert(network, place(network, rules=(Rule("stem.act", bits=4),)))
    calibrate(model, [small_images()])
    with pytest.raises(Exception, match=r"quant_min|\(-8, 7\)"):
        export(model, tmp_path / "four.onnx", small_images())
