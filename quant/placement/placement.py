"""The placement: what `place` decides and every later step reads, as plain data, printable and editable."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from core.grid import INT8, Grid


@dataclass(frozen=True)
class TensorSite:
    """One quantized tensor: its readable name, its producer in the graph, and the nodes that read it quantized."""

    name: str
    node: str
    users: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Tensors with one common scale.

    Attributes:
        name: name of the first tensor.
        tensors: the members, in graph order.
        layers: weighted layers that read the group.
        grid: the codes.
        observer: calibration method, None for the run's default.
        scale: fixed scale, None to calibrate.
    """

    name: str
    tensors: tuple[TensorSite, ...]
    layers: tuple[str, ...]
    grid: Grid = INT8
    observer: str | None = None
    scale: float | None = None


@dataclass(frozen=True)
class WeightSite:
    """One layer with quantized weights: `axis` counts output channels, `group` feeds it."""

    layer: str
    axis: int
    grid: Grid
    group: str


@dataclass(frozen=True)
class MatmulSite:
    """One quantized product of two tensors: its readable name, its node, and the groups that feed its operands."""

    name: str
    node: str
    groups: tuple[str, str]


@dataclass(frozen=True)
class Placement:
    """The whole placement; plain data.

    Attributes:
        groups: activation groups in graph order.
        weights: layers with quantized weights in graph order.
        kept_float: weighted layers and products of two tensors left in float, with the reason.
        concats: every concat that quantized data passes, and whether its inputs share one scale.
        matmuls: products of two tensors that are quantized, in graph order.
    """

    groups: tuple[Group, ...]
    weights: tuple[WeightSite, ...]
    kept_float: dict[str, str] = field(default_factory=dict)
    concats: dict[str, bool] = field(default_factory=dict)
    matmuls: tuple[MatmulSite, ...] = ()

    def summarize(self) -> str:
        """In a few lines: how much is quantized with which codes, and what is float, by reason."""
        widths = Counter("FP8" if site.grid.is_fp8 else f"{site.grid.bits} bits" for site in self.weights)
        layers = ", ".join(f"{number} layers with {width}" for width, number in widths.most_common())
        tensors = sum(len(group.tensors) for group in self.groups)
        matmuls = f", {len(self.matmuls)} products of two tensors" if self.matmuls else ""
        lines = [
            f"quantized: {layers or 'no layer'}{matmuls}; {tensors} tensors with {len(self.groups)} scales",
            *(
                f"float: {number} ({reason})"
                for reason, number in Counter(self.kept_float.values()).most_common()
            ),
        ]
        if self.concats:
            lines.append(f"concats: {sum(self.concats.values())} of {len(self.concats)} share one scale")
        return "\n".join(lines)

    def describe(self) -> str:
        """As a tree: one line per group, its tensors and layers below; then what is float, and the concats."""
        lines = []
        for group in self.groups:
            scale = f", scale {group.scale:g}" if group.scale is not None else ""
            scale += "" if group.grid.signed else ", unsigned"
            width = "FP8" if group.grid.is_fp8 else f"{group.grid.bits} bits"
            lines.append(f"{group.name}  ({width}{scale}, {len(group.tensors)} tensors)")
            lines += [f"  tensor {tensor.name} -> {', '.join(tensor.users)}" for tensor in group.tensors]
            lines += [f"  layer  {layer}" for layer in group.layers]
            lines += [f"  matmul {site.name}" for site in self.matmuls if group.name in site.groups]
        lines += [f"float: {name} ({reason})" for name, reason in self.kept_float.items()]
        lines += [
            f"concat {name}: {'one scale over its inputs' if shared else 'own scale'}"
            for name, shared in self.concats.items()
        ]
        return "\n".join(lines)
