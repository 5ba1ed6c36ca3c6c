"""A Q/DQ graph as the check sees it: what is constant, which scales reach what, what runs in which precision.

Legend: Q QuantizeLinear, DQ DequantizeLinear. A *root* is a tensor that some kernel really computes (or a graph
input); *moving* operators (concat, split, max-pool, nearest resize, reshape, transpose) only pass values on, and
Q/DQ commute with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
from onnx import ModelProto, NodeProto

from core.choices import FP8
from core.errors import DeployError
from core.operators import OPERATORS, RESIZE, Kind, unsupported_reason
from core.targets import TARGETS
from deploy.graph.known import KNOWN_KINDS, code_kind_of, inlined, qualify_operators
from deploy.graph.model import Array, Graph, attributes, stored_metadata, stored_size
from deploy.graph.passes import drop_identities

WEIGHTED = frozenset(OPERATORS[Kind.WEIGHTED].onnx)
MATMULS = OPERATORS[Kind.MATMUL].onnx
AVERAGE_POOLS = OPERATORS[Kind.AVERAGE].onnx
CONCATS = OPERATORS[Kind.CONCAT].onnx
MOVING = frozenset((*OPERATORS[Kind.TRANSPARENT].onnx, *CONCATS))
FLOAT_TYPES: Mapping[int, str] = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
}


@dataclass(frozen=True)
class Quantization:
    """Scale and zero point of a Q or DQ node; None where they are computed at run time."""

    scale: Array | None
    zero_point: Array | None
    axis: int

    @property
    def is_per_tensor(self) -> bool:
        """Whether one scale serves the whole tensor."""
        return self.scale is not None and self.scale.size == 1

    @property
    def key(self) -> tuple[float, int] | None:
        """(scale, zero point) for comparison; None for run-time or per-channel scales."""
        if self.scale is None or self.scale.size != 1:
            return None
        zero_point = (
            0 if self.zero_point is None or not self.zero_point.size else int(self.zero_point.reshape(-1)[0])
        )
        return float(self.scale.reshape(-1)[0]), zero_point


class View:
    """Look-ups over one model; the model is not changed.

    Args:
        model: any ONNX model.
        image_size: (height, width) for inputs whose size the file leaves open; otherwise its metadata is asked.
        target: engine the graph is for; None asks the metadata.

    Attributes:
        graph: the graph without Identity nodes, with the bodies of its functions in place; operators outside of
            ONNX's own domain carry it in their type, such as `com.microsoft.QGemm`.
        target: the engine; "" for files of other tools, also where they quantized a float file of ours.
        is_ours: whether this project exported the file.
        shapes: shapes with batch 1; types: element types; both by tensor name, if inference finds them.
        fixed: tensors computed from constants only.
    """

    def __init__(
        self, model: ModelProto, image_size: tuple[int, int] | None = None, target: str | None = None
    ) -> None:
        copy = ModelProto()
        copy.CopyFrom(inlined(model))
        qualify_operators(copy.graph)
        metadata = stored_metadata(copy)
        stated = "" if metadata.get("octet.quantized") == "false" else metadata.get("octet.target", "")
        self.target = stated if target is None else target
        self.is_ours = "octet.target" in metadata
        fix_input_shapes(copy, image_size or stored_size(metadata))
        self.graph = Graph(copy)
        drop_identities(self.graph)
        self.shapes, self.types = _infer(self.graph.commit())
        self.fixed = self._fixed_tensors()
        self.output_convs = self._output_convs()

    @property
    def takes_unsigned(self) -> bool:
        """Whether the target takes unsigned codes; TensorRT, which files of other tools are checked for, does not."""
        return self.target in TARGETS and not TARGETS[self.target].signed_only

    @property
    def quantizes_results(self) -> bool:
        """Whether the target runs a conv in integers only where its result is quantized as well."""
        return self.target in TARGETS and TARGETS[self.target].result_quantizers

    def _fixed_tensors(self) -> set[str]:
        fixed = set(self.graph.constants)
        for node in self.graph.nodes:
            if node.input and all(name in fixed for name in node.input if name):
                fixed.update(node.output)
        return fixed

    def _output_convs(self) -> set[int]:
        """Ids of weighted nodes that no other weighted node follows."""
        before_weighted: set[str] = set()
        last = set()
        for node in reversed(self.graph.nodes):
            leads = any(name in before_weighted for name in node.output)
            if node.op_type in WEIGHTED and not leads:
                last.add(id(node))
            if node.op_type in WEIGHTED or leads:
                before_weighted.update(name for name in node.input if name not in self.fixed)
        return last

    # ------------------------------------------------------------------------------------------------------- nodes
    def quantizers(self, op_type: str) -> list[NodeProto]:
        """Q or DQ nodes of activations (their data is not constant)."""
        return [
            node for node in self.graph.nodes if node.op_type == op_type and node.input[0] not in self.fixed
        ]

    def weighted(self) -> list[NodeProto]:
        """Convs, and matrix products with a constant operand; convs that only average count as pools."""
        return [
            node
            for node in self.graph.nodes
            if node.op_type in WEIGHTED
            and len(node.input) > 1
            and node.input[1] in self.fixed
            and not self.is_average(node)
        ]

    def is_average(self, node: NodeProto) -> bool:
        """Whether a conv is an average-pool in another form: depthwise, its quantized weights all one code."""
        if node.op_type != "Conv" or len(node.input) < 2:
            return False
        dq = self.weight_dequantizer(node)
        codes = None if dq is None else self.graph.constants.get(dq.input[0])
        if codes is None or codes.ndim != 4 or codes.shape[1] != 1:
            return False
        return attributes(node).get("group", 1) == len(codes) > 1 and len(np.unique(codes)) == 1

    def matmuls(self) -> list[NodeProto]:
        """Products of two computed tensors inside the network: a layer follows them."""
        return [
            node
            for node in self.graph.nodes
            if self.is_matmul(node)
            and any(reader.op_type in WEIGHTED for reader in reached(self, node.output[0]))
        ]

    def is_matmul(self, node: NodeProto) -> bool:
        """Whether a node multiplies two computed tensors."""
        return node.op_type in MATMULS and not any(name in self.fixed for name in node.input)

    def quantization(self, node: NodeProto) -> Quantization:
        """Parameters of a Q or DQ node."""
        axis = attributes(node).get("axis", 1)
        values = [self.graph.constants.get(name) for name in node.input[1:3]]
        return Quantization(
            values[0] if values else None, values[1] if len(values) > 1 else None, int(str(axis))
        )

    def producer(self, tensor: str) -> NodeProto | None:
        """Node that computes a tensor."""
        return self.graph.producers.get(tensor)

    def readers(self, tensor: str) -> list[NodeProto]:
        """Nodes that read a tensor."""
        return self.graph.consumers.get(tensor, [])

    def is_moving(self, node: NodeProto) -> bool:
        """Whether a node only moves or selects values."""
        if node.op_type in RESIZE.onnx:
            return attributes(node).get("mode", b"nearest") == b"nearest"
        return node.op_type in MOVING

    def moved_inputs(self, node: NodeProto) -> list[str]:
        """Data inputs of a moving node."""
        return list(node.input) if node.op_type in CONCATS else [node.input[0]]

    def roots(self, tensor: str) -> list[str]:
        """The tensors a value really comes from, backward through moving operators; DQ outputs count as roots."""
        found: dict[str, None] = {}
        pending, seen = [tensor], set()
        while pending:
            name = pending.pop()
            if name in seen:
                continue
            seen.add(name)
            node = self.producer(name)
            if node is not None and self.is_moving(node):
                pending.extend(self.moved_inputs(node))
            else:
                found[name] = None
        return list(found)

    def dequantizer(self, tensor: str) -> NodeProto | None:
        """The DQ that produces a tensor, if one does."""
        node = self.producer(tensor)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def before_quantizer(self, tensor: str) -> str:
        """The tensor before the Q/DQ pairs that make `tensor`; `tensor` itself if there is none."""
        node = self.producer(tensor)
        while node is not None and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            tensor = node.input[0]
            node = self.producer(tensor)
        return tensor

    def weight_dequantizer(self, node: NodeProto) -> NodeProto | None:
        """The DQ of a weighted node's weight, also after a reshape or transpose of it."""
        name = node.input[1]
        while (producer := self.producer(name)) is not None and producer.op_type in (
            "Reshape",
            "Transpose",
            "Cast",
        ):
            name = producer.input[0]
        return self.dequantizer(name)

    def is_quantized(self, node: NodeProto) -> bool:
        """Whether a weighted node runs in INT8 or FP8: its weights are, one scale is on all of its data, and see below.

        Data and weights have codes of one known kind. ONNX Runtime's convs also ask for a Q on their result. A product
        of two computed tensors has one scale on each of them.
        """
        kinds = self.code_kinds(node)
        if len(kinds) != 1 or not kinds <= KNOWN_KINDS or self.lacks_result_quantizer(node):
            return False
        return all(len(self.scales_of(name)) == 1 for name in self.data_of(node))

    def data_of(self, node: NodeProto) -> list[str]:
        """The computed tensors that a weighted node or a product of two tensors multiplies."""
        return list(node.input[:2]) if self.is_matmul(node) else [node.input[0]]

    def scales_of(self, tensor: str) -> set[tuple[float, int]]:
        """Scales of the DQ that a tensor comes from; empty where one is missing or has no single scale."""
        found = [self.dequantizer(root) for root in self.roots(tensor)]
        keys = {self.quantization(dq).key if dq is not None else None for dq in found}
        return {key for key in keys if key is not None} if None not in keys else set()

    def code_kinds(self, node: NodeProto) -> set[str]:
        """Kinds of codes of what a node multiplies; empty where one of the two is not quantized."""
        found = [self.dequantizer(root) for name in self.data_of(node) for root in self.roots(name)]
        if not self.is_matmul(node):
            found.append(self.weight_dequantizer(node))
        return set() if None in found else {self.code_kind(dq) for dq in found if dq is not None}

    def code_kind(self, dequantize: NodeProto) -> str:
        """Kind of the codes that a DQ reads: int8 (signed or not), fp8, or another, see `code_kind_of`."""
        names = (dequantize.input[0], *dequantize.input[2:3])
        return code_kind_of(next((self.types[name] for name in names if self.types.get(name)), 0))

    def lacks_result_quantizer(self, node: NodeProto) -> bool:
        """Whether ONNX Runtime runs a conv in float because somebody reads its result without Q."""
        if not self.quantizes_results or node.op_type != "Conv":
            return False
        readers = self.readers(node.output[0])
        if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
            readers = self.readers(readers[0].output[0])
        return any(reader.op_type != "QuantizeLinear" for reader in readers) or not readers

    @cached_property
    def has_fp8(self) -> bool:
        """Whether anything has FP8 codes."""
        return any(self.code_kind(dq) == FP8 for dq in self.quantizers("DequantizeLinear"))

    def unsupported_reason(self, node: NodeProto, is_fp8: bool) -> str | None:
        """Why no engine runs a weighted node in 8 bits, see `core.operators.unsupported_reason`."""
        weight = self.shapes.get(node.input[1])
        if node.op_type not in ("Conv", "ConvTranspose") or weight is None:
            return None
        return unsupported_reason([size or 0 for size in weight[2:]], node.op_type == "ConvTranspose", is_fp8)

    # ------------------------------------------------------------------------------------------------------ numbers
    def multiply_accumulates(self, node: NodeProto) -> int | None:
        """Products of one weighted node, or of two tensors, at batch 1; None where a shape is unknown."""
        weight, result = self.shapes.get(node.input[1]), self.shapes.get(node.output[0])
        if not weight or result is None or None in weight or None in result:
            return None
        known = [size or 1 for size in weight]
        outputs = math.prod(size or 1 for size in result)
        if node.op_type == "Conv":
            return outputs * math.prod(known[1:])
        if node.op_type == "ConvTranspose":
            inputs = self.shapes.get(node.input[0]) or ()
            return (
                math.prod(size or 1 for size in inputs) * math.prod(known[1:]) if None not in inputs else None
            )
        is_last = len(known) == 1 or (node.op_type == "Gemm" and attributes(node).get("transB"))
        shared = known[-1] if is_last else known[-2]
        return outputs * shared

    def unmeasured(self) -> list[NodeProto]:
        """Weighted nodes, and products of two tensors, whose multiply-accumulates cannot be counted."""
        nodes = [*self.weighted(), *self.matmuls()]
        return [node for node in nodes if self.multiply_accumulates(node) is None]

    def float_type(self, tensor: str) -> str:
        """Float type of a tensor, such as "fp32"; empty for integers and unknown types."""
        return FLOAT_TYPES.get(self.types.get(tensor, 0), "")

    def node_precision(self, node: NodeProto) -> str:
        """Precision an engine will run a node in: int8, fp8, fp16, bf16, fp32 or other."""
        if node.op_type in WEIGHTED and (node.input[1] in self.fixed or self.is_matmul(node)):
            kinds = self.code_kinds(node)
            if self.is_quantized(node):
                return kinds.pop()
            return "other" if kinds - KNOWN_KINDS else self.float_type(node.output[0]) or "fp32"
        if self.is_moving(node) or node.op_type in AVERAGE_POOLS:
            roots = [self.dequantizer(root) for name in self.moved_inputs(node) for root in self.roots(name)]
            kinds = {self.code_kind(root) for root in roots if root is not None}
            if None not in roots and len(kinds) == 1:
                return kinds.pop() if kinds <= KNOWN_KINDS else "other"
        return self.float_type(node.output[0]) or "other"


def fix_input_shapes(model: ModelProto, image_size: tuple[int, int] | None) -> None:
    """Set open dimensions of image inputs: batch 1, and the image size where it is known."""
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        for index, dim in enumerate(dims):
            if dim.HasField("dim_value") and dim.dim_value > 0:
                continue
            if index == 0:
                dim.dim_value = 1
            elif index >= 2 and len(dims) == 4 and image_size is not None:
                dim.dim_value = image_size[index - 2]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]


def _infer(model: ModelProto) -> tuple[dict[str, tuple[int | None, ...]], dict[str, int]]:
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise DeployError(f"The graph's shapes contradict each other: {error}") from error
    shapes: dict[str, tuple[int | None, ...]] = {}
    types: dict[str, int] = {}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        types[value.name] = value.type.tensor_type.elem_type
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes[value.name] = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)
    for tensor in graph.initializer:
        shapes[tensor.name], types[tensor.name] = tuple(tensor.dims), tensor.data_type
    return shapes, types


def format_scale(value: Array | float) -> str:
    """A scale for a message."""
    return f"{float(np.asarray(value).reshape(-1)[0]):.6g}"


def behind(view: View, quantize: NodeProto) -> list[NodeProto]:
    """Readers of the dequantized values of a Q."""
    pairs = [node for node in view.readers(quantize.output[0]) if node.op_type == "DequantizeLinear"]
    return [reader for dq in pairs for reader in view.readers(dq.output[0])]


def reached(view: View, tensor: str) -> list[NodeProto]:
    """All nodes after a tensor."""
    found: dict[int, NodeProto] = {}
    pending = [tensor]
    while pending:
        for node in view.readers(pending.pop()):
            if id(node) not in found:
                found[id(node)] = node
                pending.extend(node.output)
    return list(found.values())
