"""The rules of Q/DQ placement, one function for each: a View in, findings out.

Sources of the rules: NVIDIA's Q/DQ placement recommendations (TensorRT developer guide; tensorflow-quantization's
custom cases), modelopt's ONNX quantization, and yolo_deepstream's QAT guidance. "Reformats" are kernels that do
nothing but change scale or type.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from core.operators import RESIZE, narrow_reason
from deploy.check.activations import quantizer_inside_conv
from deploy.check.parameters import bad_parameters, scale_shapes, weight_parameters
from deploy.check.placement import float_islands, float_pools, needless_quantizers
from deploy.check.sums import residual_adds
from deploy.check.unknown import unknown_parts
from deploy.graph.finding import Finding, Findings, Rule
from deploy.graph.known import KNOWN_KINDS
from deploy.graph.model import attributes
from deploy.graph.view import WEIGHTED, View, format_scale


def float_convs(view: View) -> Findings:
    """Rule 1: every conv but those at the outputs has DQ on data and on weight; `unknown_parts` tells odd codes."""
    for node in view.weighted():
        at_output = id(node) in view.output_convs
        if at_output and (view.weight_dequantizer(node) is None or view.lacks_result_quantizer(node)):
            continue
        if view.is_quantized(node) or view.code_kinds(node) - KNOWN_KINDS:
            continue
        if view.weight_dequantizer(node) is None and view.unsupported_reason(node, view.has_fp8):
            continue  # left in float, as it should be
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
    if not missing and view.lacks_result_quantizer(node):
        return (
            f"{kind}'s result is read without Q/DQ; ONNX Runtime then runs it in float",
            "give the export images (images=...), from which it takes a grid for the result",
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
    kinds = view.code_kinds(node)
    if len(kinds) > 1:
        return (
            f"{kind}'s data and weight have codes of {len(kinds)} kinds ({', '.join(sorted(kinds))}); it runs in float",
            "quantize both to INT8 or both to FP8",
        )
    scales = {view.quantization(dq).key for dq in found.values() if dq is not None}
    values = ", ".join(sorted(format_scale(key[0]) if key else "per channel" for key in scales))
    return (
        f"{kind}'s input joins tensors of {len(scales)} scales ({values}); it runs in float or each is quantized again",
        "let the tensors that meet here share one scale",
    )


def unequal_scales(view: View) -> Findings:
    """Rule 4, the master check: all scales that reach one computed tensor through moving operators are equal."""
    for tensor in computed_tensors(view):
        scales = scales_reaching(view, tensor)
        if len(scales) > 1:
            values = ", ".join(sorted(format_scale(scale) for scale, _ in scales))
            yield Finding(
                tensor, f"wanted on {len(scales)} scales ({values}): each further scale is a separate kernel",
                "use one scale for its readers and for the tensors joined with it", "unequal-scales", len(scales) - 1,
            )  # fmt: skip


def scales_reaching(view: View, tensor: str) -> set[tuple[float, int]]:
    """(scale, zero point) of every Q that a tensor flows into, see `quantizers_reaching`."""
    keys = {view.quantization(node).key for node in quantizers_reaching(view, tensor)}
    return {key for key in keys if key is not None}


def quantizers_reaching(view: View, tensor: str) -> list[NodeProto]:
    """Every Q that a tensor flows into through moving operators and Q/DQ pairs."""
    found: list[NodeProto] = []
    pending, seen = [tensor], set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in view.readers(name):
            if node.op_type == "QuantizeLinear":
                found.append(node)
                pending.extend(node.output)
            elif node.op_type == "DequantizeLinear" or (
                view.is_moving(node) and name in view.moved_inputs(node)
            ):
                pending.extend(node.output)
    return found


def computed_tensors(view: View) -> list[str]:
    """The tensors that some kernel really computes, and the graph's inputs."""
    names = list(view.graph.inputs)
    for node in view.graph.nodes:
        if not view.is_moving(node) and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            names.extend(name for name in node.output if name not in view.fixed)
    return names


def narrow_convs(view: View) -> Findings:
    """Rule 6: convs too narrow for an INT8 kernel, see `core.operators.narrow_reason`."""
    for node in view.weighted():
        weight = view.shapes.get(node.input[1])
        if node.op_type != "Conv" or not view.is_quantized(node) or weight is None or None in weight:
            continue
        outputs, inputs, *kernel = (size or 0 for size in weight)
        groups = int(str(attributes(node).get("group", 1)))
        reads_image = any(view.before_quantizer(t) in view.graph.inputs for t in view.roots(node.input[0]))
        reason = narrow_reason(inputs * groups, outputs, groups, kernel, reads_image)
        if reason:
            yield Finding(
                node.name, f"quantized conv is too narrow: {reason}", "leave it in float", "narrow-conv"
            )


def unsupported_convs(view: View) -> Findings:
    """Rule 11: no Q/DQ on convs that no engine runs in these codes, see `core.operators.unsupported_reason`."""
    for node in view.weighted():
        if view.is_quantized(node) and (
            reason := view.unsupported_reason(node, "fp8" in view.code_kinds(node))
        ):
            yield Finding(
                node.name, f"quantized, but {reason}", "leave its input and weight in float", "unsupported"
            )


def bare_resizes(view: View) -> Findings:
    """Rule 10: a Q/DQ pair follows a nearest Resize whose quantized values reach a quantized conv."""
    for node in view.graph.nodes:
        if node.op_type not in RESIZE.onnx or not view.is_moving(node):
            continue
        roots = view.roots(node.input[0])
        reader = next(_convs_behind(view, node), None)
        if reader is not None and all(view.dequantizer(root) is not None for root in roots):
            yield Finding(
                node.name, f"'{reader.name}' reads it without Q/DQ after it; TensorRT does not move DQ through a "
                "Resize, so the conv runs in float", "put a Q/DQ pair with the same scale after the Resize", "resize",
            )  # fmt: skip


def _convs_behind(view: View, resize: NodeProto) -> Iterator[NodeProto]:
    """Quantized weighted nodes that a Resize reaches through moving operators only."""
    pending = [resize.output[0]]
    while pending:
        tensor = pending.pop()
        for node in view.readers(tensor):
            if view.is_moving(node) and tensor in view.moved_inputs(node):
                pending.extend(node.output)
            elif node.op_type in WEIGHTED and _has_quantized_data(view, node):
                yield node


def _has_quantized_data(view: View, node: NodeProto) -> bool:
    """Whether Q/DQ are on a weighted node's weight and on all of its data, on one scale or several."""
    roots = view.roots(node.input[0])
    return view.weight_dequantizer(node) is not None and all(
        view.dequantizer(root) is not None for root in roots
    )


RULES: tuple[Rule, ...] = (
    float_convs,
    quantizer_inside_conv,
    residual_adds,
    unequal_scales,
    float_pools,
    narrow_convs,
    unsupported_convs,
    needless_quantizers,
    bad_parameters,
    weight_parameters,
    float_islands,
    unknown_parts,
)
"""Rules for every engine but ONNX Runtime's, whose graph has a Q on every operator's output on purpose."""

TENSORRT_RULES: tuple[Rule, ...] = (scale_shapes, bare_resizes)
"""Rules about TensorRT's compilers alone; found with that of TensorRT for RTX 1.7."""

INTEGER_OPERATOR_RULES: tuple[Rule, ...] = (
    float_convs,
    bad_parameters,
    weight_parameters,
    narrow_convs,
    unsupported_convs,
    unknown_parts,
)


def rules_for(view: View) -> tuple[Rule, ...]:
    """The rules that hold for the target named in the file's metadata; TensorRT's for files of other tools."""
    if view.quantizes_results:
        return INTEGER_OPERATOR_RULES
    return RULES if view.takes_unsigned else (*RULES, *TENSORRT_RULES)
