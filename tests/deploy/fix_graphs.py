"""Hand-made Q/DQ graphs for the tests of `--fix`: convolutions, pairs, activations, and what joins them."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE = 16


class Builder:
    """Adds nodes one by one; every method returns the name of its result."""

    def __init__(self, opset=17):
        self.rng = np.random.default_rng(0)
        self.nodes, self.constants, self.opset = [], {}, opset

    def op(self, kind, inputs, **attributes):
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}_out"], name, **attributes))
        return f"{name}_out"

    def constant(self, value):
        name = f"constant_{len(self.constants)}"
        self.constants[name] = np.asarray(value)
        return name

    def pair(self, tensor, scale=0.02, zero_point=None, shape=()):
        zero_point = np.int8(0) if zero_point is None else zero_point
        scale = self.constant(np.full(shape, scale, np.float32))
        zero_point = self.constant(np.full(shape, zero_point))
        codes = self.op("QuantizeLinear", [tensor, scale, zero_point])
        return self.op("DequantizeLinear", [codes, scale, zero_point])

    def codes(self, value, scale):
        """DQ on int8 codes of a weight: one scale, or one per output channel."""
        scale = np.asarray(scale, np.float32)
        shaped = scale.reshape(-1, *[1] * (value.ndim - 1)) if scale.ndim else scale
        codes = self.constant(np.clip(np.rint(value / shaped), -127, 127).astype(np.int8))
        zeros = self.constant(np.zeros(scale.shape, np.int8))
        axis = {"axis": 0} if scale.ndim else {}
        return self.op("DequantizeLinear", [codes, self.constant(scale), zeros], **axis)

    def weight(self, inputs, outputs):
        """Float values whose channels differ in size, as those of trained networks."""
        sizes = 2.0 ** -self.rng.integers(2, 6, (outputs, 1, 1, 1))
        return (self.rng.uniform(-1, 1, (outputs, inputs, 3, 3)) * sizes).astype(np.float32)

    def conv(self, tensor, inputs=16, outputs=16, weight=None, bias=None, stride=1):
        if weight is None:
            value = self.weight(inputs, outputs)
            weight = self.codes(value, np.abs(value).max((1, 2, 3)) / 127)
        bias = [] if bias is None else [bias]
        return self.op("Conv", [tensor, weight, *bias], pads=[1] * 4, strides=[stride] * 2)

    def silu(self, tensor):
        return self.op("Mul", [tensor, self.op("Sigmoid", [tensor])])

    def up(self, tensor):
        factors = self.constant(np.array([1, 1, 2, 2], np.float32))
        return self.op(
            "Resize", [tensor, "", factors], mode="nearest", coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )  # fmt: skip

    def stem(self):
        """ReLU of a convolution of the image: a tensor of 16 channels."""
        return self.op("Relu", [self.conv(self.pair("images", 1 / 127), 3)])

    def model(self, *outputs, size=SIZE):
        """The network from the image to `outputs`, with a last convolution in float behind each."""
        for index, tensor in enumerate(outputs):
            weight = self.constant(self.weight(16, 8))
            self.op("Conv", [tensor, weight], pads=[1] * 4)
            self.nodes[-1].output[0] = f"output{index}"
        return self.finish([f"output{index}" for index in range(len(outputs))], size)

    def finish(self, outputs, size=SIZE):
        sizes = ["batch", "channels", "height", "width"]
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, size, size])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name in outputs],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        onnx.checker.check_model(model)
        return model
