"""Graph passes that fix a Q/DQ graph without data, one for each kind of finding; `deploy.check.fix` runs them.

Legend: Q QuantizeLinear, DQ DequantizeLinear, pair: a Q and the DQ nodes that read it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, helper

from core.operators import ACTIVATIONS, SIGMOIDS
from deploy.check.activations import inside_convs
from deploy.check.placement import at_output, leads_to_conv, useless
from deploy.check.rules import computed_tensors, quantizers_reaching
from deploy.check.sums import residual_summands
from deploy.graph.model import Array, Graph, attributes, opset_of
from deploy.graph.passes import PassResult
from deploy.graph.quantizers import Pair, dequantize_constant, pair_of
from deploy.graph.view import View, behind

CODE_LIMITS = {"int8": (-128, 127), "uint8": (0, 255)}
LARGEST_CODE = 127  # of the symmetric int8 grid
AXIS_OPSET = 13  # Q and DQ take scales per channel from here on


def float_constants(graph: Graph) -> PassResult:
    """Write biases and other constants that are stored as codes as float values: the same values. Weights stay."""
    view = View(graph.commit())
    weights = {dq.output[0] for node in view.weighted() if (dq := view.weight_dequantizer(node)) is not None}
    gone = [
        node
        for node in graph.nodes
        if node.op_type == "DequantizeLinear"
        and node.output[0] not in weights.union(graph.outputs)
        and all(name in graph.constants for name in node.input if name)
        and graph.constants[node.input[1]].ndim <= 1  # not in blocks
    ]
    for node in gone:
        graph.constants[node.output[0]] = dequantize_constant(graph, node)
    return _without(graph, gone)


def symmetric_activations(graph: Graph) -> PassResult:
    """Give activations with a zero point or unsigned codes int8 codes with zero point 0 over the same range."""
    edits = 0
    for pair in _activation_pairs(graph):
        if pair.scale.size != 1 or not pair.has_valid_scale or pair.is_symmetric:
            continue
        if pair.code_type not in CODE_LIMITS or "output_dtype" in attributes(pair.quantize):
            continue
        (lowest, highest), zero = CODE_LIMITS[pair.code_type], 0
        if pair.zero_point is not None:
            zero = int(pair.zero_point.reshape(-1)[0])
        step = float(pair.scale.reshape(-1)[0])
        scale = np.asarray(step * max(highest - zero, zero - lowest) / LARGEST_CODE, pair.scale.dtype)
        pair.write(graph, scale, np.zeros((), np.int8))
        edits += 1
    return PassResult(edits=edits)


def scalar_scales(graph: Graph) -> PassResult:
    """Store scales (and zero points) of activations that have shape [1] as scalars."""
    edits = 0
    for pair in _activation_pairs(graph):
        nodes = (pair.quantize, *pair.dequantizers)
        if pair.scale.size == 1 and any(graph.constants[node.input[1]].ndim for node in nodes):
            zero_point = None if pair.zero_point is None else pair.zero_point.reshape(())
            pair.write(graph, pair.scale.reshape(()), zero_point)
            edits += 1
    return PassResult(edits=edits)


def quantizers_behind_activations(graph: Graph) -> PassResult:
    """Take pairs between a convolution and its activation away where a Q reads the activation's result.

    The scale before an activation does not fit its result, so if nothing is quantized after it, the
    pair remains. ReLU is the exception: it commutes with a symmetric grid, and the pair moves after it.
    """
    view = View(graph.commit())
    gone: list[NodeProto] = []
    moved = 0
    for name in dict.fromkeys(quantize.output[0] for _, quantize in inside_convs(view)):
        quantize = graph.producers[name]
        pair, activations = pair_of(graph, quantize), _activation_ends(view, quantize)
        results = {node.output[0] for node in activations}
        if pair is None or len(results) != 1:
            continue
        (result,) = results
        behind_it = [reader.op_type == "QuantizeLinear" for reader in graph.consumers.get(result, [])]
        has_quantizer = bool(behind_it) and all(behind_it) and result not in graph.outputs
        if has_quantizer or not leads_to_conv(view, result):
            gone += _bypass(graph, pair)
            continue
        is_movable = pair.is_symmetric and len(pair.dequantizers) == 1 and result not in graph.outputs
        if is_movable and activations[0].op_type == "Relu" and not any(behind_it):
            _move_behind(graph, graph.producers[result], pair)
            moved += 1
    return _without(graph, gone, moved)


def needless_pairs(graph: Graph) -> PassResult:
    """Remove pairs that cost accuracy without gain: at outputs, in the decode, before float operators only."""
    view = View(graph.commit())
    inside = {quantize.output[0] for _, quantize in inside_convs(view)}
    gone: list[NodeProto] = []
    for node in view.quantizers("QuantizeLinear"):
        name = node.output[0]
        pair = pair_of(graph, graph.producers[name])
        if pair is None or name in inside or not (at_output(view, node) or any(useless(view, node))):
            continue
        results = [dq.output[0] for dq in pair.dequantizers if dq.output[0] in graph.outputs]
        source = graph.producers.get(pair.quantize.input[0])
        if results and (source is None or len(results) > 1 or pair.quantize.input[0] in graph.outputs):
            continue
        if results and source is not None:  # the outputs keep their names
            inner = pair.quantize.input[0]
            next(dq for dq in pair.dequantizers if dq.output[0] == results[0]).output[0] = graph.unique(
                "removed"
            )
            source.output[:] = [results[0] if name == inner else name for name in source.output]
            graph.rewire(inner, results[0])
            graph.reindex()
        gone += _bypass(graph, pair)
    return _without(graph, gone)


def drop_unread(graph: Graph) -> PassResult:
    """Take nodes away whose results nobody reads."""
    before = graph.nodes
    graph.prune()
    kept = {id(node) for node in graph.nodes}
    return _counted([node for node in before if id(node) not in kept])


def _bypass(graph: Graph, pair: Pair) -> list[NodeProto]:
    """Let the readers of a pair read what it quantizes; the nodes that can go."""
    for dequantize in pair.dequantizers:
        graph.rewire(dequantize.output[0], pair.quantize.input[0])
    return [pair.quantize, *pair.dequantizers]


def _without(graph: Graph, gone: list[NodeProto], edits: int = 0) -> PassResult:
    graph.remove(gone)
    return _counted(gone, edits)


def _counted(gone: list[NodeProto], edits: int = 0) -> PassResult:
    num_quantize, num_dequantize = (
        sum(node.op_type == kind for node in gone) for kind in ("QuantizeLinear", "DequantizeLinear")
    )
    return PassResult(-num_quantize, -num_dequantize, len(gone) + edits)


def _activation_ends(view: View, quantize: NodeProto) -> list[NodeProto]:
    """The nodes that end the activation which reads a Q; none where anything else reads the Q as well.

    A sigmoid that is multiplied, as in SiLU, ends at the product.
    """
    ends = []
    for reader in behind(view, view.graph.producers[quantize.output[0]]):
        if reader.op_type in SIGMOIDS:
            direct = view.readers(reader.output[0])
            through = [node for q in direct if q.op_type == "QuantizeLinear" for node in behind(view, q)]
            products = [node for node in (*direct, *through) if node.op_type == "Mul"]
            ends += products or [reader]
        else:
            ends.append(reader)
    is_activation = {"Mul", *ACTIVATIONS}
    return ends if all(node.op_type in is_activation for node in ends) else []


def _move_behind(graph: Graph, activation: NodeProto, pair: Pair) -> None:
    """Conv -> Q -> DQ -> activation becomes conv -> activation -> Q -> DQ."""
    result, values = activation.output[0], pair.dequantizers[0].output[0]
    source = pair.quantize.input[0]
    graph.rewire(values, source)
    graph.rewire(result, values)
    pair.quantize.input[0] = result
    graph.reindex()


def per_channel_weights(graph: Graph) -> PassResult:
    """Quantize float weights that have one scale per output channel: the largest magnitude of each / 127."""
    if opset_of(graph.model) < AXIS_OPSET:
        return PassResult()
    view = View(graph.commit())
    edits = 0
    for node in view.weighted():
        axis = {"Conv": 0, "ConvTranspose": 1}.get(node.op_type)
        dequantize = graph.producers.get(node.input[1])
        quantize = graph.producers.get(dequantize.input[0]) if dequantize is not None else None
        if axis is None or quantize is None or quantize.op_type != "QuantizeLinear":
            continue
        pair, weight = pair_of(graph, quantize), graph.constants.get(quantize.input[0])
        kinds = {
            reader.op_type
            for dq in (pair.dequantizers if pair else ())
            for reader in view.readers(dq.output[0])
        }
        if (
            pair is None
            or weight is None
            or not pair.is_symmetric
            or kinds != {node.op_type}
            or pair.code_type != "int8"
        ):
            continue
        if weight.shape[axis] == 1 or (axis == 1 and attributes(node).get("group", 1) != 1):
            continue
        _quantize_channels(graph, pair, weight, axis)
        edits += 1
    return PassResult(edits=edits)


def _quantize_channels(graph: Graph, pair: Pair, weight: Array, axis: int) -> None:
    others = tuple(index for index in range(weight.ndim) if index != axis)
    scale = np.abs(weight.astype(np.float32)).max(axis=others) / LARGEST_CODE
    scale = np.where(scale > 0, scale, pair.scale.reshape(())).astype(pair.scale.dtype)
    pair.write(graph, scale, None if pair.zero_point is None else np.zeros(len(scale), np.int8))
    for node in (pair.quantize, *pair.dequantizers):
        kept = [attribute for attribute in node.attribute if attribute.name != "axis"]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("axis", axis)])


def float_branches(graph: Graph) -> PassResult:
    """Residual sums: let one summand be quantized, the skip.

    Where both are, the sum reads the convolution's branch before its pair. Where none is, it reads the skip after
    the pair that the skip's other readers have, if they have one.
    """
    view = View(graph.commit())
    edits = 0
    for node, quantized, branch in residual_summands(view):
        add = graph.producers[node.output[0]]
        for index, name in enumerate(node.input):
            is_branch = view.before_quantizer(name) == branch
            if all(quantized) and is_branch:
                add.input[index] = branch
                edits += 1
            elif not any(quantized) and not is_branch and branch is not None:
                readers = [q for q in view.readers(name) if q.op_type == "QuantizeLinear"]
                pair = pair_of(graph, graph.producers[readers[0].output[0]]) if readers else None
                if pair is not None and len({view.quantization(q).key for q in readers}) == 1:
                    add.input[index] = pair.dequantizers[0].output[0]
                    edits += 1
    graph.reindex()
    removed = drop_unread(graph)
    return PassResult(removed.quantize, removed.dequantize, edits)


def equal_scales(graph: Graph) -> PassResult:
    """Give quantizers of one tensor, and those whose values meet before one layer, the largest scale.

    Groups with a zero point, with several scales for one tensor, or with scales or codes of two types stay as they are.
    """
    edits = 0
    for names in _joined(_quantizer_groups(View(graph.commit()))):
        pairs = [
            pair for name in sorted(names) if (pair := pair_of(graph, graph.producers[name])) is not None
        ]
        if len(pairs) < len(names) or not all(pair.is_symmetric for pair in pairs):
            continue
        largest = max(float(pair.scale.reshape(-1)[0]) for pair in pairs)
        if len({(pair.scale.dtype, pair.code_type) for pair in pairs}) != 1:
            continue
        for pair in pairs:
            if float(pair.scale.reshape(-1)[0]) != largest:
                pair.write(graph, np.full(pair.scale.shape, largest, pair.scale.dtype), None)
                edits += 1
    return PassResult(edits=edits)


def _quantizer_groups(view: View) -> Iterator[set[str]]:
    """Codes (names of Q results) that need one scale; a Q may be in several groups."""
    for tensor in computed_tensors(view):
        yield {node.output[0] for node in quantizers_reaching(view, tensor)}
    for node in view.weighted():
        if view.weight_dequantizer(node) is None:
            continue
        roots = [view.dequantizer(root) for root in view.roots(node.input[0])]
        sources = [view.producer(dq.input[0]) for dq in roots if dq is not None]
        yield {q.output[0] for q in sources if q is not None and q.op_type == "QuantizeLinear"}


def _joined(groups: Iterator[set[str]]) -> list[set[str]]:
    """Sets without common members: groups that share one are joined, directly or over others."""
    joined: list[set[str]] = []
    for group in groups:
        touching = [other for other in joined if other & group]
        joined = [other for other in joined if not other & group]
        joined.append(group.union(*touching))
    return [group for group in joined if len(group) > 1]


def _activation_pairs(graph: Graph) -> Iterator[Pair]:
    view = View(graph.commit())
    for node in view.quantizers("QuantizeLinear"):
        pair = pair_of(graph, graph.producers[node.output[0]])
        if pair is not None:
            yield pair
