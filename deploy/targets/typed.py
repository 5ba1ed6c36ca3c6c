"""The strongly typed graph that TensorRT 11 needs (10.x too, with STRONGLY_TYPED): precision is what the file says.

TensorRT 11 has no FP16 and INT8 flags. Q/DQ make the INT8 or FP8 part; everything else runs in the type the
graph gives it. So the float part is written in FP16 here, and the tail after the last convs (DFL, boxes, sigmoid)
stays FP32: FP16 steps are 0.5 px above 512. Scales come in two forms:

- "fp16": scale tensors in FP16, opset 19. The grid moves by at most 2^-11 of a step; Q and DQ get the same value.
- "fp32": scale tensors in FP32, opset 23, whose DQ names its output type. No zero point is written then, because
  TensorRT's parser requires the type of a zero point and `output_dtype` to be equal. For TensorRT versions that fail on
  FP16 scales (NVIDIA/TensorRT#4832).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from core.errors import DeployError
from core.operators import OPERATORS, Kind
from core.targets import SCALE_TYPES
from deploy.graph.model import Array, Graph
from deploy.graph.passes import E4M3, GraphPass, PassRequest, PassResult
from deploy.targets.resize import quantize_behind_resize

COMPUTE = frozenset((*OPERATORS[Kind.WEIGHTED].onnx, "QuantizeLinear", "DequantizeLinear"))
KEEPS_FLOAT32: Mapping[str, tuple[int, ...]] = {"Resize": (1, 2)}  # roi and scales
HALF_MAX = float(np.finfo(np.float16).max)
HALF_TINY = np.float16(2**-24)


def passes(model: ModelProto, request: PassRequest) -> list[GraphPass]:
    """The passes of the target trt11."""
    return [quantize_behind_resize, strongly_typed(request.scale_type)]


def strongly_typed(scale_type: str = "fp16") -> GraphPass:
    """Make the pass that writes the types of a strongly typed FP16 + INT8 graph, see the module's text."""
    if scale_type not in SCALE_TYPES:
        raise DeployError(f"Unknown scale type '{scale_type}'; expected one of {', '.join(SCALE_TYPES)}.")

    def strongly_typed(graph: Graph) -> PassResult:
        return _Typer(graph, scale_type).run()

    return strongly_typed


def tail_nodes(graph: Graph) -> set[int]:
    """Ids of the nodes after the last convs: those from which no conv, matrix product or quantizer is reached."""
    leads_to_compute: set[str] = set()
    tail: set[int] = set()
    for node in reversed(graph.nodes):
        if node.op_type in COMPUTE or any(name in leads_to_compute for name in node.output):
            leads_to_compute.update(node.input)
        else:
            tail.add(id(node))
    return tail


class _Typer:
    """Goes through the nodes in order and keeps track of the float type of every tensor."""

    def __init__(self, graph: Graph, scale_type: str) -> None:
        self.graph = graph
        self.scale_type = scale_type
        self.half: set[str] = set()  # tensors in FP16
        self.casts: dict[tuple[str, int], str] = {}
        self.added: list[NodeProto] = []

    def run(self) -> PassResult:
        graph = self.graph
        tail = tail_nodes(graph)
        edits = 0
        for node in list(graph.nodes):
            match node.op_type:
                case "QuantizeLinear":
                    self._type_quantize(node)
                case "DequantizeLinear":
                    self._type_dequantize(node)
                case _ if id(node) in tail:
                    self._read_as(node, TensorProto.FLOAT)
                case _:
                    self._read_as(node, TensorProto.FLOAT16)
                    self.half.update(node.output)
            edits += 1
        for name in graph.outputs:
            if name in self.half:
                self._cast_output(name)
        graph.insert(self.added)
        return PassResult(edits=edits)

    # ---------------------------------------------------------------------------------------------------- quantizers
    def _type_quantize(self, node: NodeProto) -> None:
        is_half = node.input[0] in self.half
        if self.scale_type == "fp32":
            zero_point = self.graph.constants.get(node.input[2]) if len(node.input) > 2 else None
            is_fp8 = zero_point is not None and zero_point.dtype == E4M3
            del node.input[2:]
            _set_integer(node, "output_dtype", TensorProto.FLOAT8E4M3FN if is_fp8 else TensorProto.INT8)
            return
        # an image in FP32 is quantized with the same, FP16-representable value kept in FP32
        node.input[1] = self._scale(node.input[1], np.float16 if is_half else np.float32)

    def _type_dequantize(self, node: NodeProto) -> None:
        self.half.add(node.output[0])
        if self.scale_type == "fp32":
            del node.input[2:]
            _set_integer(node, "output_dtype", TensorProto.FLOAT16)
            return
        node.input[1] = self._scale(node.input[1], np.float16)

    def _scale(self, name: str, dtype: type[np.floating]) -> str:
        value = self.graph.constants.get(name)
        if value is None:
            raise DeployError(
                f"The scale '{name}' is computed at run time; a strongly typed graph needs constants."
            )
        rounded = np.maximum(_to_half(value, name), HALF_TINY).astype(dtype)
        return self._constant(f"{name}_{np.dtype(dtype).name}", rounded)

    # ------------------------------------------------------------------------------------------------------ the rest
    def _read_as(self, node: NodeProto, wanted: int) -> None:
        """Let a node read its float inputs in the wanted type: constants are converted, tensors are cast."""
        kept = KEEPS_FLOAT32.get(node.op_type, ())
        for index, name in enumerate(node.input):
            if not name or index in kept:
                continue
            value = self.graph.constants.get(name)
            if value is not None:
                if value.dtype == np.float32 and wanted == TensorProto.FLOAT16:
                    node.input[index] = self._constant(f"{name}_float16", _to_half(value, name))
            elif self._type_of(name) not in (None, wanted):
                node.input[index] = self._cast(name, wanted)

    def _type_of(self, name: str) -> int | None:
        """FLOAT16 or FLOAT; None for tensors that are not float (shapes, codes)."""
        if name in self.half:
            return TensorProto.FLOAT16
        producer = self.graph.producers.get(name)
        is_integer = producer is not None and producer.op_type in (
            "Shape",
            "QuantizeLinear",
            "ArgMax",
            "NonZero",
        )
        return None if is_integer else TensorProto.FLOAT

    def _cast(self, name: str, wanted: int) -> str:
        key = (name, wanted)
        if key not in self.casts:
            suffix = "float16" if wanted == TensorProto.FLOAT16 else "float32"
            result = self.graph.unique(f"{name}_as_{suffix}")
            self.added.append(helper.make_node("Cast", [name], [result], f"{result}/Cast", to=wanted))
            self.casts[key] = result
        return self.casts[key]

    def _cast_output(self, name: str) -> None:
        """Keep a graph output in FP32 under its name."""
        inner = self.graph.unique(f"{name}_float16")
        producer = self.graph.producers[name]
        for index, output in enumerate(producer.output):
            if output == name:
                producer.output[index] = inner
        self.graph.rewire(name, inner)
        self.added.append(helper.make_node("Cast", [inner], [name], f"{name}/Cast", to=TensorProto.FLOAT))

    def _constant(self, name: str, value: Array) -> str:
        self.graph.constants.setdefault(name, value)
        return name


def _to_half(value: Array, name: str) -> Array:
    largest = float(np.abs(value.astype(np.float64)).max(initial=0.0))
    if not largest <= HALF_MAX:
        raise DeployError(
            f"'{name}' holds {largest}, beyond FP16's {HALF_MAX}; export for trt10 (FP32 float part) instead."
        )
    return value.astype(np.float16)


def _set_integer(node: NodeProto, name: str, value: int) -> None:
    for attribute in node.attribute:
        if attribute.name == name:
            attribute.i = value
            return
    node.attribute.append(helper.make_attribute(name, value))
