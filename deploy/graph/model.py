"""Reading, indexing and writing ONNX graphs: used by every export pass and the graph check.

An ONNX file is untrusted data. Its tensors may point to other files ("external data"), and the readers inside
the runtimes follow such pointers. `load_onnx` and `verify_onnx` therefore look at every pointer first: it has
to stay inside the folder of the model, exist, and be long enough. `save_onnx` writes to the target's folder and
renames, so that a reader never sees half a file.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_model

from core.documents import DocumentError, read_limited
from core.errors import DeployError
from core.files import write_bytes
from core.image_size import ImageSize
from deploy.graph.known import inlined
from deploy.graph.untrusted import check_untrusted, iterate_tensors

MAX_ONNX_BYTES = 2**31 - 1  # protobuf's own limit for one message

Array = NDArray[np.generic]


# ---------------------------------------------------------------------------------------- reading and writing
def stored_metadata(model: ModelProto) -> dict[str, str]:
    """What the file says about itself, by key."""
    return {entry.key: entry.value for entry in model.metadata_props}


def stored_size(metadata: Mapping[str, str]) -> ImageSize | None:
    """The size that a file's metadata name as `octet.image_size`; None where they do not."""
    return ImageSize.parse(metadata.get("octet.image_size", ""))


def load_onnx(path: Path, max_bytes: int = MAX_ONNX_BYTES) -> ModelProto:
    """Read an ONNX file with its external data, after checking both; calls of functions are replaced by their bodies.

    Raises:
        DeployError: no such file, larger than `max_bytes`, not ONNX, or external data that leaves the model's
            folder.
    """
    model = _read_checked(path, max_bytes)
    load_external_data_for_model(model, str(path.parent))
    return sorted_model(inlined(model))


def verify_onnx(path: Path, max_bytes: int = MAX_ONNX_BYTES) -> None:
    """Check a file as `load_onnx` does, for runtimes that then read the path themselves."""
    _read_checked(path, max_bytes)


def save_onnx(model: ModelProto, path: Path) -> None:
    """Write a model atomically; raises DeployError where it does not fit in one protobuf message (2 GiB)."""
    size = model.ByteSize()
    if size > MAX_ONNX_BYTES:
        raise DeployError(
            f"The graph for {path} is {size} bytes; one ONNX file holds at most {MAX_ONNX_BYTES}. Export a "
            "smaller model."
        )
    write_bytes(path, model.SerializeToString())


def _read_checked(path: Path, max_bytes: int) -> ModelProto:
    if not path.is_file():
        raise DeployError(f"No ONNX file at {path}; export one first (python export.py run=... target=...).")
    model = ModelProto()
    try:
        model.ParseFromString(read_limited(path, max_bytes))
    except DocumentError as error:
        raise DeployError(f"{path} is not read: {error}. Raise max_bytes if you trust it.") from error
    except DecodeError as error:
        raise DeployError(f"{path} is not an ONNX file ({error}); export it again.") from error
    if not model.graph.node and not model.graph.initializer:
        raise DeployError(f"{path} holds an empty ONNX graph; export it again.")
    check_untrusted(model, path)
    return model


def sorted_model(model: ModelProto) -> ModelProto:
    """The model with its nodes in topological order, in place; raises DeployError on a cycle.

    ONNX requires this order. Without it the time of shape inference is quadratic in the number of nodes.
    """
    made = {name for node in model.graph.node for name in node.output if name}
    seen: set[str] = set()
    for node in model.graph.node:
        if any(name in made and name not in seen for name in tensor_inputs(node)):
            nodes = [NodeProto.FromString(n.SerializeToString()) for n in sort_nodes(model.graph.node)]
            del model.graph.node[:]
            model.graph.node.extend(nodes)
            break
        seen.update(node.output)
    return model


def graph_inputs(model: ModelProto) -> list[ValueInfoProto]:
    """What has to be given to a graph: its inputs without those that are stored in the file as well."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in stored]


def external_files(path: Path) -> list[Path]:
    """The files beside an ONNX file that hold tensors of it.

    Raises:
        DeployError: it cannot be read.
    """
    tensors = iterate_tensors(_read_checked(path, MAX_ONNX_BYTES))
    entries = [entry for t in tensors if t.data_location == TensorProto.EXTERNAL for entry in t.external_data]
    return [
        path.parent / name for name in sorted({entry.value for entry in entries if entry.key == "location"})
    ]


# --------------------------------------------------------------------------------------------------- indexing
class Graph:
    """The main graph of a model with look-ups by tensor name; edits keep the look-ups in step.

    Attributes:
        model: the ModelProto that is edited in place by `commit`.
        nodes: the nodes in topological order.
        constants: initializers and the values of Constant nodes, as arrays, by tensor name.
        inputs, outputs: names of the graph's inputs and outputs (initializers that are also inputs left out).
    """

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, Array] = {}
        for initializer in model.graph.initializer:
            self.constants[initializer.name] = numpy_helper.to_array(initializer)
        for node in model.graph.node:
            value = constant_value(node)
            if value is None:
                self.nodes.append(node)
            else:
                self.constants[node.output[0]] = value
        self.inputs = [value.name for value in model.graph.input if value.name not in self.constants]
        self.outputs = [value.name for value in model.graph.output]
        self.reindex()

    def reindex(self) -> None:
        """Build the look-ups anew after inputs of nodes were edited directly."""
        self.producers: dict[str, NodeProto] = {}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            self._index(node)

    def _index(self, node: NodeProto) -> None:
        self.producers.update((name, node) for name in node.output if name)
        for name in dict.fromkeys(tensor_inputs(node)):
            self.consumers.setdefault(name, []).append(node)

    def rewire(self, old: str, new: str) -> None:
        """Let every consumer of tensor `old` read `new`; a graph output named `old` is not touched."""
        for node in self.consumers.pop(old, []):
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new
            readers = self.consumers.setdefault(new, [])
            if not any(reader is node for reader in readers):
                readers.append(node)

    def remove(self, nodes: Iterable[NodeProto]) -> None:
        """Take nodes out of the graph."""
        gone = {id(node) for node in nodes}
        if gone:
            self.nodes = [node for node in self.nodes if id(node) not in gone]
            self.reindex()

    def insert(self, nodes: Iterable[NodeProto]) -> None:
        """Add nodes anywhere; `commit` sorts them."""
        for node in nodes:
            self.nodes.append(node)
            self._index(node)

    def unique(self, wanted: str) -> str:
        """A tensor or node name that is not in use yet, as close to `wanted` as possible."""
        taken = (
            set(self.constants) | set(self.producers) | set(self.inputs) | {node.name for node in self.nodes}
        )
        name, number = wanted, 1
        while name in taken:
            name, number = f"{wanted}_{number}", number + 1
        return name

    def prune(self) -> int:
        """Drop nodes whose results nobody reads; returns how many."""
        needed, keep = set(self.outputs), []
        for node in reversed(sort_nodes(self.nodes)):
            if any(name in needed for name in node.output):
                needed.update(tensor_inputs(node))
                keep.append(node)
        dropped = len(self.nodes) - len(keep)
        self.nodes = keep[::-1]
        self.reindex()
        return dropped

    def commit(self) -> ModelProto:
        """Write the edits back: sorted nodes, the constants in use as initializers; returns the model."""
        self.nodes = sort_nodes(self.nodes)
        used = {name for node in self.nodes for name in tensor_inputs(node)} | set(self.outputs)
        graph = self.model.graph
        nodes = [NodeProto.FromString(node.SerializeToString()) for node in self.nodes]
        del graph.node[:]
        graph.node.extend(nodes)
        del graph.initializer[:]
        graph.initializer.extend(
            numpy_helper.from_array(np.asarray(value), name)
            for name, value in self.constants.items()
            if name in used
        )
        # inferred types of tensors go stale with edits: shape inference writes them again where they are
        # needed
        del graph.value_info[:]
        self.constants = {name: value for name, value in self.constants.items() if name in used}
        self.nodes = list(graph.node)
        self.reindex()
        return self.model


def constant_value(node: NodeProto) -> Array | None:
    """Value of a Constant node, None for any other node and for the string and sparse forms."""
    if node.op_type != "Constant":
        return None
    for attribute in node.attribute:
        match attribute.name:
            case "value":
                return numpy_helper.to_array(attribute.t)
            case "value_float":
                return np.asarray(attribute.f, np.float32)
            case "value_floats":
                return np.asarray(attribute.floats, np.float32)
            case "value_int":
                return np.asarray(attribute.i, np.int64)
            case "value_ints":
                return np.asarray(attribute.ints, np.int64)
    return None


def tensor_inputs(node: NodeProto) -> list[str]:
    """Names a node reads, also inside its subgraphs, without the empty names of left-out inputs."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            for inner in graph.node:
                names.extend(tensor_inputs(inner))
    return names


def sort_nodes(nodes: Iterable[NodeProto]) -> list[NodeProto]:
    """Nodes in topological order, otherwise in the given order; raises DeployError on a cycle."""
    pending = list(nodes)
    makers = {name: index for index, node in enumerate(pending) for name in node.output if name}
    sources = [{makers[name] for name in tensor_inputs(node) if name in makers} for node in pending]
    readers: dict[int, list[int]] = {}
    for index, found in enumerate(sources):
        for source in found:
            readers.setdefault(source, []).append(index)
    missing = [len(found) for found in sources]
    ready = [
        index for index, count in enumerate(missing) if not count
    ]  # a heap: the earliest node comes first
    ordered: list[NodeProto] = []
    while ready:
        index = heapq.heappop(ready)
        ordered.append(pending[index])
        for reader in readers.get(index, ()):
            missing[reader] -= 1
            if not missing[reader]:
                heapq.heappush(ready, reader)
    if len(ordered) < len(pending):
        node = next(node for node, count in zip(pending, missing, strict=True) if count)
        raise DeployError(f"The graph has a cycle through node '{node.name}' ({node.op_type}).")
    return ordered


def attributes(node: NodeProto) -> dict[str, object]:
    """A node's attributes as plain Python values."""
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def tensor_shapes(model: ModelProto) -> Mapping[str, tuple[int | None, ...]]:
    """Shape of every tensor that shape inference finds; None for a dimension known only at run time."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shapes: dict[str, tuple[int | None, ...]] = {}
    graph = inferred.graph
    for value in [*graph.input, *graph.value_info, *graph.output]:
        if value.type.tensor_type.HasField("shape"):
            shapes[value.name] = tuple(
                dim.dim_value if dim.HasField("dim_value") else None
                for dim in value.type.tensor_type.shape.dim
            )
    for initializer in graph.initializer:
        shapes[initializer.name] = tuple(initializer.dims)
    return shapes


def opset_of(model: ModelProto) -> int:
    """Version of the standard ONNX operator set the model asks for."""
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            return entry.version
    raise DeployError("The model names no standard operator set; it is not a usable ONNX file.")
