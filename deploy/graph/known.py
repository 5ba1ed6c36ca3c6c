"""What the graph check can judge: operators, and types of codes.

A graph of another tool may hold anything that ONNX allows. Operators that are not listed here are not judged: the
check names it in a finding instead of passing it (see `deploy.check.unknown`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto
from onnx.inliner import inline_local_functions

from core.errors import DeployError
from core.operators import OPERATORS, Kind

STANDARD_DOMAINS = ("", "ai.onnx")
KNOWN_PLUGINS = frozenset({"TRT.EfficientNMS_TRT"})  # after the network; quantizes nothing
NOT_JUDGED = frozenset(
    (
        "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "DynamicQuantizeLinear",  # codes without Q/DQ
        "DeformConv", "LSTM", "GRU", "RNN", "Einsum",  # weights that the rules do not look at
    )
)  # fmt: skip
QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
LAYERS = frozenset(OPERATORS[Kind.WEIGHTED].onnx)

CODE_KINDS: Mapping[int, str] = {
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int8",
    TensorProto.FLOAT8E4M3FN: "fp8",
}
"""Types of codes that engines compute with, and what the check calls them."""
KNOWN_KINDS = frozenset(CODE_KINDS.values())


def code_kind_of(data_type: int) -> str:
    """`int8` (signed or not) or `fp8` (E4M3); for all other codes ONNX's name in small letters, such as `uint16`."""
    if not data_type:
        return "unknown"
    known = CODE_KINDS.get(data_type)
    names = TensorProto.DataType
    return known or (names.Name(data_type).lower() if data_type in names.values() else f"type {data_type}")


def qualify_operators(graph: GraphProto) -> None:
    """Put the domain before the type of every operator outside of ONNX's own: `com.microsoft.QuantizeLinear`.

    So no table and no rule takes such an operator for the one of the same name that it knows. In place, branches and
    loop bodies included; `restore_operators` takes it back.
    """
    for node in all_nodes(graph):
        if node.domain not in STANDARD_DOMAINS and not node.op_type.startswith(f"{node.domain}."):
            node.op_type = f"{node.domain}.{node.op_type}"


def restore_operators(graph: GraphProto) -> None:
    """Give the operators of other domains their own names again, in place."""
    for node in all_nodes(graph):
        if node.domain not in STANDARD_DOMAINS:
            node.op_type = node.op_type.removeprefix(f"{node.domain}.")


def is_known_operator(node: NodeProto) -> bool:
    """Whether the check can judge an operator (of a graph with qualified types).

    Branches and loop bodies are not looked into: an operator that has some is known as long as they hold known float
    operators only.
    """
    if node.op_type in KNOWN_PLUGINS:
        return True
    if node.op_type in NOT_JUDGED or node.op_type not in _standard_operators():
        return False
    inner = (other for graph in subgraphs(node) for other in graph.node)
    return all(other.op_type not in LAYERS | QUANTIZERS and is_known_operator(other) for other in inner)


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """Branches and loop bodies of a node."""
    for attribute in node.attribute:
        yield from [attribute.g] if attribute.HasField("g") else attribute.graphs


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Nodes of a graph, and of the branches and loop bodies in it."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from all_nodes(inner)


def inlined(model: ModelProto) -> ModelProto:
    """The model with the body of each function instead of its calls; the model itself where it has no functions.

    Raises:
        DeployError: a call does not fit its function, or there are two functions of one name.
    """
    if not model.functions:
        return model
    try:
        return inline_local_functions(model)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        raise DeployError(f"The functions of the graph cannot replace their calls: {error}") from error


@cache
def _standard_operators() -> frozenset[str]:
    return frozenset(
        schema.name
        for schema in onnx.defs.get_all_schemas_with_history()
        if schema.domain in STANDARD_DOMAINS
    )
