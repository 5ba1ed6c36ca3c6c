"""Q/DQ pairs after nearest-neighbour Resize nodes, for TensorRT's compilers.

Q/DQ commute with a nearest Resize, but the compiler does not move DQ forward through it: a convolution that reads the
Resize, directly or through a concat, then runs in float although the file quantizes it (seen with TensorRT for RTX 1.7
on the entry convolutions of YOLOv9's top-down neck stages, and with a concat or a max-pool before the Resize). A
pair with the group's own scale after the Resize changes no value, since the values are on that grid already, and gives
these convolutions INT8. FP8 codes need the pair after a max-pool, too: without it the convolution after YOLOv9's
pyramid pooling runs in FP16.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto

from core.operators import OPERATORS, Kind
from deploy.graph.model import Graph, attributes
from deploy.graph.passes import E4M3, GraphPass, PassRequest, PassResult

MOVING = frozenset((*OPERATORS[Kind.TRANSPARENT].onnx, *OPERATORS[Kind.CONCAT].onnx))
REPEATED = "_repeated"  # in the names of the pairs that are added


def quantize_behind_resize(graph: Graph) -> PassResult:
    """Repeat the Q/DQ pair of each nearest Resize, and of each max-pool of FP8 codes, after it."""
    num_pairs = 0
    for node in list(graph.nodes):
        is_resize = node.op_type == "Resize" and attributes(node).get("mode", b"nearest") == b"nearest"
        if not is_resize and node.op_type != "MaxPool":
            continue
        pair = _pair_in_front(graph, node.input[0])
        if pair is None or any(
            q.op_type == "QuantizeLinear" for q in graph.consumers.get(node.output[0], [])
        ):
            continue
        if is_resize or _is_fp8(graph, pair[0]):
            graph.insert(_repeat(graph, node, *pair))  # at once: the next may read this one
            num_pairs += 1
    return PassResult(num_pairs, num_pairs, 2 * num_pairs)


def _is_fp8(graph: Graph, quantize: NodeProto) -> bool:
    zero_point = graph.constants.get(quantize.input[2]) if len(quantize.input) > 2 else None
    return zero_point is not None and zero_point.dtype == E4M3


def passes(model: ModelProto, request: PassRequest) -> list[GraphPass]:
    """The passes of the target trt10."""
    return [quantize_behind_resize]


def _pair_in_front(graph: Graph, tensor: str) -> tuple[NodeProto, NodeProto] | None:
    """A Q and DQ before a tensor, directly or through operators that only move values; all of them are equal."""
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


def _repeat(graph: Graph, mover: NodeProto, quantize: NodeProto, dequantize: NodeProto) -> list[NodeProto]:
    """A copy of a pair that reads the result of `mover`; everything that read the result reads the copy."""
    result = mover.output[0]
    codes, values = graph.unique(f"{result}_codes"), graph.unique(f"{result}_quantized")
    graph.rewire(result, values)
    pair = []
    for node, source, made in ((quantize, result, codes), (dequantize, codes, values)):
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = graph.unique(f"{mover.name}{REPEATED}/{node.op_type}")
        copy.input[0], copy.output[0] = source, made
        pair.append(copy)
    return pair
