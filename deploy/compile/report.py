"""What an engine does with a graph's convolutions and matrix products: precision, fusions, bytes moved.

An FP16 build of the same graph is compared with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto

from core.operators import RESIZE
from deploy.compile.compiler import WITHOUT_INT8_CONVOLUTIONS, Compiled, Shapes, compile_graph
from deploy.compile.kernels import BYTES, Kernel, total_bytes
from deploy.graph.finding import Finding
from deploy.graph.model import Graph, attributes
from deploy.graph.passes import PassResult, fold_constants, run_pass
from deploy.graph.quantizers import dequantize_constant
from deploy.graph.view import View
from deploy.naming import module_path
from deploy.targets.typed import strongly_typed

PRECISIONS = {"Int8": "int8", "FP8": "fp8", "Half": "fp16", "BFloat16": "bf16", "Float": "fp32"}
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
COMPUTING = frozenset(
    {"correlation", "deconv", "gemm", "runtime_fusion"}
)  # kinds of kernels that layers run in


@dataclass(frozen=True)
class LayerBuild:
    """One convolution (or matrix product) in the engine.

    Attributes:
        name: module path, or the node's name in other tools' files.
        precision: of the data that its kernel multiplies: int8, fp8, fp16, bf16, fp32; "" where no kernel names it.
        result: precision of what the kernel writes.
        fused: other ONNX nodes in the same kernel.
        moved_bytes: bytes that its kernels read and write, those that only finish it (bias, activation) included.
        is_quantized: whether the file quantizes it.
    """

    name: str
    precision: str
    result: str
    fused: tuple[str, ...]
    moved_bytes: float
    is_quantized: bool


@dataclass(frozen=True)
class BuildSummary:
    """An engine in numbers: kernels, convolutions by precision, and bytes that all kernels read and write."""

    num_kernels: int
    convolutions: dict[str, int]
    moved_bytes: float


@dataclass(frozen=True)
class CompileReport:
    """What the compiler makes of a graph for one compute capability, or for several with one plan.

    Attributes:
        capability: the compute capability, or several with commas.
        version: of TensorRT for RTX.
        layers: every convolution and matrix product with weights, in the order of the graph.
        matmuls: every product of two computed tensors, in the order of the graph.
        engine: the whole engine.
        fp16: the engine of the same graph without quantizers, in FP16.
        findings: where the compiler does not do what the file says.
    """

    capability: str
    version: str
    layers: tuple[LayerBuild, ...]
    matmuls: tuple[LayerBuild, ...]
    engine: BuildSummary
    fp16: BuildSummary
    findings: tuple[Finding, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain dict, ready for JSON."""
        return asdict(self)


def inspect_build(
    model: ModelProto,
    capability: str,
    image_size: tuple[int, int] | None = None,
    fp16: BuildSummary | None = None,
) -> CompileReport:
    """Compile a graph, and the same graph in FP16, and compare the engine with what the file says.

    Args:
        model: any graph that TensorRT reads; it is not changed.
        capability: a compute capability, such as `SM89`, or those of one plan, such as `SM86,SM89`. A plan has one
            graph for all of its GPUs: what one of them does not run in 8 bits, none of them does.
        image_size: (height, width) for graphs that leave it open.
        fp16: the engine in FP16 where it is known already, so that it is not built again.

    Raises:
        DeployError: TensorRT for RTX is missing, or refuses the graph.
    """
    view = View(model, image_size)
    shapes = fixed_shapes(view)
    built = compile_graph(model, capability.split(","), shapes)
    layers = tuple(_layers(view, view.weighted(), built.kernels))
    matmuls = tuple(_layers(view, view.matmuls(), built.kernels))
    return CompileReport(
        capability,
        built.version,
        layers,
        matmuls,
        _summary(built, [layer.precision for layer in layers]),
        fp16 or _half_build(view, model, capability, shapes),
        tuple(_findings(view, (*layers, *matmuls), capability)),
    )


def _half_build(view: View, model: ModelProto, capability: str, shapes: Shapes) -> BuildSummary:
    built = compile_graph(half_precision(model), capability.split(","), shapes)
    return _summary(built, [_precision(kernel_of(node.name, built.kernels)) for node in view.weighted()])


def half_precision(model: ModelProto) -> ModelProto:
    """The same graph without quantizers, its float part in FP16 and the tail after the last layers in FP32."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for graph_pass in (remove_quantizers, write_float32, fold_constants, strongly_typed("fp16")):
        run_pass(copy, graph_pass)
    return copy


def remove_quantizers(graph: Graph) -> PassResult:
    """Take Q and DQ nodes out; quantized weights become their float values, in the type of their scales."""
    counts = {"QuantizeLinear": 0, "DequantizeLinear": 0}
    gone = [node for node in graph.nodes if node.op_type in counts]
    for node in gone:
        counts[node.op_type] += 1
        value = graph.constants.get(node.input[0])
        if value is None:
            graph.rewire(node.output[0], node.input[0])
        else:  # a Q passes its float constant on, also through the DQ after it
            is_codes = (
                node.op_type == "DequantizeLinear" and value.dtype != graph.constants[node.input[1]].dtype
            )
            graph.constants[node.output[0]] = dequantize_constant(graph, node) if is_codes else value
    graph.remove(gone)
    return PassResult(-counts["QuantizeLinear"], -counts["DequantizeLinear"], len(gone))


def write_float32(graph: Graph) -> PassResult:
    """Bring a graph of mixed float types back to FP32: constants, and the casts between float types go."""
    inferred = onnx.shape_inference.infer_shapes(graph.commit()).graph.value_info
    whole = {value.name for value in inferred if value.type.tensor_type.elem_type not in FLOATS}
    for name, value in graph.constants.items():
        if value.dtype == np.float16:
            graph.constants[name] = value.astype(np.float32)
    casts = [
        node
        for node in graph.nodes
        if node.op_type == "Cast" and attributes(node)["to"] in FLOATS and node.input[0] not in whole
    ]
    kept = [node for node in casts if node.output[0] in graph.outputs]
    gone = [node for node in casts if node not in kept]
    for node in gone:
        graph.rewire(node.output[0], node.input[0])
    graph.remove(gone)
    return PassResult(edits=len(gone))


def fixed_shapes(view: View) -> Shapes:
    """Shapes of a build for the one size that a view was made for, batch 1 where it is open."""
    shape = tuple(size or 1 for size in view.shapes[view.graph.inputs[0]])
    return Shapes(shape, shape, shape)


def kernel_of(node: str, kernels: Sequence[Kernel]) -> Kernel | None:
    """The kernel in which a convolution's products are computed."""
    return next((k for k in kernels if k.kind in COMPUTING and node in k.nodes), None)


def layer_precisions(model: ModelProto, kernels: Sequence[Kernel]) -> dict[str, str]:
    """Precision of the data that each layer and product of two tensors multiplies in an engine, by module path.

    Args:
        model: the graph that was compiled.
        kernels: its kernels.
    """
    view = View(model)
    nodes = [*view.weighted(), *view.matmuls()]
    return {layer.name: layer.precision for layer in _layers(view, nodes, kernels)}


def _precision(kernel: Kernel | None, num_operands: int = 1) -> str:
    """Precision of the data that a kernel multiplies: the widest of its first inputs, the others are converted."""
    if kernel is None:
        return ""
    read = max((tensor.type for tensor in kernel.inputs[:num_operands]), key=BYTES.__getitem__)
    return PRECISIONS.get(read, read.lower())


def _layers(view: View, nodes: Sequence[NodeProto], kernels: Sequence[Kernel]) -> Iterator[LayerBuild]:
    for node in nodes:
        kernel = kernel_of(node.name, kernels)
        involved = [one for one in kernels if node.name in one.nodes]
        fused = dict.fromkeys(name for one in involved for name in one.nodes if name != node.name)
        yield LayerBuild(
            name=module_path(node.name) if view.is_ours else node.name,
            precision=_precision(kernel, 2 if view.is_matmul(node) else 1),
            result=""
            if kernel is None
            else PRECISIONS.get(kernel.outputs[0].type, kernel.outputs[0].type.lower()),
            fused=tuple(fused),
            moved_bytes=total_bytes(involved),
            is_quantized=view.is_quantized(node),
        )


def _summary(built: Compiled, precisions: Sequence[str]) -> BuildSummary:
    counts = Counter(precision or "unknown" for precision in precisions)
    return BuildSummary(len(built.kernels), dict(sorted(counts.items())), total_bytes(built.kernels))


def _findings(view: View, layers: Sequence[LayerBuild], capability: str) -> Iterator[Finding]:
    for node, layer in zip([*view.weighted(), *view.matmuls()], layers, strict=True):
        if not layer.precision:
            yield Finding(
                layer.name,
                "no kernel of the engine names it",
                "look for it in the JSON report",
                "not-in-engine",
            )
        elif layer.is_quantized and layer.precision not in ("int8", "fp8"):
            yield Finding(layer.name, *_why_float(view, node, layer, capability), rule="float-in-engine")


def _why_float(view: View, node: NodeProto, layer: LayerBuild, capability: str) -> tuple[str, str]:
    """Why a layer that the file quantizes runs in float, if the graph shows it, and what to do."""
    hazard = f"quantized in the file, but the engine for {capability} runs it in {layer.precision}"
    if unable := WITHOUT_INT8_CONVOLUTIONS.intersection(capability.split(",")):
        return (
            f"{hazard}: TensorRT for RTX has no INT8 convolutions on {min(unable)}",
            "build an FP16 engine for it",
        )
    if reason := view.unsupported_reason(node, "fp8" in view.code_kinds(node)):
        return f"{hazard}: {reason}", "leave its input and weight in float"
    roots = view.roots(node.input[0])
    dequantizers = [dq for root in roots if (dq := view.dequantizer(root)) is not None]
    scales = [view.graph.constants.get(dq.input[1]) for dq in dequantizers]
    if any(scale is not None and scale.ndim > 0 and scale.size == 1 for scale in scales):
        return f"{hazard}: a scale of its input has shape [1]", "store activation scales as scalars, shape []"
    movers = (*RESIZE.onnx, "MaxPool") if "fp8" in view.code_kinds(node) else RESIZE.onnx
    mover = _mover_before(view, node.input[0], movers)
    if mover:
        return (
            f"{hazard}: its input comes through a {mover}, and the compiler does not move DQ through it",
            f"put a Q/DQ pair with the same scale after the {mover}",
        )
    return f"{hazard}; the graph does not show the reason", "compare its input with a layer that runs in INT8"


def _mover_before(view: View, tensor: str, movers: Collection[str]) -> str:
    """Type of one of some operators that a tensor comes through without a DQ after it; empty if there is none."""
    pending = [tensor]
    while pending:
        node = view.producer(pending.pop())
        if node is not None and view.is_moving(node):
            if node.op_type in movers:
                return node.op_type
            pending.extend(view.moved_inputs(node))
    return ""
