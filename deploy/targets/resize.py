"""Q/DQ pairs behind nearest-neighbour Resize nodes, for TensorRT's compilers.

Q/DQ commute with a nearest Resize, but the compiler does not move DQ forward through it: a convolution that reads
Resize -> Concat then runs in FP16 although the file quantizes it (seen with TensorRT for RTX 1.7 on the entry
convolutions of YOLOv9's top-down neck stages). A pair with the group's own scale behind the Resize changes no value,
since the values are on that grid already, and gives these convolutions INT8.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto

from deploy.graph.model import Graph, attributes
from deploy.graph.passes import GraphPass, PassRequest, PassResult

REPEATED = "_repeated"  # in the names of the pairs that are added


def quantize_behind_resize(graph: Graph) -> PassResult:
    """Repeat the Q/DQ pair in front of each nearest Resize behind it."""
    added: list[NodeProto] = []
    for node in graph.nodes:
        if node.op_type != "Resize" or attributes(node).get("mode", b"nearest") != b"nearest":
            continue
        dequantize = graph.producers.get(node.input[0])
        quantize = None if dequantize is None else graph.producers.get(dequantize.input[0])
        if dequantize is None or quantize is None or quantize.op_type != "QuantizeLinear":
            continue
        if any(reader.op_type == "QuantizeLinear" for reader in graph.consumers.get(node.output[0], [])):
            continue
        added += _repeat(graph, node, quantize, dequantize)
    graph.insert(added)
    return PassResult(len(added) // 2, len(added) // 2, len(added))


def passes(model: ModelProto, request: PassRequest) -> list[GraphPass]:
    """The passes of the target trt10."""
    return [quantize_behind_resize]


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
