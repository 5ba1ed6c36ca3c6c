"""Graph passes that every target shares: fold what is constant, store 8-bit weights, merge equal quantizers.

General ONNX simplifiers fold the DequantizeLinear of INT8 weights back into float weights, or merge
quantizers without looking at their scales. These passes do neither, and `run_pass` counts Q/DQ nodes before
and after each of them against what the pass says it did.

Legend: Q QuantizeLinear, DQ DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from core.errors import DeployError
from deploy.graph.model import Array, Graph, attributes, opset_of, tensor_shapes
from deploy.graph.shapes import Shapes

E4M3 = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)
E4M3_MAX = 448.0
MAX_FOLDED_BYTES = 64 * 2**20
FOLDABLE = frozenset(
    (
        "Abs", "Add", "And", "Cast", "Ceil", "Clip", "Concat", "ConstantOfShape", "Cos", "Div",
        "Equal", "Exp", "Expand", "Flatten", "Floor", "Gather", "GatherND", "Greater", "Less",
        "Log", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow", "Range", "Reciprocal",
        "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Round",
        "ScatterND", "Shape", "Sin", "Size", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Tile",
        "Transpose", "Unsqueeze", "Where",
    )
)  # fmt: skip


@dataclass(frozen=True)
class PassResult:
    """What a pass did: change in the number of Q and DQ nodes (negative: removed), and edits in all."""

    quantize: int = 0
    dequantize: int = 0
    edits: int = 0


@dataclass(frozen=True)
class PassCount:
    """Q/DQ nodes before and after one pass, kept in the export report."""

    name: str
    quantize_before: int
    dequantize_before: int
    quantize_after: int
    dequantize_after: int
    edits: int


GraphPass = Callable[[Graph], PassResult]


@dataclass(frozen=True)
class PassRequest:
    """What the passes of a target depend on, besides the graph.

    Attributes:
        scale_type: type of the scale tensors, one of `core.targets.SCALE_TYPES`.
        images: batches float32 [B, 3, H, W] in [0, 1] to measure ranges on; may be empty.
        record: (model, tensor names, images) -> for each tensor the parts of a histogram of its values.
        decoded: whether the graph gives boxes and scores of every anchor.
    """

    scale_type: str = "fp16"
    images: Sequence[NDArray[np.float32]] = ()
    record: Callable[..., dict[str, tuple[Any, ...]]] = lambda *_: {}
    decoded: bool = True


TargetPasses = Callable[[ModelProto, PassRequest], Iterable[GraphPass]]
"""What `core.targets.Target.passes` names. A pass has been run on the model when the next one is asked for."""


def count_qdq(model: ModelProto) -> tuple[int, int]:
    """Number of (QuantizeLinear, DequantizeLinear) nodes."""
    types = [node.op_type for node in model.graph.node]
    return types.count("QuantizeLinear"), types.count("DequantizeLinear")


def run_pass(model: ModelProto, graph_pass: GraphPass) -> PassCount:
    """Run one pass in place and compare its count of Q/DQ nodes with the graph.

    Raises:
        DeployError: the number of Q or DQ nodes changed otherwise than the pass reports.
    """
    before = count_qdq(model)
    graph = Graph(model)
    result = graph_pass(graph)
    graph.commit()
    after = count_qdq(model)
    name = graph_pass.__name__
    expected = (before[0] + result.quantize, before[1] + result.dequantize)
    if after != expected:
        raise DeployError(
            f"Pass '{name}' left {after} (Q, DQ) nodes of {before}; by its own account {expected} should be "
            "there. "
            "This is a defect of the pass: nothing was written."
        )
    return PassCount(name, *before, *after, edits=result.edits)


# -------------------------------------------------------------------------------------------------- constants
def drop_identities(graph: Graph) -> PassResult:
    """Remove Identity nodes; one that feeds a graph output stays, because the output's name would change."""
    gone = []
    for node in graph.nodes:
        if node.op_type != "Identity" or node.output[0] in graph.outputs:
            continue
        source = node.input[0]
        graph.rewire(node.output[0], source)
        gone.append(node)
    graph.remove(gone)
    return PassResult(edits=len(gone))


def fold_constants(graph: Graph) -> PassResult:
    """Compute every node whose inputs are all constant, except Q and DQ, and those of unknown effect."""
    opset = opset_of(graph.model)
    gone = []
    for node in graph.nodes:
        if node.op_type not in FOLDABLE or node.domain not in ("", "ai.onnx"):
            continue
        if not all(name in graph.constants for name in node.input if name):
            continue
        if any(name in graph.outputs for name in node.output):
            continue
        values = _evaluate(node, graph, opset)
        if sum(value.nbytes for value in values) > MAX_FOLDED_BYTES:
            continue
        graph.constants.update(zip(node.output, values, strict=True))
        gone.append(node)
    graph.remove(gone)
    return PassResult(edits=len(gone))


def _evaluate(node: NodeProto, graph: Graph, opset: int) -> list[Array]:
    names = list(dict.fromkeys(name for name in node.input if name))
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(graph.constants[n].dtype), None)
        for n in names
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output]
    model = helper.make_model(
        helper.make_graph([node], "fold", inputs, outputs), opset_imports=[helper.make_opsetid("", opset)]
    )
    results = ReferenceEvaluator(model).run(None, {name: np.asarray(graph.constants[name]) for name in names})
    return [np.asarray(result) for result in results]


def slices_to_split(graph: Graph) -> PassResult:
    """Write neighbouring slices that together cover an axis (torch's `chunk`) as one Split."""
    shapes = tensor_shapes(graph.commit())
    edits = 0
    for name in list(graph.consumers):
        cuts = [
            (bounds, node)
            for node in graph.consumers.get(name, [])
            if (bounds := _slice_bounds(graph, node, shapes))
        ]
        cuts.sort(key=lambda cut: cut[0])
        axes = {bounds[2] for bounds, _ in cuts}
        if len(cuts) < 2 or len(axes) != 1:
            continue
        (axis,) = axes
        edges = [0, *(bounds[1] for bounds, _ in cuts)]
        if [bounds[0] for bounds, _ in cuts] != edges[:-1] or edges[-1] != shapes[name][axis]:
            continue
        first = cuts[0][1]
        lengths = graph.unique(f"{first.output[0]}_lengths")
        graph.constants[lengths] = np.diff(edges).astype(np.int64)
        outputs = [node.output[0] for _, node in cuts]
        split = helper.make_node("Split", [name, lengths], outputs, name=f"{first.name}_split", axis=axis)
        graph.remove([node for _, node in cuts])
        graph.insert([split])
        edits += len(cuts)
    return PassResult(edits=edits)


def _slice_bounds(graph: Graph, node: NodeProto, shapes: Shapes) -> tuple[int, int, int] | None:
    """(start, end, axis) of a Slice on one known axis with step 1, None for any other node."""
    if node.op_type != "Slice" or len(node.input) < 4:
        return None
    values = [graph.constants.get(name) for name in node.input[1:]]
    shape = shapes.get(node.input[0])
    if shape is None or any(value is None or value.size != 1 for value in values):
        return None
    start, end, axis, *step = (int(value.reshape(-1)[0]) for value in values if value is not None)
    length = shape[axis]
    if length is None or any(value != 1 for value in step):
        return None
    start, end = (min(value + length if value < 0 else value, length) for value in (start, end))
    return start, end, axis % len(shape)


# ----------------------------------------------------------------------------------------------- quantization
def fold_weights(lowest: int = -128) -> GraphPass:
    """Make the pass that stores quantized weights: constant -> Q -> DQ becomes int8 or FP8 initializer -> DQ.

    q = clip(round_half_even(w / scale) + zero point, lowest, 127), per tensor or per channel. Octet's weights
    use [-127, 127], so its exports ask for `lowest=-127`; -128 is what ONNX prescribes for other people's
    graphs. FP8: q = E4M3 closest to w / scale, halves to even, saturated at 448.
    """

    def fold_weights(graph: Graph) -> PassResult:
        gone = []
        for node in graph.nodes:
            if node.op_type != "QuantizeLinear" or not all(
                name in graph.constants for name in node.input if name
            ):
                continue
            if node.output[0] in graph.outputs:
                continue
            graph.constants[node.output[0]] = quantize_constant(graph, node, lowest)
            gone.append(node)
        graph.remove(gone)
        return PassResult(quantize=-len(gone), edits=len(gone))

    return fold_weights


def quantize_constant(graph: Graph, node: NodeProto, lowest: int = -128) -> Array:
    """Result of a Q node on constants; raises DeployError on a scale that is not positive and finite."""
    value = graph.constants[node.input[0]].astype(np.float32)
    scale = graph.constants[node.input[1]].astype(np.float32)
    if not np.all(np.isfinite(scale) & (scale > 0)):
        raise DeployError(
            f"'{node.name}' quantizes '{node.input[0]}' with a scale of {scale.min()}; it has to be positive and "
            "finite. Calibrate again, or leave this weight in float."
        )
    has_zero_point = len(node.input) > 2 and bool(node.input[2])
    zero_point = graph.constants[node.input[2]] if has_zero_point else np.zeros((), np.uint8)
    shape = [1] * value.ndim
    if scale.size > 1:
        axis = attributes(node).get("axis", 1)
        assert isinstance(axis, int)
        shape[axis] = scale.size
    if zero_point.dtype == E4M3:
        codes = value / (scale.reshape(shape) if scale.size > 1 else scale)
        return np.clip(codes, -E4M3_MAX, E4M3_MAX).astype(E4M3)
    # torch.fake_quantize_* multiplies by the reciprocal in float32 and rounds half to even: the same codes come out
    steps = np.rint(value * (np.float32(1) / scale).reshape(shape if scale.size > 1 else ()))
    steps += zero_point.astype(np.float32).reshape(shape if zero_point.size > 1 else ())
    if zero_point.dtype == np.int8:
        return np.clip(steps, lowest, 127).astype(np.int8)
    if zero_point.dtype == np.uint8:
        return np.clip(steps, 0, 255).astype(np.uint8)
    raise DeployError(f"'{node.name}' quantizes to {zero_point.dtype}; int8, uint8 and E4M3 are supported.")


def merge_identical(graph: Graph) -> PassResult:
    """Merge Q nodes that read one tensor with equal scale, zero point and axis; then the same for DQ nodes.

    Q nodes whose scales differ stay two, however small the difference: merging them would change the numbers.
    """
    merged = {"QuantizeLinear": 0, "DequantizeLinear": 0}
    for op_type in merged:
        first: dict[tuple[object, ...], NodeProto] = {}
        gone = []
        for node in graph.nodes:
            if node.op_type != op_type or node.output[0] in graph.outputs:
                continue
            key = _quantizer_key(graph, node)
            if key is None:
                continue
            if key in first:
                graph.rewire(node.output[0], first[key].output[0])
                gone.append(node)
            else:
                first[key] = node
        graph.remove(gone)
        merged[op_type] = len(gone)
    return PassResult(-merged["QuantizeLinear"], -merged["DequantizeLinear"], sum(merged.values()))


def _quantizer_key(graph: Graph, node: NodeProto) -> tuple[object, ...] | None:
    parameters: list[object] = []
    for name in node.input[1:]:
        value = graph.constants.get(name)
        if name and value is None:
            return None  # a scale computed at run time: nothing is known about equality
        parameters.append(None if value is None else (str(value.dtype), value.shape, value.tobytes()))
    return (node.input[0], *parameters, *sorted((k, repr(v)) for k, v in attributes(node).items()))


def name_quantizers(graph: Graph) -> PassResult:
    """Name scales and zero points after the tensor they quantize."""
    edits = 0
    for node in graph.nodes:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        tensor = node.input[0]
        source = graph.producers.get(tensor)
        if node.op_type == "DequantizeLinear" and source is not None and source.op_type == "QuantizeLinear":
            tensor = source.input[0]
        for index, suffix in ((1, "scale"), (2, "zero_point")):
            if index >= len(node.input) or node.input[index] not in graph.constants:
                continue
            value, wanted = graph.constants[node.input[index]], f"{tensor}_{suffix}"
            present = graph.constants.get(wanted)
            same = present is not None and present.dtype == value.dtype and np.array_equal(present, value)
            name = wanted if same else graph.unique(wanted)
            graph.constants[name] = value
            edits += node.input[index] != name
            node.input[index] = name
    graph.reindex()
    return PassResult(edits=edits)
