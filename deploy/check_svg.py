"""A graph as an SVG, coloured by precision: Q/DQ and constants left out, one box for every other node."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from onnx import NodeProto

from deploy.check_view import View

COLOURS = {"int8": "#3b9c5a", "fp16": "#e0a030", "bf16": "#d98a5b", "fp32": "#c8504b", "other": "#9aa0a6"}
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 132, 24, 14, 22, 40
HIDDEN = frozenset({"QuantizeLinear", "DequantizeLinear"})


def draw_graph(view: View) -> str:
    """SVG text: boxes in rows by their distance from the input, a line for every tensor, names as tooltips."""
    nodes = [
        node for node in view.graph.nodes if node.op_type not in HIDDEN and node.output[0] not in view.fixed
    ]
    places = _layout(view, nodes)
    height = max((y for _, y in places.values()), default=0) + HEIGHT + MARGIN
    width = max((x for x, _ in places.values()), default=0) + WIDTH + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *_legend(),
    ]
    for node in nodes:
        x, y = places[id(node)]
        for source in _sources(view, node):
            if id(source) in places:
                from_x, from_y = places[id(source)]
                parts.append(
                    f'<path d="M{from_x + WIDTH // 2} {from_y + HEIGHT} L{x + WIDTH // 2} {y}" stroke="#b0b5ba" '
                    'fill="none"/>'
                )
    for node in nodes:
        x, y = places[id(node)]
        precision = view.node_precision(node)
        colour = COLOURS.get(precision, COLOURS["other"])
        parts.append(
            f"<g><title>{escape(f'{node.name} {node.op_type} {precision}')}</title>"
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="4" fill={quoteattr(colour)}/>'
            f'<text x="{x + 6}" y="{y + 16}" fill="white">{escape(_label(node))}</text></g>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend() -> list[str]:
    parts = []
    for index, (name, colour) in enumerate(COLOURS.items()):
        x = MARGIN + index * 70
        parts.append(f'<rect x="{x}" y="10" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 16}" y="20">{name}</text>')
    return parts


def _layout(view: View, nodes: list[NodeProto]) -> dict[int, tuple[int, int]]:
    depths: dict[int, int] = {}
    rows: dict[int, int] = {}
    places = {}
    for node in nodes:
        depth = 1 + max((depths.get(id(source), -1) for source in _sources(view, node)), default=-1)
        depths[id(node)] = depth
        column = rows.get(depth, 0)
        rows[depth] = column + 1
        places[id(node)] = (MARGIN + column * (WIDTH + GAP_X), MARGIN + depth * (HEIGHT + GAP_Y))
    return places


def _sources(view: View, node: NodeProto) -> list[NodeProto]:
    """Visible nodes that feed a node, looked up through Q/DQ."""
    found = []
    for name in node.input:
        source = view.producer(name) if name and name not in view.fixed else None
        while source is not None and source.op_type in HIDDEN:
            source = view.producer(source.input[0])
        if source is not None:
            found.append(source)
    return found


def _label(node: NodeProto) -> str:
    parts = [part for part in node.name.split("/") if part]
    tail = parts[-2] if len(parts) > 1 else ""
    return f"{node.op_type} {tail}"[:20]
