"""Q/DQ pairs behind nearest-neighbour Resize nodes, for TensorRT's compilers.

Q/DQ commute with a nearest Resize, but the compiler does not move DQ forward through it: a convolution that reads the
Resize, directly or through a concat, then runs in float although the file quantizes it (seen with TensorRT for RTX 1.7
on the entry convolutions of YOLOv9's top-down neck stages, and with a concat or a max-pool in front of the Resize). A
pair with the group's own scale behind the Resize changes no value,
since the values are on that grid already, and gives these convolutions INT8.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto

from core.operators import OPERATORS, Kind
from deploy.graph.model import Graph, attributes
from deploy.graph.passes import GraphPass, PassRequest, PassResult

MOVING = frozenset((*OPERATORS[Kind.TRANSPARENT].onnx, *OPERATORS[Kind.CONCAT].onnx))
REPEATED = "_repeated"  # in the names of the pairs that are added


def quantize_behind_resize(graph: Graph) -> PassResult:
    """Repeat the Q/DQ pair in front of each nearest Resize behind it."""
    added: list[NodeProto] = []
    for node in graph.nodes:
        if node.op_type != "Resize" or attributes(node).get("mode", b"nearest") != b"nearest":
            continue
        pair = _pair_in_front(graph, node.input[0])
        if pair is None or any(
            q.op_type == "QuantizeLinear" for q in graph.consumers.get(node.output[0], [])
        ):
            continue
        added += _repeat(graph, node, *pair)
    graph.insert(added)
    return PassResult(len(added) // 2, len(added) // 2, len(added))


def passes(model: ModelProto, request: PassRequest) -> list[GraphPass]:
    """The passes of the target trt10."""
    return [quantize_behind_resize]


def _pair_in_front(graph: Graph, tensor: str) -> tuple[NodeProto, NodeProto] | None:
    """A Q and DQ in front of a tensor, directly or through operators that only move values; all of them are equal."""
    pairs: dict[tuple[bytes, ...], tuple[NodeProto, NodeProto]] = {}
    pending, seen = [tensor], set()
    while pending:
        name = pending.pop()
        node = graph.producers.get(name)
        if name in seen:
            continue
        seen.add(name)
        if node is not None and node.op_type in MOVING:
            pending += node.input if node.op_type in OPERATORS[Kind.CONCAT].onnx else node.input[:1]
            continue
        quantize = None if node is None else graph.producers.get(node.input[0])
        if (
            node is None
            or node.op_type != "DequantizeLinear"
            or quantize is None
            or quantize.op_type != "QuantizeLinear"
        ):
            return None
        values = [graph.constants.get(name) for name in node.input[1:]]
        pairs[tuple(b"" if value is None else value.tobytes() for value in values)] = quantize, node
    return next(iter(pairs.values())) if len(pairs) == 1 else None


def _repeat(graph: Graph, resize: NodeProto, quantize: NodeProto, dequantize: NodeProto) -> list[NodeProto]:
    """A copy of a pair that reads the Resize; everything that read the Resize reads the copy."""
    result = resize.output[0]
    codes, values = graph.unique(f"{result}_codes"), graph.unique(f"{result}_quantized")
    graph.rewire(result, values)
    pair = []
    for node, source, made in ((quantize, result, codes), (dequantize, codes, values)):
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = graph.unique(f"{resize.name}{REPEATED}/{node.op_type}")
        copy.input[0], copy.output[0] = source, made
        pair.append(copy)
    return pair
