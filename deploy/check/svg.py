"""An ONNX graph as an SVG, coloured by precision: Q/DQ and constants left out, one box for every other node."""

from __future__ import annotations

from onnx import NodeProto

from deploy.graph.drawing import Box, draw_boxes
from deploy.graph.view import View

HIDDEN = frozenset({"QuantizeLinear", "DequantizeLinear"})


def draw_graph(view: View) -> str:
    """SVG text of a graph."""
    nodes = [n for n in view.graph.nodes if n.op_type not in HIDDEN and n.output[0] not in view.fixed]
    places = {id(node): index for index, node in enumerate(nodes)}
    return draw_boxes(
        [
            Box(node.name, _label(node), view.node_precision(node), tuple(_sources(view, node, places)))
            for node in nodes
        ]
    )


def _sources(view: View, node: NodeProto, places: dict[int, int]) -> list[int]:
    """Positions of the nodes that feed a node, looked up through Q/DQ."""
    found = []
    for name in node.input:
        source = view.producer(name) if name and name not in view.fixed else None
        while source is not None and source.op_type in HIDDEN:
            source = view.producer(source.input[0])
        if source is not None and id(source) in places:
            found.append(places[id(source)])
    return found


def _label(node: NodeProto) -> str:
    parts = [part for part in node.name.split("/") if part]
    tail = parts[-2] if len(parts) > 1 else ".".join(node.name.split(".")[-2:])
    return f"{node.op_type} {tail}".strip()
