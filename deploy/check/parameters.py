"""The rules about single quantizers' numbers: scales, zero points, codes, weights, biases.

See `deploy.check.rules` for the sources.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto

from deploy.graph.finding import Finding, Findings
from deploy.graph.model import Array
from deploy.graph.view import Quantization, View, format_scale


def bad_parameters(view: View) -> Findings:
    """Rule 1: positive finite scales, int8 codes with zero point 0, one scale for activations, equal in Q and DQ."""
    for node in view.graph.nodes:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        partner = _quantize_of(view, node)
        parameters = view.quantization(node)
        if partner is not None and _same(parameters, view.quantization(partner)):
            continue  # reported at the Q
        if partner is not None:
            yield Finding(
                node.name, f"its scale or zero point is not that of '{partner.name}', whose codes it reads: values "
                "change", "give both the same scale and zero point", "pair-mismatch",
            )  # fmt: skip
        if parameters.scale is None:
            yield Finding(
                node.name, "its scale is computed at run time", "store the scale as a constant", "bad-scale"
            )
            continue
        yield from _scale_findings(view, node, parameters.scale)
        if not view.takes_unsigned:
            yield from _code_findings(view, node, parameters)


def _quantize_of(view: View, node: NodeProto) -> NodeProto | None:
    """The Q whose codes a DQ reads, directly or through operators that only move them."""
    if node.op_type != "DequantizeLinear":
        return None
    sources = [view.producer(root) for root in view.roots(node.input[0])]
    found = [source for source in sources if source is not None and source.op_type == "QuantizeLinear"]
    return found[0] if found else None


def _same(one: Quantization, other: Quantization) -> bool:
    if one.scale is None or other.scale is None:
        return one.scale is None and other.scale is None
    scales = (one.scale.reshape(-1), other.scale.reshape(-1))  # shapes [] and [1] are the same value
    return bool(np.array_equal(*scales) and _zero(one) == _zero(other))


def _zero(parameters: Quantization) -> list[int]:
    """Zero points as plain numbers; a missing one is 0."""
    zero_point = parameters.zero_point
    return [0] if zero_point is None else sorted({int(value) for value in zero_point.reshape(-1)}) or [0]


def _scale_findings(view: View, node: NodeProto, scale: Array) -> Findings:
    values = scale.astype(np.float64)
    if not np.all(np.isfinite(values) & (values > 0)):
        yield Finding(
            node.name, f"a scale of {format_scale(values.min())}: TensorRT takes positive, finite scales only",
            "calibrate again, or leave the tensor in float", "bad-scale",
        )  # fmt: skip
    if node.input[0] not in view.fixed and scale.size > 1:
        yield Finding(
            node.name, f"an activation has {scale.size} scales; no INT8 conv takes more than one",
            "use one scale for the tensor", "per-channel-activation",
        )  # fmt: skip


def scale_shapes(view: View) -> Findings:
    """Rule 10: an activation's DQ has a scalar scale; TensorRT runs convs after one of shape [1] in float.

    The shape of the Q's scale makes no difference (seen with TensorRT for RTX 1.7).
    """
    for node in view.quantizers("DequantizeLinear"):
        scale = view.quantization(node).scale
        if scale is not None and scale.size == 1 and scale.ndim:
            yield Finding(
                node.name, f"its scale has shape {list(scale.shape)}: TensorRT runs the convs that read it in float",
                "store the scale as a scalar, shape []", "scale-shape",
            )  # fmt: skip


def _code_findings(view: View, node: NodeProto, parameters: Quantization) -> Findings:
    """Zero points and unsigned codes, which TensorRT does not take."""
    codes = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
    worst = max(_zero(parameters), key=abs)
    if worst:
        hazard = f"zero point {worst}: TensorRT takes symmetric quantization only"
    elif view.types.get(codes) == TensorProto.UINT8:
        hazard = "unsigned codes (uint8): TensorRT takes int8 only"
    else:
        return
    yield Finding(node.name, hazard, "quantize symmetrically (zero point 0, int8)", "zero-point")


def weight_parameters(view: View) -> Findings:
    """Rule 1: INT8 weights have one scale for each output channel, and the bias is float.

    FP8 steps are relative to the value, so that one scale for the tensor is as good.
    """
    for node in view.weighted():
        dq = view.weight_dequantizer(node)
        if dq is not None and node.op_type in ("Conv", "ConvTranspose"):
            parameters, wanted = view.quantization(dq), 0 if node.op_type == "Conv" else 1
            shape = view.shapes.get(node.input[1]) or (1,)
            if parameters.is_per_tensor and shape[wanted] != 1 and view.code_kind(dq) == "int8":
                yield Finding(
                    node.name, "its weight has one scale for all channels: small channels lose resolution",
                    f"quantize weights per output channel (axis {wanted})", "per-tensor-weight",
                )  # fmt: skip
            elif not parameters.is_per_tensor and parameters.axis % len(shape) != wanted:
                yield Finding(
                    node.name, f"its weight has scales along axis {parameters.axis}, not along the output channels",
                    f"use axis {wanted}", "per-tensor-weight",
                )  # fmt: skip
        has_bias = len(node.input) > 2 and node.op_type != "MatMul"
        if has_bias and view.dequantizer(node.input[2]) is not None and not view.takes_unsigned:
            yield Finding(
                node.name, "its bias is quantized; TensorRT reads no INT32 bias", "leave the bias in float",
                "quantized-bias",
            )  # fmt: skip
