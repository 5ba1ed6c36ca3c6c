"""The rules about where quantizers are placed: needless ones, quantized decodes, float pools, FP32 islands.

See `deploy.check.rules` for the sources.
"""

from __future__ import annotations

from onnx import NodeProto

from deploy.check.activations import inside_convs
from deploy.graph.finding import Finding, Findings
from deploy.graph.known import is_known_operator
from deploy.graph.view import AVERAGE_POOLS, WEIGHTED, View, behind, format_scale, reached


def needless_quantizers(view: View) -> Findings:
    """Rule 7: no Q twice, no unread Q, none at an output, or before operators that have no INT8 kernel."""
    seen: dict[tuple[str, object], NodeProto] = {}
    inside = {id(quantize) for _, quantize in inside_convs(view)}
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
        if id(node) not in inside:  # those have a rule of their own
            yield from useless(view, node)


def _dangling(view: View, node: NodeProto) -> Findings:
    readers = view.readers(node.output[0])
    if at_output(view, node):
        yield Finding(node.name, "quantizes a graph output", "leave outputs in float", "q-at-output", 1)
        return
    if not readers or (
        not behind(view, node) and all(reader.op_type == "DequantizeLinear" for reader in readers)
    ):
        yield Finding(node.name, "its result is not read", "remove it", "dangling-q", 1)
        return
    source = view.producer(node.input[0])
    if source is not None and source.op_type == "DequantizeLinear":
        before, after = view.quantization(source).key, view.quantization(node).key
        if before != after and before is not None and after is not None:
            yield Finding(
                node.name, f"a DQ of scale {format_scale(before[0])} feeds a Q of scale {format_scale(after[0])}",
                "let both sides share one scale", "requantize", 1,
            )  # fmt: skip


def useless(view: View, node: NodeProto) -> Findings:
    """A Q whose result only float operators read, inside the network or in the decode."""
    if not behind(view, node) or at_output(view, node) or _serves_integer_kernel(view, node):
        return
    if not all(is_known_operator(reader) for reader in reached(view, node.output[0])):
        return  # what is not known may run in integers
    readers = _readers_behind(view, node)
    kinds = ", ".join(sorted({reader.op_type for reader in readers}))
    if _is_behind_last_conv(view, node.input[0]):
        scale = view.quantization(node).scale
        step = "" if scale is None or scale.size != 1 else f" of {format_scale(float(scale.reshape(-1)[0]))}"
        yield Finding(
            node.name, f"rounds a tensor of the decode after the last conv to steps{step} for {kinds}: this "
            "costs accuracy of boxes or scores and gains nothing",
            "leave everything after the last convs in float", "q-in-decode", 2,
        )  # fmt: skip
        return
    yield Finding(
        node.name, f"only {kinds} reads the result, in float: this costs accuracy and gains nothing",
        "quantize both operands, each with one scale, or remove this Q/DQ"
        if any(view.is_matmul(reader) for reader in readers) else "remove this Q/DQ", "useless-q", 2,
    )  # fmt: skip


def _readers_behind(view: View, quantize: NodeProto) -> list[NodeProto]:
    """Readers of the dequantized values of a Q, through operators that only move them."""
    pending, found = behind(view, quantize), []
    while pending:
        node = pending.pop()
        if view.is_moving(node):
            pending += [reader for name in node.output for reader in view.readers(name)]
        else:
            found.append(node)
    return found


def at_output(view: View, quantize: NodeProto) -> bool:
    """Whether a graph output holds the codes of a Q or their values."""
    results = [quantize.output[0], *(dq.output[0] for dq in view.readers(quantize.output[0]))]
    return any(name in view.graph.outputs for name in results)


def _serves_integer_kernel(view: View, quantize: NodeProto) -> bool:
    """Whether a Q leads to a conv, directly or through sums and pools that have INT8 kernels of their own."""
    pending, seen = [quantize.output[0]], set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in view.readers(name):
            if node.op_type in WEIGHTED:
                if view.is_quantized(node) or not view.is_matmul(node):
                    return True
                continue
            if node.op_type in ("Add", *AVERAGE_POOLS) and leads_to_conv(view, node.output[0]):
                return True
            if node.op_type in ("DequantizeLinear", "QuantizeLinear") or view.is_moving(node):
                pending.extend(node.output)
    return False


def leads_to_conv(view: View, tensor: str) -> bool:
    """Whether a weighted node follows a tensor."""
    return any(node.op_type in WEIGHTED for node in reached(view, tensor))


def _is_behind_last_conv(view: View, tensor: str) -> bool:
    return bool(view.weighted()) and not leads_to_conv(view, tensor)


def float_pools(view: View) -> Findings:
    """Rule 4: an average-pool inside the network reads INT8; Q/DQ do not commute with it."""
    for node in view.graph.nodes:
        if node.op_type not in AVERAGE_POOLS or not leads_to_conv(view, node.output[0]):
            continue
        missing = [root for root in view.roots(node.input[0]) if view.dequantizer(root) is None]
        if missing and any(reader.op_type == "QuantizeLinear" for reader in view.readers(node.output[0])):
            yield Finding(
                node.name, f"averages '{missing[0]}' in float and its result is quantized: a float kernel between INT8 "
                "ones", "put Q/DQ before the pool as well", "float-pool", 1,
            )  # fmt: skip


def float_islands(view: View) -> Findings:
    """Rule 8: in a graph with FP16 nothing but the tail after the last convs is FP32, and the tail is not FP16."""
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
                node.name, f"{node.op_type} after the last conv runs in FP16, whose steps are 0.5 px above 512",
                "keep the box decode in FP32", "fp16-decode",
            )  # fmt: skip
