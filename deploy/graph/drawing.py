"""Graphs as SVG: boxes in rows by their distance from the input, coloured by precision, names as tooltips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

COLOURS = {
    "int8": "#3b9c5a",
    "fp8": "#2f7f9e",
    "fp16": "#e0a030",
    "bf16": "#d98a5b",
    "fp32": "#c8504b",
    "other": "#9aa0a6",
}
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 132, 24, 14, 22, 40


@dataclass(frozen=True)
class Box:
    """One node: its name, its label, its precision, and the positions of the boxes it reads."""

    name: str
    label: str
    precision: str
    sources: tuple[int, ...]


def draw_boxes(boxes: Sequence[Box]) -> str:
    """SVG text; boxes come in topological order."""
    places = _layout(boxes)
    height = max((y for _, y in places), default=0) + HEIGHT + MARGIN
    width = max(max((x for x, _ in places), default=0) + WIDTH + MARGIN, MARGIN + 70 * len(COLOURS))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *_legend(),
    ]
    for box, (x, y) in zip(boxes, places, strict=True):
        for from_x, from_y in (places[source] for source in box.sources):
            line = f"M{from_x + WIDTH // 2} {from_y + HEIGHT} L{x + WIDTH // 2} {y}"
            parts.append(f'<path d="{line}" stroke="#b0b5ba" fill="none"/>')
    for box, (x, y) in zip(boxes, places, strict=True):
        colour = COLOURS.get(box.precision, COLOURS["other"])
        parts.append(
            f"<g><title>{escape(f'{box.name} {box.label} {box.precision}')}</title>"
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="4" fill={quoteattr(colour)}/>'
            f'<text x="{x + 6}" y="{y + 16}" fill="white">{escape(box.label[:20])}</text></g>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend() -> list[str]:
    parts = []
    for index, (name, colour) in enumerate(COLOURS.items()):
        x = MARGIN + index * 70
        parts.append(f'<rect x="{x}" y="10" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 16}" y="20">{name}</text>')
    return parts


def _layout(boxes: Sequence[Box]) -> list[tuple[int, int]]:
    depths: list[int] = []
    rows: dict[int, int] = {}
    places = []
    for box in boxes:
        depth = 1 + max((depths[source] for source in box.sources), default=-1)
        depths.append(depth)
        column = rows.get(depth, 0)
        rows[depth] = column + 1
        places.append((MARGIN + column * (WIDTH + GAP_X), MARGIN + depth * (HEIGHT + GAP_Y)))
    return places
