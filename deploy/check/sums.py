"""The rule about residual sums; which summand is fused with the sum is decided in `core.operators`.

See `deploy.check.rules` for the sources.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from core.operators import OPERATORS, Kind, fused_summand
from deploy.graph.finding import Finding, Findings
from deploy.graph.view import CONCATS, WEIGHTED, View, behind, reached

ADDS = OPERATORS[Kind.ADD].onnx


def residual_adds(view: View) -> Findings:
    """Rule 3: of a residual sum the skip is quantized and the conv branch is not."""
    for node, quantized, branch in residual_summands(view):
        if all(quantized) and branch is not None:
            yield Finding(
                node.name, f"both summands are quantized; Q/DQ on the branch '{branch}' prevents fusion of the sum "
                "with its conv",
                "remove the Q/DQ on the branch, keep the one on the skip", "residual", 1,
            )  # fmt: skip
        elif not any(quantized):
            yield Finding(
                node.name, "neither summand is quantized: the skip is kept and read in float",
                "put Q/DQ on the skip, with the scale of the block's first conv", "residual", 1,
            )  # fmt: skip


def residual_summands(view: View) -> Iterator[tuple[NodeProto, list[bool], str | None]]:
    """(sum, which summands are quantized, tensor that is fused with the sum) for each sum inside the network."""
    tensors = _Tensors(view)
    for node in view.graph.nodes:
        if node.op_type not in ADDS or any(name in view.fixed for name in node.input) or len(node.input) != 2:
            continue
        if any(
            reader.op_type in WEIGHTED for reader in reached(view, node.output[0])
        ):  # not a sum of the decode
            quantized = [
                all(view.dequantizer(root) is not None for root in view.roots(name)) for name in node.input
            ]
            yield node, quantized, fused_summand(tensors, tensors.sources(node.output[0]))


class _Tensors:
    """A view as `core.operators.TensorGraph`: tensors by name, as they would be without Q/DQ."""

    def __init__(self, view: View) -> None:
        self.view = view

    def kind(self, tensor: str) -> Kind:
        """Kind of the operator that makes a tensor."""
        node = self.view.producer(tensor)
        if node is None or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return Kind.FLOAT
        if node.op_type in WEIGHTED and len(node.input) > 1 and node.input[1] in self.view.fixed:
            return Kind.WEIGHTED
        if self.view.is_matmul(node):
            return Kind.MATMUL
        if self.view.is_moving(node):
            return Kind.CONCAT if node.op_type in CONCATS else Kind.TRANSPARENT
        is_sum = node.op_type in ADDS and len(self.sources(tensor)) == 2
        return Kind.ADD if is_sum else Kind.FLOAT

    def sources(self, tensor: str) -> list[str]:
        """Tensors before the Q/DQ that the operator reads, constants left out."""
        node = self.view.producer(tensor)
        inputs = [] if node is None else node.input
        return [self.view.before_quantizer(name) for name in inputs if name and name not in self.view.fixed]

    def num_readers(self, tensor: str) -> int:
        """How many operators read a tensor, directly or through Q/DQ; the graph's output is one."""
        readers: set[int] = set()
        for node in self.view.readers(tensor):
            through = behind(self.view, node) if node.op_type == "QuantizeLinear" else [node]
            readers.update(id(reader) for reader in through)
        return len(readers) + (tensor in self.view.graph.outputs)
