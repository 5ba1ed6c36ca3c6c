"""An ONNX graph as boxes and as an SVG, coloured by precision: Q/DQ and constants left out, one box per other node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnx import NodeProto

from deploy.graph.drawing import Box, draw_boxes
from deploy.graph.model import load_onnx
from deploy.graph.view import View

HIDDEN = frozenset({"QuantizeLinear", "DequantizeLinear"})


def draw_graph(view: View) -> str:
    """SVG text of a graph."""
    return draw_boxes(
        [
            Box(node.name, _label(node), view.node_precision(node), tuple(sources))
            for node, sources in _nodes(view)
        ]
    )


def describe_graph(path: Path) -> list[dict[str, Any]]:
    """The nodes of an ONNX file in topological order, as plain data.

    Returns:
        `name`, `operator`, `precision` ("int8", "fp8", "fp16", "bf16", "fp32" or "other"), `sources` (positions of the
        nodes that it reads) and `output` (shape of the first output, None for an open dimension).

    Raises:
        DeployError: the file is not an ONNX graph.
    """
    view = View(load_onnx(path))
    return [
        {
            "name": node.name,
            "operator": node.op_type,
            "precision": view.node_precision(node),
            "sources": sources,
            "output": list(view.shapes.get(node.output[0], ())),
        }
        for node, sources in _nodes(view)
    ]


def _nodes(view: View) -> list[tuple[NodeProto, list[int]]]:
    """Nodes that are drawn, and the positions of those that feed each."""
    nodes = [n for n in view.graph.nodes if n.op_type not in HIDDEN and n.output[0] not in view.fixed]
    places = {id(node): index for index, node in enumerate(nodes)}
    return [(node, _sources(view, node, places)) for node in nodes]


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
