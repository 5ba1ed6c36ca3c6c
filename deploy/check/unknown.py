"""The rule about what the check cannot judge. A graph without findings is one that the check knows all of.

See `deploy.graph.known` for what that is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from onnx import NodeProto

from core.names import listing
from deploy.graph.finding import Finding, Findings
from deploy.graph.known import KNOWN_KINDS, is_known_operator
from deploy.graph.view import WEIGHTED, View

NOT_KNOWN = "not covered by this check: compare accuracy and speed of the engine itself"


def unknown_parts(view: View) -> Findings:
    """Operators, codes, weights and shapes that the other rules say nothing about."""
    yield from _unknown_operators(view)
    yield from _unknown_codes(view)
    yield from _unpaired_codes(view)
    yield from _unknown_weights(view)
    yield from _unknown_shapes(view)
    yield from _nothing_to_check(view)


def _unknown_operators(view: View) -> Findings:
    nodes = [node for node in view.graph.nodes if not is_known_operator(node)]
    if nodes:
        yield Finding(
            _name(nodes[0]), f"{_operators(nodes)} this check does not know: {_counted(nodes)}",
            f"write them as Q/DQ pairs around float operators; else they are {NOT_KNOWN}", "unknown-operator",
        )  # fmt: skip


def _unknown_codes(view: View) -> Findings:
    """Codes that are neither INT8 nor FP8 E4M3; the INT32 codes of a bias are known."""
    found: dict[str, list[NodeProto]] = {}
    for node in view.graph.nodes:
        if node.op_type != "DequantizeLinear" or (
            view.code_kind(node) == "int32" and node.input[0] in view.fixed
        ):
            continue
        if view.code_kind(node) not in KNOWN_KINDS:
            found.setdefault(view.code_kind(node), []).append(node)
    for kind, nodes in found.items():
        count = "1 tensor has" if len(nodes) == 1 else f"{len(nodes)} tensors have"
        yield Finding(
            _name(nodes[0]), f"{count} {kind} codes; this check knows int8, uint8 and float8e4m3fn only",
            f"quantize to INT8 or FP8; else they are {NOT_KNOWN}", "unknown-codes",
        )  # fmt: skip


def _unpaired_codes(view: View) -> Findings:
    """A Q whose codes something else than a DQ reads, and a DQ whose codes something else than a Q made."""
    for node in view.graph.nodes:
        if node.op_type == "QuantizeLinear":
            others = [n for n in _code_readers(view, node) if n.op_type != "DequantizeLinear"]
            if any(is_known_operator(reader) for reader in others):
                yield Finding(
                    _name(node), f"its codes are read by {_counted(others)} without DQ: this check does not know what "
                    "they are there", "put a DQ after the Q", "codes-without-dq",
                )  # fmt: skip
        elif node.op_type == "DequantizeLinear" and node.input[0] not in view.fixed:
            for root in view.roots(node.input[0]):
                maker = view.producer(root)
                if maker is not None and (maker.op_type == "QuantizeLinear" or not is_known_operator(maker)):
                    continue
                if maker is not None and _clips_codes(view, maker):
                    continue
                origin = f"the graph input '{root}'" if maker is None else f"{maker.op_type} '{_name(maker)}'"
                yield Finding(
                    _name(node), f"it reads codes of {origin}, not of a Q: this check does not know what they are",
                    "let a Q make the codes", "codes-without-q",
                )  # fmt: skip


def _code_readers(view: View, quantize: NodeProto) -> list[NodeProto]:
    """Nodes that read the codes of a Q, directly or through operators that only move them."""
    found: list[NodeProto] = []
    pending = [quantize.output[0]]
    while pending:
        for reader in view.readers(pending.pop()):
            if view.is_moving(reader) or _clips_codes(view, reader):
                pending.extend(reader.output)
            else:
                found.append(reader)
    return found


def _clips_codes(view: View, node: NodeProto) -> bool:
    """Whether a node is a ReLU on codes, as graphs for ONNX Runtime have them."""
    return view.quantizes_results and node.op_type == "Clip"


def _unknown_weights(view: View) -> Findings:
    """Layers whose weight is computed at run time, and products with the weight on the left."""
    judged = {id(node) for node in view.weighted()}
    nodes = [
        node
        for node in view.graph.nodes
        if node.op_type in WEIGHTED
        and id(node) not in judged
        and (node.op_type != "MatMul" or node.input[0] in view.fixed)
        and node.output[0] not in view.fixed
        and not view.is_average(node)
    ]
    if nodes:
        yield Finding(
            _name(nodes[0]), f"{_operators(nodes)} without a constant weight as second input: {_counted(nodes)}",
            f"store the weights in the file; else they are {NOT_KNOWN}", "unknown-weight",
        )  # fmt: skip


def _unknown_shapes(view: View) -> Findings:
    nodes = view.unmeasured()
    if nodes:
        size = "give --size HEIGHTxWIDTH, or write fixed shapes into the file"
        yield Finding(
            _name(nodes[0]), f"the shapes of {len(nodes)} of {len(view.weighted())} layers are not known: nor is their "
            "share of the multiply-accumulates", size, "unknown-shape",
        )  # fmt: skip


def _nothing_to_check(view: View) -> Findings:
    missing = [
        name for name, found in (("inputs", view.graph.inputs), ("outputs", view.graph.outputs)) if not found
    ]
    if missing:
        hazard = f"the graph has no {' and no '.join(missing)}"
    elif not view.weighted():
        hazard = "the graph has no convolution or matrix product with constant weights"
    else:
        return
    yield Finding(
        view.graph.model.graph.name or "graph", f"{hazard}: there is nothing that this check could judge",
        "check that this is the file you mean, and export it again", "nothing-to-check",
    )  # fmt: skip


def _operators(nodes: Sequence[NodeProto]) -> str:
    return "1 operator" if len(nodes) == 1 else f"{len(nodes)} operators"


def _counted(nodes: Sequence[NodeProto]) -> str:
    return listing(f"{count} {kind}" for kind, count in Counter(node.op_type for node in nodes).items())


def _name(node: NodeProto) -> str:
    return node.name or (node.output[0] if node.output else node.op_type)
