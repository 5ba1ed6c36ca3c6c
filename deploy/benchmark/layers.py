"""Times by layer as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from deploy.runtimes.base import LayerTime

BAR_HEIGHT, LABEL_WIDTH, PLOT_WIDTH = 16, 360, 520


def format_layers(layers: Sequence[LayerTime], limit: int = 25) -> str:
    """The slowest layers, then the sum by type and precision."""
    total = sum(layer.milliseconds for layer in layers) or 1.0
    lines = ["   ms      %  type, precision, name"]
    for layer in sorted(layers, key=lambda layer: -layer.milliseconds)[:limit]:
        share = layer.milliseconds / total
        lines.append(f"{layer.milliseconds:7.3f} {share:6.1%}  {layer.type} {layer.precision} {layer.name}")
    sums: dict[tuple[str, str], tuple[float, int]] = {}
    for layer in layers:
        time, count = sums.get((layer.type, layer.precision), (0.0, 0))
        sums[layer.type, layer.precision] = (time + layer.milliseconds, count + 1)
    lines.append("by type:")
    for (kind, precision), (time, count) in sorted(sums.items(), key=lambda item: -item[1][0]):
        lines.append(f"{time:7.3f} {time / total:6.1%}  {kind} {precision} ({count})")
    return "\n".join(lines)


def draw_layers(layers: Sequence[LayerTime], limit: int = 60) -> str:
    """An SVG bar chart of the slowest layers."""
    slowest = sorted(layers, key=lambda layer: -layer.milliseconds)[:limit]
    longest = max((layer.milliseconds for layer in slowest), default=1.0) or 1.0
    height = 30 + BAR_HEIGHT * len(slowest)
    width = LABEL_WIDTH + PLOT_WIDTH + 90
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{LABEL_WIDTH}" y="14">ms in one call</text>',
    ]
    for index, layer in enumerate(slowest):
        y = 20 + index * BAR_HEIGHT
        length = layer.milliseconds / longest * PLOT_WIDTH
        label = f"{layer.type} {layer.precision} {layer.name}"
        parts.append(
            f'<g><title>{escape(label)}</title><text x="4" y="{y + 12}">{escape(label[-58:])}</text>'
            f'<rect x="{LABEL_WIDTH}" y="{y + 2}" width="{length:.1f}" height="{BAR_HEIGHT - 4}" fill="#3b7dbc"/>'
            f'<text x="{LABEL_WIDTH + length + 4:.1f}" y="{y + 12}">{layer.milliseconds:.3f}</text></g>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
