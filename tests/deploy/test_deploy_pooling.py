"""Average-pools of codes as depthwise convolutions, for ONNX Runtime."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.graph.passes import run_pass
from deploy.graph.view import View
from deploy.targets.pooling import depthwise_averages

STEP, ZERO = 0.05, 3  # of the input, uint8
OUT_ZERO = 7


def pooled(is_quantized=True, out_step=0.0437, channels=6, **attributes):
    """images -> Q -> DQ -> AveragePool -> Q -> DQ; without the second pair, the pool is read in float."""
    constants = {
        "step": np.float32(STEP), "zero": np.uint8(ZERO),
        "out_step": np.float32(out_step), "out_zero": np.uint8(OUT_ZERO),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "step", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "step", "zero"], ["values"]),
        helper.make_node("AveragePool", ["values"], ["mean"], "down.average", **attributes),
    ]
    if is_quantized:
        nodes += [
            helper.make_node("QuantizeLinear", ["mean", "out_step", "out_zero"], ["mean_codes"]),
            helper.make_node("DequantizeLinear", ["mean_codes", "out_step", "out_zero"], ["result"]),
        ]
    else:
        nodes.append(helper.make_node("Relu", ["mean"], ["result"]))
    graph = helper.make_graph(
        nodes,
        "pooled",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, channels, 8, 10])],
        [helper.make_tensor_value_info("result", TensorProto.FLOAT, ["b", "c", "h", "w"])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def rewritten(model):
    run_pass(model, depthwise_averages(model))
    onnx.checker.check_model(model)
    return [node.op_type for node in model.graph.node]


def mean_codes(images, kernel, stride, pad, out_step):
    """The result by loops over windows, on whole numbers; padding has the value 0."""
    codes = np.clip(np.rint(images / np.float32(STEP)) + ZERO, 0, 255).astype(int) - ZERO
    codes = np.pad(codes, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    rows, columns = ((size - kernel) // stride + 1 for size in codes.shape[2:])
    result = np.empty((*codes.shape[:2], rows, columns))
    for row in range(rows):
        for column in range(columns):
            y, x = row * stride, column * stride
            total = codes[:, :, y : y + kernel, x : x + kernel].sum((2, 3))
            ratio = np.float64(np.float32(STEP)) / np.float64(np.float32(out_step)) / kernel**2
            result[:, :, row, column] = np.clip(np.rint(total * ratio) + OUT_ZERO, 0, 255)
    return (result - OUT_ZERO) * np.float32(out_step)


@pytest.mark.parametrize("out_step", [0.0437, STEP])  # with equal steps, many means lie between two codes
@pytest.mark.parametrize(("kernel", "stride", "pad"), [(2, 1, 0), (2, 2, 0), (4, 2, 1)])
def test_pool_between_quantizers_becomes_a_convolution(kernel, stride, pad, out_step):
    model = pooled(
        out_step=out_step,
        kernel_shape=[kernel] * 2,
        strides=[stride] * 2,
        pads=[pad] * 4,
        count_include_pad=int(pad > 0),
    )
    kinds = rewritten(model)
    assert "AveragePool" not in kinds
    assert kinds.count("Conv") == 1
    assert next(node.name for node in model.graph.node if node.op_type == "Conv") == "down.average"
    images = np.random.default_rng(kernel).uniform(-0.2, 12, (1, 6, 8, 10)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images})
    wanted = mean_codes(images, kernel, stride, pad, out_step)
    assert len(np.unique(wanted)) > 50
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [3, 3]},  # 1/9 is not exact
        {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1]},  # means of fewer values at the edges
        {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"},
        {"kernel_shape": [4, 4], "strides": [3, 3], "ceil_mode": 1},
        {"kernel_shape": [2, 2], "is_quantized": False},
    ],
)
def test_other_pools_stay(attributes):
    assert "AveragePool" in rewritten(pooled(**attributes))


def test_check_counts_such_a_convolution_as_a_pool():
    """All codes equal, depthwise: an average. One other code, or several inputs to an output: a layer."""
    model = pooled(kernel_shape=[2, 2])
    rewritten(model)
    assert View(model).weighted() == []
    codes = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [6, 1, 2, 2])
    changed = numpy_helper.to_array(codes).copy()
    changed[3, 0, 1, 1] = 2
    codes.CopyFrom(numpy_helper.from_array(changed, codes.name))
    assert [node.name for node in View(model).weighted()] == ["down.average"]
