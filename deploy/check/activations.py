"""The rule about quantizers between a conv and its activation, and the look-up it shares with other rules.

See `deploy.check.rules` for the sources.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from core.operators import ACTIVATIONS, SIGMOIDS
from deploy.graph.finding import Finding, Findings
from deploy.graph.view import View, behind


def quantizer_inside_conv(view: View) -> Findings:
    """Rule 2: no Q/DQ between conv, batch norm and activation."""
    for node in view.weighted():
        for reader in view.readers(node.output[0]):
            if reader.op_type == "BatchNormalization":
                yield Finding(
                    reader.name, f"batch norm after '{node.name}' is not folded; no INT8 kernel includes it",
                    "fold it into the conv before quantizing", "batch-norm",
                )  # fmt: skip
    for node, quantize in inside_convs(view):
        yield Finding(
            quantize.name,
            f"Q/DQ between '{node.name}' and its activation prevents their fusion into one kernel",
            "move the Q/DQ after the activation", "q-inside-conv", 1,
        )  # fmt: skip


def inside_convs(view: View) -> Iterator[tuple[NodeProto, NodeProto]]:
    """(conv, Q) for every Q between a conv, or the batch norm after it, and the end of its activation."""
    for node in view.weighted():
        result = node.output[0]
        for reader in view.readers(result):
            if reader.op_type == "BatchNormalization":
                result = reader.output[0]
        for tensor in (result, *_sigmoids(view, result)):
            for quantize in _quantizers_of(view, tensor):
                if any(_is_activation(view, reader) for reader in behind(view, quantize)):
                    yield node, quantize


def _sigmoids(view: View, tensor: str) -> list[str]:
    """Outputs of Sigmoid nodes that read a tensor, directly or through Q/DQ."""
    readers = list(view.readers(tensor))
    for quantize in _quantizers_of(view, tensor):
        readers += behind(view, quantize)
    return [node.output[0] for node in readers if node.op_type in SIGMOIDS]


def _quantizers_of(view: View, tensor: str) -> list[NodeProto]:
    return [node for node in view.readers(tensor) if node.op_type == "QuantizeLinear"]


def _is_activation(view: View, node: NodeProto) -> bool:
    if node.op_type in ACTIVATIONS:
        return True
    if node.op_type != "Mul" or len(node.input) != 2:
        return False
    sources = [view.producer(view.before_quantizer(name)) for name in node.input]
    return any(source is not None and source.op_type in SIGMOIDS for source in sources)
