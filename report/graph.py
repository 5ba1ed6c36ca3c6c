"""The network graph of the report: boxes with their places, for one SVG that the page zooms, searches and highlights.

An activation is drawn in the box of the layer before it. Boxes are in rows by their distance from the input. A deep
network is cut into bands of rows side by side, so that all of it fits a screen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.names import MAX_SHOWN

WIDTH, HEIGHT, GAP_X, GAP_Y, GAP_BAND, MARGIN = 168, 26, 14, 20, 48, 16
ASPECT = 1.6  # width over height that bands aim at
MOST_BANDS = 12
LABEL = 22  # characters
PRECISIONS = ("int8", "fp8", "fp16", "bf16", "fp32", "other")
FOLDED = frozenset(
    {
        "Sigmoid",
        "Relu",
        "LeakyRelu",
        "PRelu",
        "Clip",
        "HardSwish",
        "HardSigmoid",
        "Tanh",
        "Elu",
        "Gelu",
        "Mul",
    }
)
FOLDING = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Add"})


@dataclass
class GraphBox:
    """One box.

    Attributes:
        names: of the node and of the activation nodes folded into it.
        operator: ONNX operator of the first.
        precision: one of PRECISIONS.
        sources: positions of the boxes that it reads.
        output: shape, as text.
        x: left edge, pixels.
        y: upper edge, pixels.
    """

    names: list[str]
    operator: str
    precision: str
    sources: list[int]
    output: str = ""
    x: float = 0.0
    y: float = 0.0

    @property
    def label(self) -> str:
        """Operator and the end of the module path, cut to fit."""
        text = self.names[0].strip("/")
        text = text if len(text) <= LABEL else "…" + text[1 - LABEL :]
        return text or self.operator


def fold(nodes: Sequence[Mapping[str, Any]]) -> list[GraphBox]:
    """Boxes of a graph's nodes, topological order kept; activations go into the box of their layer."""
    boxes: list[GraphBox] = []
    box_of: list[int] = []
    for node in nodes:
        sources = list(dict.fromkeys(box_of[source] for source in node["sources"]))
        if node["operator"] in FOLDED and len(sources) == 1 and boxes[sources[0]].operator in FOLDING:
            box_of.append(sources[0])
            boxes[sources[0]].names.append(str(node["name"])[:MAX_SHOWN])
            continue
        box_of.append(len(boxes))
        shape = " x ".join("?" if size is None else str(size) for size in node.get("output") or ())
        precision = node["precision"] if node["precision"] in PRECISIONS else "other"
        boxes.append(
            GraphBox([str(node["name"])[:MAX_SHOWN]], str(node["operator"]), precision, sources, shape)
        )
    return boxes


def arrange(boxes: Sequence[GraphBox]) -> tuple[float, float]:
    """Give every box its place; returns width and height of the drawing, pixels."""
    rows: list[list[GraphBox]] = []
    if not boxes:
        return float(WIDTH), float(HEIGHT)
    depths: list[int] = []
    for box in boxes:
        depth = 1 + max((depths[source] for source in box.sources), default=-1)
        depths.append(depth)
        rows += [[] for _ in range(depth + 1 - len(rows))]
        rows[depth].append(box)
    per_band = _rows_per_band([len(row) for row in rows])
    left = float(MARGIN)
    for start in range(0, len(rows), per_band):
        band = rows[start : start + per_band]
        for number, row in enumerate(band):
            _place_row(row, boxes, left, MARGIN + number * (HEIGHT + GAP_Y))
        left += max(map(len, band)) * (WIDTH + GAP_X) - GAP_X + GAP_BAND
    height = 2 * MARGIN + min(per_band, len(rows)) * (HEIGHT + GAP_Y) - GAP_Y
    return left - GAP_BAND + MARGIN, height


def _place_row(row: list[GraphBox], boxes: Sequence[GraphBox], left: float, top: float) -> None:
    """Boxes of a row from left to right, in the order of what they read."""

    def centre(box: GraphBox) -> float:
        places = [boxes[source].x for source in box.sources]
        return sum(places) / len(places) if places else 0.0

    for column, box in enumerate(sorted(row, key=centre)):
        box.x, box.y = left + column * (WIDTH + GAP_X), top


def _rows_per_band(widths: Sequence[int]) -> int:
    """How many rows give a drawing that comes nearest to ASPECT."""
    best, best_distance = max(len(widths), 1), float("inf")
    for num_bands in range(1, MOST_BANDS + 1):
        per_band = max(1, -(-len(widths) // num_bands))
        bands = [max(widths[start : start + per_band]) for start in range(0, len(widths), per_band)]
        width = sum(bands) * (WIDTH + GAP_X) + len(bands) * GAP_BAND
        ratio = width / (per_band * (HEIGHT + GAP_Y))
        distance = max(ratio / ASPECT, ASPECT / ratio)
        if distance < best_distance:
            best, best_distance = per_band, distance
    return best


def draw(graph: Mapping[str, Any], layers: Mapping[str, Any], scores: Mapping[str, float]) -> dict[str, Any]:
    """What the page needs: `width`, `height`, `boxes`, `edges` (SVG paths), `counts` by precision, and `details`.

    Args:
        graph: as `ReportData.graph`.
        layers: layer name -> its entry of `ReportData.model`.
        scores: group name -> sensitivity score.
    """
    boxes = fold(graph["nodes"])
    width, height = arrange(boxes)
    written = {tensor: group["name"] for group in graph["groups"] for tensor in group["tensors"]}
    read = {layer: group["name"] for group in graph["groups"] for layer in group["layers"]}
    details = []
    for box in boxes:
        layer = layers.get(box.names[0], {})
        output = next((written[name] for name in reversed(box.names) if name in written), None)
        details.append(
            {
                "name": box.names[0],
                "folded": box.names[1:],
                "operator": box.operator,
                "precision": box.precision,
                "output": box.output,
                "macs": layer.get("macs"),
                "parameters": layer.get("parameters"),
                "reads": read.get(box.names[0]),
                "writes": output,
            }
        )
    counts = [(name, sum(box.precision == name for box in boxes)) for name in PRECISIONS]
    return {
        "width": round(width),
        "height": round(height),
        "boxes": boxes,
        "edges": [_edge(boxes[source], box) for box in boxes for source in box.sources],
        "counts": [(name, count) for name, count in counts if count],
        "details": {"boxes": details, "scores": dict(scores)},
    }


def _edge(source: GraphBox, box: GraphBox) -> str:
    from_x, from_y, to_x, to_y = source.x + WIDTH / 2, source.y + HEIGHT, box.x + WIDTH / 2, box.y
    if to_y > from_y:
        bend = (to_y - from_y) / 2
        return (
            f"M{from_x:g} {from_y:g}C{from_x:g} {from_y + bend:g} {to_x:g} {to_y - bend:g} {to_x:g} {to_y:g}"
        )
    side, entry = source.x + WIDTH, box.x  # into another band: out on the right, in on the left
    level, to_level = source.y + HEIGHT / 2, box.y + HEIGHT / 2
    return f"M{side:g} {level:g}C{side + 60:g} {level:g} {entry - 60:g} {to_level:g} {entry:g} {to_level:g}"
