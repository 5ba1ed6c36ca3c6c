"""Checks of an ONNX file that may come from anybody, before anything works on it.

The readers of onnx and of the runtimes trust what a file says of itself. Here every tensor has to hold the numbers that
its shape declares, every pointer to other files has to stay inside the model's folder, every operator of ONNX's own has
to have the inputs, outputs and attributes that ONNX asks for, and functions must not stand for millions of operators.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from core.documents import shown
from core.errors import DeployError
from deploy.graph.known import STANDARD_DOMAINS, all_nodes

MAX_EXTERNAL_BYTES = 16 * 2**30
MAX_NODES = 100_000  # with functions expanded
MAX_DIMENSION = 2**31 - 1
MAX_OPSET = 1000
MAX_CALLS = 60  # functions that call functions
BITS: dict[int, int] = {
    TensorProto.UINT4: 4,
    TensorProto.INT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    TensorProto.COMPLEX64: 64,
    TensorProto.COMPLEX128: 128,
}
IN_INT32 = frozenset(
    {
        TensorProto.INT32, TensorProto.INT16, TensorProto.INT8, TensorProto.UINT16, TensorProto.UINT8, TensorProto.BOOL,
        TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FNUZ,
        TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E5M2FNUZ, TensorProto.UINT4, TensorProto.INT4, TensorProto.FLOAT4E2M1,
    }
)  # fmt: skip


def check_untrusted(model: ModelProto, path: Path) -> None:
    """Check everything that the module says.

    Raises:
        DeployError: the file is damaged, or made to harm; the message names the tensor or operator.
    """
    opset = _standard_opset(model)
    if not 0 <= opset <= MAX_OPSET:
        raise DeployError(
            f"{path} asks for operator set {opset}, expected 1 to {MAX_OPSET}; export it again."
        )
    for value in model.graph.input:
        _check_value(value, path)
    for tensor in iterate_tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            _check_external(tensor, path)
        else:
            _check_stored(tensor, path)
    _check_calls(model, path)
    if opset:
        for node in _nodes(model):
            if node.domain in STANDARD_DOMAINS:
                _check_node(node, opset, path)


def iterate_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor stored in a model: initializers and node attributes, of subgraphs and functions, too."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)
        for attribute in function.attribute_proto:
            yield from _attribute_tensors(attribute)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from _attribute_tensors(attribute)


def _attribute_tensors(attribute: AttributeProto) -> Iterator[TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    sparse = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
    for tensor in (*sparse, *attribute.sparse_tensors):
        yield tensor.values
        yield tensor.indices
    if attribute.HasField("g"):
        yield from _graph_tensors(attribute.g)
    for graph in attribute.graphs:
        yield from _graph_tensors(graph)


def _nodes(model: ModelProto) -> Iterator[NodeProto]:
    """Nodes of the graph and of the functions, with branches and loop bodies."""
    yield from all_nodes(model.graph)
    for function in model.functions:
        yield from all_nodes(GraphProto(node=function.node))


def _standard_opset(model: ModelProto) -> int:
    """Version of ONNX's own operators; 0 where the file names none."""
    return next((entry.version for entry in model.opset_import if entry.domain in STANDARD_DOMAINS), 0)


# ----------------------------------------------------------------------------------------------------------- tensors
def _check_value(value: ValueInfoProto, path: Path) -> None:
    kind = value.type.WhichOneof("value")
    if kind not in ("tensor_type", None):
        raise DeployError(f"{path}: input {shown(value.name)} is a {kind}, expected a tensor.")
    tensor = value.type.tensor_type
    if kind is not None:
        _bits(tensor.elem_type, f"{path}: input {shown(value.name)}")
    odd = [dim.dim_value for dim in tensor.shape.dim if not 0 <= dim.dim_value <= MAX_DIMENSION]
    if odd:
        raise DeployError(f"{path}: input {shown(value.name)} has a dimension of {odd[0]}; export it again.")


def _bits(data_type: int, what: str) -> int:
    """Bits of one element; raises DeployError for a type that ONNX does not have."""
    if data_type in BITS:
        return BITS[data_type]
    try:
        return int(helper.tensor_dtype_to_np_dtype(data_type).itemsize * 8)
    except (KeyError, ValueError, TypeError) as error:
        raise DeployError(f"{what} has the unknown data type {data_type}; export the model again.") from error


def _count(tensor: TensorProto, path: Path) -> tuple[int, int]:
    """Elements and bytes that a tensor declares."""
    bits = _bits(tensor.data_type, f"{path}: tensor {shown(tensor.name)}")
    if any(size < 0 for size in tensor.dims):
        raise DeployError(
            f"{path}: tensor {shown(tensor.name)} has the shape {list(tensor.dims)[:8]}; export the model again."
        )
    count = math.prod(tensor.dims)
    return count, -(-count * bits // 8)


def _check_stored(tensor: TensorProto, path: Path) -> None:
    """Refuse a tensor whose numbers are not in the file."""
    count, size = _count(tensor, path)
    if tensor.data_type == TensorProto.STRING:
        found, expected = len(tensor.string_data), count
    elif tensor.HasField("raw_data"):
        found, expected = len(tensor.raw_data), size
    elif tensor.data_type in IN_INT32:
        packed = BITS.get(tensor.data_type, 8) == 4
        found, expected = len(tensor.int32_data), -(-count // 2) if packed else count
    else:
        fields: dict[int, tuple[Any, int]] = {
            TensorProto.FLOAT: (tensor.float_data, 1), TensorProto.COMPLEX64: (tensor.float_data, 2),
            TensorProto.DOUBLE: (tensor.double_data, 1), TensorProto.COMPLEX128: (tensor.double_data, 2),
            TensorProto.INT64: (tensor.int64_data, 1), TensorProto.UINT64: (tensor.uint64_data, 1),
            TensorProto.UINT32: (tensor.uint64_data, 1),
        }  # fmt: skip
        values, times = fields.get(tensor.data_type, (tensor.int32_data, 1))
        found, expected = len(values), count * times
    if found != expected:
        raise DeployError(
            f"{path}: tensor {shown(tensor.name)} of shape {list(tensor.dims)[:8]} should have {expected} values or "
            f"bytes and has {found}; the file is damaged, copy or export it again."
        )


def _check_external(tensor: TensorProto, model_path: Path) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = model_path.parent.resolve()
    refused = DeployError(
        f"{model_path}: tensor {shown(tensor.name)} points to external data {shown(location)}, outside the model's "
        "folder. Refused: external data has to be in the folder of the model."
    )
    try:
        target = (folder / location).resolve()
        is_file = target.is_file()
    except (ValueError, OSError, RuntimeError) as error:  # a zero byte, a name too long, links in a circle
        raise refused from error
    if not location or Path(location).is_absolute() or not target.is_relative_to(folder) or target == folder:
        raise refused
    if not is_file:
        raise DeployError(
            f"{model_path}: tensor {shown(tensor.name)} needs {target}, which does not exist; copy it too."
        )
    try:
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", "0"))
    except ValueError as error:
        raise DeployError(
            f"{model_path}: tensor {shown(tensor.name)} has a malformed offset or length: {error}"
        ) from error
    size = target.stat().st_size
    _, expected = _count(tensor, model_path)
    if offset < 0 or length < 0 or offset + max(length, expected) > size or size > MAX_EXTERNAL_BYTES:
        raise DeployError(
            f"{model_path}: tensor {shown(tensor.name)} wants bytes {offset}..{offset + max(length, expected)} of "
            f"{target}, which has {size} (limit {MAX_EXTERNAL_BYTES}); the file is truncated or belongs to another "
            "model."
        )


# --------------------------------------------------------------------------------------------------------- operators
def _check_calls(model: ModelProto, path: Path) -> None:
    """Refuse functions that call themselves, or stand for more than `MAX_NODES` operators in all."""
    bodies = {(f.domain, f.name): [n for n in all_nodes(GraphProto(node=f.node))] for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size_of(nodes: Iterable[NodeProto], depth: int) -> int:
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type)
            if key in bodies and key not in sizes:
                if depth == MAX_CALLS:
                    raise DeployError(
                        f"{path}: the function {shown(node.op_type)} calls itself, or functions call each other in "
                        f"more than {MAX_CALLS} levels; export the model again."
                    )
                sizes[key] = size_of(bodies[key], depth + 1)
            total += sizes.get(key, 1)
        return total

    number = size_of(all_nodes(model.graph), 0)
    if number > MAX_NODES:
        raise DeployError(
            f"{path} has {number} operators with its functions written out; at most {MAX_NODES} are read."
        )


def _check_node(node: NodeProto, opset: int, path: Path) -> None:
    """Refuse an operator without the inputs, outputs and attributes that ONNX asks for; unknown ones pass."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return
    what = f"{path}: operator {shown(node.name or next(iter(node.output), ''))} ({node.op_type})"
    for kind, number, least, most in (
        ("inputs", len(node.input), schema.min_input, schema.max_input),
        ("outputs", len(node.output), schema.min_output, schema.max_output),
    ):
        if not least <= number <= most:
            raise DeployError(
                f"{what} has {number} {kind}, expected {least} to {most}; export the model again."
            )
    for name, formal in zip(node.input, schema.inputs, strict=False):
        if not name and formal.option == onnx.defs.OpSchema.FormalParameterOption.Single:
            raise DeployError(f"{what} lacks its input {formal.name}; export the model again.")
    if not any(node.output):
        raise DeployError(f"{what} has no output; export the model again.")
    given = {attribute.name: attribute for attribute in node.attribute}
    for name, wanted in schema.attributes.items():
        attribute = given.get(name)
        if attribute is None:
            if wanted.required:
                raise DeployError(f"{what} lacks its attribute {name}; export the model again.")
        elif not attribute.ref_attr_name and attribute.type != int(wanted.type):  # type: ignore[call-overload]
            raise DeployError(
                f"{what} has an attribute {name} of another type than ONNX asks for; export the model again."
            )
