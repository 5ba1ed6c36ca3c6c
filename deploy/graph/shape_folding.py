"""A graph pass that folds shape arithmetic, for graphs whose batch is open, too."""

from __future__ import annotations

import math

import numpy as np

from deploy.graph.model import Graph, attributes, tensor_shapes
from deploy.graph.passes import PassResult, fold_constants
from deploy.graph.shapes import Known, Shapes, partial_values


def fold_shapes(graph: Graph) -> PassResult:
    """Turn shape arithmetic into constants wherever the dimensions are known, for any batch is.

    Integer vectors are followed from `Shape` with the unknown elements left open. One that is fully known
    becomes a constant; a `Reshape` whose target has exactly one open element gets -1 there. What else is
    dynamic stays as it was.
    """
    edits = 0
    for _ in range(16):
        shapes = tensor_shapes(graph.commit())
        known = partial_values(graph, shapes)
        changed = _replace_known(graph, known) + _close_reshapes(graph, known, shapes)
        changed += _close_resizes(graph, known, shapes)
        changed += fold_constants(graph).edits
        changed += graph.prune()
        edits += changed
        if not changed:
            break
    return PassResult(edits=edits)


def _replace_known(graph: Graph, known: Known) -> int:
    gone = []
    for node in graph.nodes:
        value = known.get(node.output[0])
        if value is None or value.has_open_elements or node.output[0] in graph.outputs:
            continue
        graph.constants[node.output[0]] = value.as_array()
        gone.append(node)
    graph.remove(gone)
    return len(gone)


def _close_reshapes(graph: Graph, known: Known, shapes: Shapes) -> int:
    edits = 0
    for node in graph.nodes:
        if node.op_type != "Reshape" or node.input[1] in graph.constants or attributes(node).get("allowzero"):
            continue
        target = known.get(node.input[1])
        if target is None:
            continue
        elements = _close_target(target.elements, shapes.get(node.input[0]))
        if elements is not None:
            name = graph.unique(f"{node.output[0]}_shape")
            graph.constants[name] = np.array(elements, np.int64)
            node.input[1] = name
            edits += 1
    return edits


def _close_target(target: tuple[int | None, ...], source: tuple[int | None, ...] | None) -> list[int] | None:
    """A reshape target with -1 for its one open element, or None; (batch, 3, -1) needs the source's shape."""
    if target.count(None) != 1 or any(element == 0 for element in target):
        return None
    if -1 in target:
        if source is None or source[0] is not None or target[0] is not None or None in source[1:]:
            return None
        total = math.prod(element or 1 for element in source[1:])
        rest = math.prod(element for element in target[1:] if element is not None and element != -1)
        target = (None, *(total // rest if element == -1 else element for element in target[1:]))
    return [-1 if element is None else element for element in target]


def _close_resizes(graph: Graph, known: Known, shapes: Shapes) -> int:
    """Give a Resize of an open batch its scale factors instead of sizes that are computed from the batch."""
    edits = 0
    for node in graph.nodes:
        if node.op_type != "Resize" or len(node.input) < 4 or node.input[3] in graph.constants:
            continue
        sizes, source = known.get(node.input[3]), shapes.get(node.input[0])
        if sizes is None or source is None or len(source) != len(sizes.elements) or source[0] is not None:
            continue
        factors = [1.0]
        for wanted, present in zip(sizes.elements[1:], source[1:], strict=True):
            if wanted is None or not present:
                break
            factors.append(wanted / present)
        if len(factors) == len(source):
            name = graph.unique(f"{node.output[0]}_scales")
            graph.constants[name] = np.array(factors, np.float32)
            node.input[2] = name
            del node.input[3]
            edits += 1
    return edits
