"""The rules about single quantizers and types: needless Q, scales, zero points, weights, FP32 islands.

See `deploy.check_rules` for the sources.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from deploy.check_view import CPU_TARGETS, WEIGHTED, View, behind, format_scale, reached
from deploy.finding import Finding, Findings


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
    if not readers or not behind(view, node):
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
        kinds = ", ".join(sorted({reader.op_type for reader in behind(view, node)}))
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
        inside = node.op_type in WEIGHTED or any(n.op_type in WEIGHTED for n in reached(view, node.output[0]))
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
