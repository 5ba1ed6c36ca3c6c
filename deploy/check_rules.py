"""The rules of Q/DQ placement, one function for each: a View in, findings out.

Sources of the rules: NVIDIA's Q/DQ placement recommendations (TensorRT developer guide; tensorflow-quantization's
custom cases), modelopt's ONNX quantization, and yolo_deepstream's QAT guidance. "Reformats" are kernels that do
nothing but change scale or type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
from onnx import NodeProto

from deploy.check_view import ACTIVATIONS, CPU_TARGETS, WEIGHTED, View, format_scale
from deploy.graph import attributes


@dataclass(frozen=True)
class Finding:
    """One thing in a graph that costs speed or accuracy.

    Attributes:
        name: node or tensor it is about.
        hazard: what is there and what it costs.
        remedy: what to do.
        rule: short name of the rule.
        reformats: extra kernels it will cost, where that can be told.
    """

    name: str
    hazard: str
    remedy: str
    rule: str
    reformats: int = 0

    def as_dict(self) -> dict[str, object]:
        """Plain dict, ready for JSON."""
        return asdict(self)


Findings = Iterator[Finding]
Rule = Callable[[View], Findings]


def float_convs(view: View) -> Findings:
    """Rule 1: every conv but those at the outputs has DQ on data and on weight."""
    for node in view.weighted():
        if id(node) in view.output_convs and view.weight_dequantizer(node) is None:
            continue
        if view.is_quantized(node):
            continue
        yield Finding(node.name, *_why_float(view, node), rule="conv-float")


def _why_float(view: View, node: NodeProto) -> tuple[str, str]:
    roots = view.roots(node.input[0])
    found = {root: view.dequantizer(root) for root in roots}
    missing = [root for root, dq in found.items() if dq is None]
    kind = node.op_type
    if view.weight_dequantizer(node) is None and len(missing) == len(roots):
        return (
            f"{kind} has neither data nor weight quantized and runs in float",
            "quantize its input and its weight",
        )
    if view.weight_dequantizer(node) is None:
        return (
            f"{kind} reads INT8 data but its weight is float, so it runs in float",
            "quantize its weight per channel",
        )
    if missing and len(missing) < len(roots):
        return (
            f"{kind}'s input joins {len(roots)} tensors, {', '.join(missing[:3])} without Q/DQ; it runs in float",
            "quantize every tensor that enters the concat, with one scale",
        )
    if missing:
        source = view.producer(missing[0])
        origin = f"{source.op_type} '{source.name}'" if source is not None else "a graph input"
        return (
            f"{kind}'s input comes from {origin} without Q/DQ; it runs in float",
            f"put Q/DQ on '{missing[0]}'",
        )
    scales = {view.quantization(dq).key for dq in found.values() if dq is not None}
    values = ", ".join(sorted(format_scale(key[0]) if key else "per channel" for key in scales))
    return (
        f"{kind}'s input joins tensors of {len(scales)} scales ({values}); it runs in float or each is quantized again",
        "let the tensors that meet here share one scale",
    )


def quantizer_inside_conv(view: View) -> Findings:
    """Rule 2: no Q/DQ between conv, batch norm and activation."""
    for node in view.weighted():
        result = node.output[0]
        for reader in view.readers(result):
            if reader.op_type == "BatchNormalization":
                yield Finding(
                    reader.name, f"batch norm behind '{node.name}' is not folded; no INT8 kernel takes it in",
                    "fold it into the conv before quantizing", "batch-norm",
                )  # fmt: skip
                result = reader.output[0]
        for tensor in (result, *_sigmoids(view, result)):
            for quantize in _quantizers_of(view, tensor):
                if any(_is_activation(view, reader, tensor) for reader in _behind(view, quantize)):
                    yield Finding(
                        quantize.name,
                        f"Q/DQ between '{node.name}' and its activation keeps the two from running as one kernel",
                        "put the Q/DQ behind the activation", "q-inside-conv", 1,
                    )  # fmt: skip


def _sigmoids(view: View, tensor: str) -> list[str]:
    """Outputs of Sigmoid nodes that read a tensor, directly or through Q/DQ."""
    readers = list(view.readers(tensor))
    for quantize in _quantizers_of(view, tensor):
        readers += _behind(view, quantize)
    return [node.output[0] for node in readers if node.op_type in ("Sigmoid", "HardSigmoid")]


def _quantizers_of(view: View, tensor: str) -> list[NodeProto]:
    return [node for node in view.readers(tensor) if node.op_type == "QuantizeLinear"]


def _behind(view: View, quantize: NodeProto) -> list[NodeProto]:
    """Readers of the dequantized values of a Q."""
    return [reader for dq in view.readers(quantize.output[0]) for reader in view.readers(dq.output[0])]


def _is_activation(view: View, node: NodeProto, tensor: str) -> bool:
    if node.op_type in ACTIVATIONS:
        return True
    if node.op_type != "Mul" or len(node.input) != 2:
        return False
    sources = [_before_quantizer(view, name) for name in node.input]
    return any(source is not None and source.op_type in ("Sigmoid", "HardSigmoid") for source in sources)


def _before_quantizer(view: View, tensor: str) -> NodeProto | None:
    """Producer of a tensor, looked up through a Q/DQ pair."""
    node = view.producer(tensor)
    while node is not None and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        node = view.producer(node.input[0])
    return node


def residual_adds(view: View) -> Findings:
    """Rule 3: of a residual sum the skip is quantized and the conv branch is not."""
    for node in view.graph.nodes:
        if node.op_type != "Add" or any(name in view.fixed for name in node.input) or len(node.input) != 2:
            continue
        if not any(reader.op_type in WEIGHTED for reader in _reached(view, node.output[0])):
            continue  # not inside the network: the decode's sums
        quantized = [
            all(view.dequantizer(root) is not None for root in view.roots(name)) for name in node.input
        ]
        branches = [_is_branch(view, node.input[i], node.input[1 - i]) for i in (0, 1)]
        if all(quantized) and any(branches):
            tensor = node.input[branches.index(True)]
            yield Finding(
                node.name, f"both summands are quantized; Q/DQ on the branch '{tensor}' keeps the sum out of its conv",
                "remove the Q/DQ on the branch, keep the one on the skip", "residual", 1,
            )  # fmt: skip
        elif not any(quantized):
            yield Finding(
                node.name, "neither summand is quantized: the skip is kept and read in float",
                "put Q/DQ on the skip, with the scale of the block's first conv", "residual", 1,
            )  # fmt: skip


def _is_branch(view: View, tensor: str, other: str) -> bool:
    """Whether a summand comes from a conv that works on the other summand: the longer way to the common ancestor."""
    sources = {_source_tensor(view, root) for root in view.roots(other)}
    pending: list[str] = [tensor]
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        node = view.producer(name)
        if node is None or name in seen or len(seen) > 400:
            continue
        seen.add(name)
        for before in node.input:
            if before in view.fixed:
                continue
            if before in sources and (len(seen) > 1 or node.op_type in WEIGHTED):
                return any(made.op_type in WEIGHTED for n in seen if (made := view.producer(n)) is not None)
            pending.append(before)
    return False


def _source_tensor(view: View, tensor: str) -> str:
    """The tensor in front of the Q/DQ pair that makes `tensor`."""
    node = view.producer(tensor)
    while node is not None and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        tensor = node.input[0]
        node = view.producer(tensor)
    return tensor


def _reached(view: View, tensor: str) -> list[NodeProto]:
    """All nodes behind a tensor."""
    found: dict[int, NodeProto] = {}
    pending = [tensor]
    while pending:
        for node in view.readers(pending.pop()):
            if id(node) not in found:
                found[id(node)] = node
                pending.extend(node.output)
    return list(found.values())


def unequal_scales(view: View) -> Findings:
    """Rule 4, the master check: all scales that reach one computed tensor through moving operators are equal."""
    for tensor in _computed_tensors(view):
        scales = scales_reaching(view, tensor)
        if len(scales) > 1:
            values = ", ".join(sorted(format_scale(scale) for scale, _ in scales))
            yield Finding(
                tensor, f"wanted on {len(scales)} scales ({values}): each further one is a kernel of its own",
                "give its readers, and the tensors it is joined with, one scale", "unequal-scales", len(scales) - 1,
            )  # fmt: skip


def scales_reaching(view: View, tensor: str) -> set[tuple[float, int]]:
    """(scale, zero point) of every Q that a tensor flows into through moving operators and Q/DQ pairs."""
    scales: set[tuple[float, int]] = set()
    pending, seen = [tensor], set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in view.readers(name):
            if node.op_type == "QuantizeLinear":
                key = view.quantization(node).key
                if key is not None:
                    scales.add(key)
                pending.extend(node.output)
            elif node.op_type == "DequantizeLinear" or (
                view.is_moving(node) and name in view.moved_inputs(node)
            ):
                pending.extend(node.output)
    return scales


def _computed_tensors(view: View) -> list[str]:
    names = list(view.graph.inputs)
    for node in view.graph.nodes:
        if not view.is_moving(node) and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            names.extend(name for name in node.output if name not in view.fixed)
    return names


def narrow_convs(view: View) -> Findings:
    """Rule 6: convs too narrow for an INT8 kernel (modelopt's conditions), and the DFL's fixed 1x1 conv."""
    for node in view.weighted():
        weight = view.shapes.get(node.input[1])
        if node.op_type != "Conv" or not view.is_quantized(node) or weight is None or None in weight:
            continue
        outputs, inputs, *kernel = (size or 0 for size in weight)
        groups = int(str(attributes(node).get("group", 1)))
        if outputs == 1 and set(kernel) == {1}:
            reason = "the DFL's projection"
        elif groups > 1:
            reason = (
                ""
                if outputs % 8 == 0 and min(kernel) >= 3
                else f"{groups} groups, {outputs} outputs, kernel {kernel}"
            )
        else:
            from_image = any(
                _source_tensor(view, root) in view.graph.inputs for root in view.roots(node.input[0])
            )
            aligned = (outputs % 8 == 0 or inputs % 8 == 0) and len(set(kernel)) == 1
            wide = from_image or max(inputs, outputs) >= 16
            reason = "" if aligned and wide else f"{inputs} inputs, {outputs} outputs, kernel {kernel}"
        if reason:
            yield Finding(
                node.name, f"quantized conv is too narrow for a good INT8 kernel ({reason})",
                "leave it in float", "narrow-conv",
            )  # fmt: skip


def needless_quantizers(view: View) -> Findings:
    """Rule 7: no Q twice, no Q for nobody, at an output, or in front of operators that have no INT8 kernel."""
    seen: dict[tuple[str, object], NodeProto] = {}
    for node in view.quantizers("QuantizeLinear"):
        key = view.quantization(node).key
        if key is not None and (node.input[0], key) in seen:
            first = seen[node.input[0], key].name
            yield Finding(
                node.name, f"quantizes '{node.input[0]}' again with the scale of '{first}'",
                "merge the two", "duplicate-q", 1,
            )  # fmt: skip
        seen.setdefault((node.input[0], key), node)
        yield from _dangling(view, node)


def _dangling(view: View, node: NodeProto) -> Findings:
    readers = view.readers(node.output[0])
    if node.output[0] in view.graph.outputs or any(dq.output[0] in view.graph.outputs for dq in readers):
        yield Finding(node.name, "quantizes a graph output", "leave outputs in float", "q-at-output", 1)
        return
    if not readers or not _behind(view, node):
        yield Finding(node.name, "nobody reads what it quantizes", "remove it", "dangling-q", 1)
        return
    source = view.producer(node.input[0])
    if source is not None and source.op_type == "DequantizeLinear":
        before, after = view.quantization(source).key, view.quantization(node).key
        if before != after and before is not None and after is not None:
            yield Finding(
                node.name, f"a DQ of scale {format_scale(before[0])} feeds a Q of scale {format_scale(after[0])}",
                "let both sides share one scale", "requantize", 1,
            )  # fmt: skip
    if not _serves_integer_kernel(view, node):
        kinds = ", ".join(sorted({reader.op_type for reader in _behind(view, node)}))
        yield Finding(
            node.name, f"only {kinds} reads the result, in float: accuracy is lost and nothing is gained",
            "remove this Q/DQ", "useless-q", 2,
        )  # fmt: skip


def _serves_integer_kernel(view: View, quantize: NodeProto) -> bool:
    pending, seen = [quantize.output[0]], set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in view.readers(name):
            if node.op_type in WEIGHTED or node.op_type in ("Add", "AveragePool", "GlobalAveragePool"):
                return True
            if node.op_type in ("DequantizeLinear", "QuantizeLinear") or view.is_moving(node):
                pending.extend(node.output)
    return False


def bad_parameters(view: View) -> Findings:
    """Rule 1: positive finite scales, zero point 0, one scale for activations, per-channel weights, float bias."""
    activation_only = view.target in CPU_TARGETS
    for node in view.graph.nodes:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        parameters = view.quantization(node)
        scale, zero_point = parameters.scale, parameters.zero_point
        if scale is None:
            yield Finding(
                node.name, "its scale is computed at run time", "store the scale as a constant", "bad-scale"
            )
            continue
        values = scale.astype(np.float64)
        if not np.all(np.isfinite(values) & (values > 0)):
            yield Finding(
                node.name, f"a scale of {format_scale(values.min())}: TensorRT takes positive, finite scales only",
                "calibrate again, or leave the tensor in float", "bad-scale",
            )  # fmt: skip
        if zero_point is not None and np.any(zero_point) and not activation_only:
            yield Finding(
                node.name, f"zero point {int(zero_point.reshape(-1)[0])}: TensorRT takes symmetric quantization only",
                "quantize symmetrically (zero point 0, int8)", "zero-point",
            )  # fmt: skip
        if node.input[0] not in view.fixed and scale.size > 1:
            yield Finding(
                node.name, f"an activation has {scale.size} scales; no INT8 conv takes more than one",
                "use one scale for the tensor", "per-channel-activation",
            )  # fmt: skip


def weight_parameters(view: View) -> Findings:
    """Rule 1: weights have one scale for each output channel, and the bias is float."""
    for node in view.weighted():
        dq = view.weight_dequantizer(node)
        if dq is not None and node.op_type in ("Conv", "ConvTranspose"):
            parameters, wanted = view.quantization(dq), 0 if node.op_type == "Conv" else 1
            shape = view.shapes.get(node.input[1]) or (1,)
            if parameters.is_per_tensor and shape[wanted] != 1:
                yield Finding(
                    node.name, "its weight has one scale for all channels: small channels lose their bits",
                    f"quantize weights per output channel (axis {wanted})", "per-tensor-weight",
                )  # fmt: skip
            elif not parameters.is_per_tensor and parameters.axis % len(shape) != wanted:
                yield Finding(
                    node.name, f"its weight has scales along axis {parameters.axis}, not along the output channels",
                    f"use axis {wanted}", "per-tensor-weight",
                )  # fmt: skip
        has_bias = len(node.input) > 2 and node.op_type != "MatMul"
        if has_bias and view.dequantizer(node.input[2]) is not None and view.target not in CPU_TARGETS:
            yield Finding(
                node.name, "its bias is quantized; TensorRT reads no INT32 bias", "leave the bias in float",
                "quantized-bias",
            )  # fmt: skip


def float_islands(view: View) -> Findings:
    """Rule 8: in a graph with FP16 nothing but the tail behind the last convs is FP32, and the tail is not FP16."""
    nodes = [
        node
        for node in view.graph.nodes
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear", "Cast")
    ]
    if not any(view.float_type(name) == "fp16" for node in nodes for name in node.output):
        return
    for node in nodes:
        kind = view.float_type(node.output[0])
        if node.output[0] in view.fixed or not kind:
            continue
        inside = node.op_type in WEIGHTED or any(
            n.op_type in WEIGHTED for n in _reached(view, node.output[0])
        )
        if kind == "fp32" and inside:
            yield Finding(
                node.name, f"{node.op_type} runs in FP32 inside an FP16 graph, with casts around it",
                "write it in FP16", "fp32-island", 2,
            )  # fmt: skip
        if kind == "fp16" and not inside and node.op_type in ("Softmax", "ReduceSum", "Sub", "Add"):
            yield Finding(
                node.name, f"{node.op_type} behind the last conv runs in FP16, whose steps are 0.5 px above 512",
                "keep the box decode in FP32", "fp16-decode",
            )  # fmt: skip


RULES: tuple[Rule, ...] = (
    float_convs,
    quantizer_inside_conv,
    residual_adds,
    unequal_scales,
    narrow_convs,
    needless_quantizers,
    bad_parameters,
    weight_parameters,
    float_islands,
)
"""All rules. ONNX Runtime's own graph has a Q on every operator's output on purpose, see `rules_for`."""

INTEGER_OPERATOR_RULES: tuple[Rule, ...] = (float_convs, bad_parameters, weight_parameters, narrow_convs)


def rules_for(view: View) -> tuple[Rule, ...]:
    """The rules that hold for the target named in the file's metadata; TensorRT's for files of other tools."""
    return INTEGER_OPERATOR_RULES if view.target == "onnxruntime" else RULES
