"""How much of an INT8 graph's arithmetic differs from torch's fake quantization: code by code, in steps.

ONNX Runtime runs the graph node by node with the codes of every activation quantizer as extra outputs. A code that
differs by one step has been on the edge between two values and was rounded the other way; larger steps follow from
those further down, or show a graph that computes something else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import DeployError

Codes = NDArray[np.int16]


@dataclass(frozen=True)
class TensorSteps:
    """One quantized tensor over all images.

    Attributes:
        name: its quantizer.
        values: number of codes compared.
        steps: number of codes by their distance in steps, 0 left out.
    """

    name: str
    values: int
    steps: Mapping[int, int]

    @property
    def differing(self) -> int:
        """Codes that are not the same."""
        return sum(self.steps.values())

    @property
    def largest(self) -> int:
        """Largest distance in steps."""
        return max(self.steps, default=0)


@dataclass(frozen=True)
class FixedPointReport:
    """All tensors, in the order in which they were given."""

    images: int
    tensors: tuple[TensorSteps, ...]

    @property
    def values(self) -> int:
        """Codes compared."""
        return sum(tensor.values for tensor in self.tensors)

    @property
    def steps(self) -> dict[int, int]:
        """Codes by their distance in steps, 0 left out."""
        total: Counter[int] = Counter()
        for tensor in self.tensors:
            total.update(tensor.steps)
        return dict(sorted(total.items()))

    @property
    def share(self) -> float:
        """Share of the codes that differ, 0..1."""
        return sum(self.steps.values()) / self.values if self.values else 0.0

    def describe(self) -> str:
        """The figures in one sentence."""
        steps = self.steps
        if not steps:
            return f"all {self.values / 1e6:.1f} M codes of {len(self.tensors)} tensors are the same"
        by_one = steps.get(1, 0) / sum(steps.values())
        rest = (
            "all by one step" if by_one == 1 else f"{by_one:.1%} of them by one step, at most by {max(steps)}"
        )
        return f"{self.share:.4%} of {self.values / 1e6:.1f} M codes of {len(self.tensors)} tensors differ, {rest}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "images": self.images,
            "values": self.values,
            "share": self.share,
            "steps": {str(step): count for step, count in self.steps.items()},
            "tensors": [
                {
                    "name": tensor.name,
                    "values": tensor.values,
                    "differing": tensor.differing,
                    "largest_step": tensor.largest,
                }
                for tensor in self.tensors
            ],
        }


def compare_codes(pairs: Iterable[tuple[Mapping[str, Codes], Mapping[str, Codes]]]) -> FixedPointReport:
    """Compare the codes of a graph with torch's.

    Args:
        pairs: for every image (codes of the graph, codes of torch), by name of the quantizer; a code is an integer in
            steps from the zero point.

    Raises:
        DeployError: a quantizer that only one side has, or other shapes.
    """
    steps: dict[str, Counter[int]] = {}
    values: Counter[str] = Counter()
    images = 0
    for graph, torch_codes in pairs:
        images += 1
        alone = sorted(set(graph) ^ set(torch_codes))
        if alone:
            where = "the graph" if alone[0] in graph else "torch"
            raise DeployError(
                f"{len(alone)} quantizers exist on one side only, such as '{alone[0]}' in {where}: the graph was "
                "exported from another model. Export it again."
            )
        for name, wanted in torch_codes.items():
            if graph[name].shape != wanted.shape:
                raise DeployError(
                    f"Quantizer '{name}' has the shape {graph[name].shape} in the graph, {wanted.shape} in torch."
                )
            distance = np.abs(graph[name].astype(np.int32) - wanted.astype(np.int32))
            found, counts = np.unique(distance[distance > 0], return_counts=True)
            steps.setdefault(name, Counter()).update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
            values[name] += wanted.size
    return FixedPointReport(
        images, tuple(TensorSteps(name, values[name], dict(found)) for name, found in steps.items())
    )
