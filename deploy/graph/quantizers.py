"""Look-ups and edits of single Q/DQ pairs, shared by the passes that fix graphs and by the float copy of a graph.

Legend: Q QuantizeLinear, DQ DequantizeLinear.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from core.choices import FP8, INT8, QUANTIZED
from deploy.graph.known import code_kind_of
from deploy.graph.model import Array, Graph, attributes

SYMMETRIC_TYPES = ("int8", "float8_e4m3fn")


@dataclass(frozen=True)
class Pair:
    """A Q with constant parameters and the DQ nodes that read its codes with the same ones.

    Attributes:
        quantize, dequantizers: the nodes.
        scale: as stored before the Q.
        zero_point: likewise; None where the Q has none.
    """

    quantize: NodeProto
    dequantizers: tuple[NodeProto, ...]
    scale: Array
    zero_point: Array | None

    @property
    def code_type(self) -> str:
        """Type of the codes by numpy's name: int8, uint8, float8_e4m3fn or another."""
        if self.zero_point is not None:
            return self.zero_point.dtype.name
        stated = int(str(attributes(self.quantize).get("output_dtype", 0)))
        return helper.tensor_dtype_to_np_dtype(stated).name if stated else "uint8"

    @property
    def is_symmetric(self) -> bool:
        """One positive finite scale, int8 or FP8 codes, zero point 0."""
        zero = self.zero_point is None or not np.any(self.zero_point.astype(np.float32))
        return zero and self.code_type in SYMMETRIC_TYPES and self.scale.size == 1 and self.has_valid_scale

    @property
    def has_valid_scale(self) -> bool:
        """Every scale is positive and finite."""
        values = self.scale.astype(np.float64)
        return bool(np.all(np.isfinite(values) & (values > 0)))

    def write(self, graph: Graph, scale: Array, zero_point: Array | None) -> None:
        """Give the nodes constants of their own; other nodes that read the old ones keep them."""
        for index, suffix, value in ((1, "scale", scale), (2, "zero_point", zero_point)):
            if value is None:
                continue
            name = graph.unique(f"{self.quantize.input[0]}_{suffix}")
            graph.constants[name] = value
            for node in (self.quantize, *self.dequantizers):
                node.input[index:] = [name, *node.input[index + 1 :]]
        graph.reindex()


def pair_of(graph: Graph, quantize: NodeProto) -> Pair | None:
    """The pair that a Q begins.

    None where its codes are read by anything but DQ, or are a graph's output, where the parameters are computed at run
    time, and where those of Q and DQ differ.
    """
    readers = graph.consumers.get(quantize.output[0], [])
    if quantize.output[0] in graph.outputs or any(node.op_type != "DequantizeLinear" for node in readers):
        return None
    own = _parameters(graph, quantize)
    others = [_parameters(graph, node) for node in readers]
    if own is None or not readers or any(other is None or not _equal(own, other) for other in others):
        return None
    return Pair(quantize, tuple(readers), *own)


def quantized_precision(model: ModelProto) -> str | None:
    """Precision of a graph by its codes, one of `core.choices.QUANTIZED`; None for a graph without Q and DQ.

    Codes of other types count as INT8.
    """
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    constants = [node for node in model.graph.node if node.op_type == "Constant"]
    stored |= {node.output[0]: attribute.t.data_type for node in constants for attribute in node.attribute}
    kinds = set()
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            stated = int(str(attributes(node).get("output_dtype", 0)))
            kinds.add(
                code_kind_of(stated or next(map(stored.get, node.input[2:]), None) or TensorProto.UINT8)
            )
        elif (
            node.op_type == "DequantizeLinear"
        ):  # one that reads the codes of a Q, or a bias in INT32, tells nothing
            codes = stored.get(node.input[0], TensorProto.INT32)
            kinds |= set() if codes == TensorProto.INT32 else {code_kind_of(codes)}
    named = {FP8 if kind == FP8 else INT8 for kind in kinds}
    return QUANTIZED[-1] if len(named) > 1 else next(iter(named), None)


def dequantize_constant(graph: Graph, node: NodeProto) -> Array:
    """Result of a DQ node on constant codes, in the type of its scales."""
    codes, scale = graph.constants[node.input[0]], graph.constants[node.input[1]]
    has_zero_point = len(node.input) > 2 and bool(node.input[2])
    zero_point = graph.constants[node.input[2]] if has_zero_point else np.zeros((), codes.dtype)
    shape = [1] * codes.ndim
    if scale.size > 1:
        shape[int(str(attributes(node).get("axis", 1)))] = scale.size
    steps = codes.astype(np.float32) - zero_point.astype(np.float32).reshape(
        shape if zero_point.size > 1 else ()
    )
    return (steps * scale.astype(np.float32).reshape(shape if scale.size > 1 else ())).astype(scale.dtype)


def _parameters(graph: Graph, node: NodeProto) -> tuple[Array, Array | None] | None:
    scale, *rest = (graph.constants.get(name) for name in node.input[1:])
    has_zero_point = len(node.input) > 2 and bool(node.input[2])
    if scale is None or (has_zero_point and rest[0] is None):
        return None
    return scale, rest[0] if has_zero_point else None


def _equal(one: tuple[Array, Array | None], other: tuple[Array, Array | None]) -> bool:
    values = [
        np.zeros(1) if value is None else value.reshape(-1).astype(np.float64)
        for pair in (one, other)
        for value in pair
    ]
    return np.array_equal(values[0], values[2]) and np.array_equal(np.unique(values[1]), np.unique(values[3]))
