"""Integer vectors that are known only in part: how shape arithmetic is folded while the batch stays dynamic.

torch's exporter writes `x.view(b, 4, 16, h * w)` as Shape, Gather, Mul and Concat nodes once the batch is
dynamic. Every element but the batch is a constant in truth. `partial_values` follows such vectors element by
element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from deploy.graph.model import Array, Graph, attributes

Element = int | None


@dataclass(frozen=True)
class PartialValue:
    """A one-dimensional (or scalar) int64 tensor; an element is None where only the run time knows it."""

    elements: tuple[Element, ...]
    scalar: bool = False

    @property
    def has_open_elements(self) -> bool:
        """Whether any element is unknown."""
        return None in self.elements

    def as_array(self) -> Array:
        """The value as int64 array; only for values without open elements."""
        array = np.array(self.elements, np.int64)
        return array.reshape(()) if self.scalar else array


Known = dict[str, PartialValue]
Shapes = Mapping[str, tuple[int | None, ...]]


def partial_values(graph: Graph, shapes: Shapes) -> Known:
    """What is known of the integer vectors computed from shapes, by tensor name; constants left out."""
    known: Known = {}

    def value_of(name: str) -> PartialValue | None:
        if name in known:
            return known[name]
        constant = graph.constants.get(name)
        if (
            constant is None
            or constant.ndim > 1
            or constant.dtype not in (np.int64, np.int32)
            or constant.size > 64
        ):
            return None
        return PartialValue(tuple(int(v) for v in constant.reshape(-1)), constant.ndim == 0)

    for node in graph.nodes:
        if node.op_type == "Shape":
            result = _shape(node, shapes)
        elif node.op_type in _RULES:
            values = [value_of(name) for name in node.input if name]
            present = [value for value in values if value is not None]
            result = _RULES[node.op_type](node, present) if len(present) == len(values) else None
        else:
            continue
        if result is not None:
            known[node.output[0]] = result
    return known


def _shape(node: NodeProto, shapes: Shapes) -> PartialValue | None:
    shape = shapes.get(node.input[0])
    if shape is None:
        return None
    options = attributes(node)
    start, end = options.get("start", 0), options.get("end")
    assert isinstance(start, int)
    assert end is None or isinstance(end, int)
    return PartialValue(tuple(shape[start:end]))


def _gather(node: NodeProto, values: list[PartialValue]) -> PartialValue | None:
    data, indices = values
    if indices.has_open_elements:
        return None
    chosen = tuple(data.elements[i] for i in indices.elements if i is not None)
    return PartialValue(chosen, indices.scalar)


def _slice(node: NodeProto, values: list[PartialValue]) -> PartialValue | None:
    data, starts, ends, *rest = values
    step = rest[1].elements[0] if len(rest) > 1 else 1
    start, end = starts.elements[0], ends.elements[0]
    if len(starts.elements) != 1 or start is None or end is None or step is None:
        return None
    return PartialValue(data.elements[start:end:step])


def _concat(node: NodeProto, values: list[PartialValue]) -> PartialValue:
    return PartialValue(tuple(element for value in values for element in value.elements))


def _unsqueeze(node: NodeProto, values: list[PartialValue]) -> PartialValue | None:
    return PartialValue(values[0].elements) if values[0].scalar else None


def _squeeze(node: NodeProto, values: list[PartialValue]) -> PartialValue | None:
    return PartialValue(values[0].elements, scalar=True) if len(values[0].elements) == 1 else None


def _cast(node: NodeProto, values: list[PartialValue]) -> PartialValue | None:
    return values[0] if attributes(node).get("to") == 7 else None  # 7: int64


def _arithmetic(
    operation: Callable[[int, int], int],
) -> Callable[[NodeProto, list[PartialValue]], PartialValue | None]:
    def rule(node: NodeProto, values: list[PartialValue]) -> PartialValue | None:
        left, right = values
        length = max(len(left.elements), len(right.elements))
        if {len(left.elements), len(right.elements)} - {1, length}:
            return None
        pairs = zip(_broadcast(left, length), _broadcast(right, length), strict=True)
        elements = tuple(None if a is None or b is None else operation(a, b) for a, b in pairs)
        return PartialValue(elements, left.scalar and right.scalar)

    return rule


def _broadcast(value: PartialValue, length: int) -> tuple[Element, ...]:
    return value.elements * length if len(value.elements) == 1 else value.elements


def _divide(a: int, b: int) -> int:
    return int(np.trunc(a / b)) if b else 0  # ONNX divides integers toward zero


_RULES: dict[str, Callable[[NodeProto, list[PartialValue]], PartialValue | None]] = {
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Cast": _cast,
    "Add": _arithmetic(lambda a, b: a + b),
    "Sub": _arithmetic(lambda a, b: a - b),
    "Mul": _arithmetic(lambda a, b: a * b),
    "Div": _arithmetic(_divide),
}
