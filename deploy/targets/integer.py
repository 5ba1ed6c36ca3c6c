"""The graph ONNX Runtime runs in integers: a Q on the output of every operator around quantized convs.

ONNX Runtime fuses DQ -> operator -> Q groups into integer kernels. A TensorRT-style graph has no Q between a conv
and its activation, so its convs would run in float there, slower than without quantization. This pass adds what is
missing:

1. concat, split, pooling, resize: Q/DQ of the same scale on the result, exact because their inputs lie on that grid;
2. conv -> ReLU: the conv rounds to the ReLU's own grid and the ReLU becomes a clip of the codes (nothing at all where
   that grid starts at 0), exact as well;
3. conv -> SiLU: the conv's result x gets 8 bits of its own, the sigmoid 1/256 steps, so that conv, sigmoid and
   product are integer kernels. This is one rounding more than torch saw. The range of x comes from images where they
   are given.
4. the conv branch of a residual sum, with or without activation: the grid of the sum;
5. conv -> activation before a layer that stays float (the last hidden ones of a head), or conv without activation
   before a float operator (the queries and keys of float attention): the conv's result gets 8 bits, what follows
   is float. Only where images give the range; without them these convs run in float.

Average-pools then become depthwise convolutions, see `deploy.targets.pooling`.

Steps 3 and 5 change results by a rounding; the export's report says by how much, against the graph without this pass.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from core.operators import OPERATORS, RESIZE, Kind
from deploy.graph.model import Graph
from deploy.graph.passes import GraphPass, PassRequest, PassResult
from deploy.targets.pooling import depthwise_averages
from deploy.targets.typed import tail_nodes
from deploy.targets.unsigned import unsigned_activations

TRANSPARENT = frozenset((*OPERATORS[Kind.TRANSPARENT].onnx, *OPERATORS[Kind.CONCAT].onnx, *RESIZE.onnx))
NUM_BINS = 1024
NUM_CANDIDATES = 20

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Histogram:
    """Where the values of a tensor lie: counts [bins] between low and high."""

    low: float
    high: float
    counts: Floats

    @property
    def centres(self) -> Floats:
        """Middle of each bin."""
        edges = np.linspace(self.low, self.high, len(self.counts) + 1)
        return (edges[:-1] + edges[1:]) / 2


@dataclass(frozen=True)
class Grid:
    """An unsigned 8-bit grid: value = scale * (code - zero_point)."""

    scale: float
    zero_point: int

    def round(self, values: Floats) -> Floats:
        """Values rounded to the grid."""
        codes = np.clip(np.rint(values / self.scale) + self.zero_point, 0, 255)
        return (codes - self.zero_point) * self.scale


SIGMOID_GRID = Grid(1 / 256, 0)


def passes(model: ModelProto, request: PassRequest) -> Iterator[GraphPass]:
    """The passes of onnxruntime: unsigned codes, `integer_operators` with ranges seen on the images, then pools."""
    yield unsigned_activations
    recorded = request.record(model, preactivations(Graph(model)), request.images) if request.images else {}
    yield integer_operators({name: Histogram(*parts) for name, parts in recorded.items()})
    yield depthwise_averages(model)


def integer_operators(histograms: Mapping[str, Histogram] | None = None) -> GraphPass:
    """Make the pass; `histograms` holds the values of conv outputs by tensor name, see `preactivations`."""
    known = histograms or {}

    def integer_operators(graph: Graph) -> PassResult:
        editor = _Editor(graph)
        editor.carry_scales()
        tail = tail_nodes(graph)
        for conv in [node for node in graph.nodes if is_quantized_conv(graph, node)]:
            activation = _activation_of(graph, conv, tail)
            if activation is None:
                continue
            grid = editor.result_grid(activation)
            if grid is None:
                if conv.output[0] in known:
                    editor.quantize_result(conv, activation, known[conv.output[0]])
                continue
            if activation.sigmoid is not None:
                histogram = known.get(conv.output[0]) or assumed_histogram(grid.scale)
                editor.quantize(conv.output[0], choose_grid(histogram, grid.scale))
                editor.quantize(activation.sigmoid, SIGMOID_GRID)
            elif activation.result != conv.output[0]:
                editor.clip_codes(conv.output[0], activation.result, grid)
            editor.quantize_unless_quantized(activation.result, grid)
        editor.carry_scales()
        return PassResult(editor.added, editor.added, editor.added)

    return integer_operators


def preactivations(graph: Graph) -> list[str]:
    """Names of the conv outputs whose histograms this pass asks for: those before a SiLU, or with a float reader."""
    editor = _Editor(graph)
    tail = tail_nodes(graph)
    names = []
    for node in graph.nodes:
        if node.op_type != "Conv" or not all(_is_behind_quantizers(graph, name) for name in node.input[:2]):
            continue
        activation = _activation_of(graph, node, tail)
        if activation is None:
            continue
        if activation.sigmoid is not None or editor.result_grid(activation) is None:
            names.append(node.output[0])
    return names


def is_quantized_conv(graph: Graph, node: NodeProto) -> bool:
    """Whether both the data and the weight of a conv come from a DQ."""
    return node.op_type == "Conv" and all(_is_dequantized(graph, name) for name in node.input[:2])


def _is_behind_quantizers(graph: Graph, tensor: str) -> bool:
    """Whether a tensor comes from a DQ, directly or through operators that only move values."""
    producer = graph.producers.get(tensor)
    if producer is None or producer.op_type not in TRANSPARENT:
        return _is_dequantized(graph, tensor)
    data = producer.input if producer.op_type == "Concat" else producer.input[:1]
    return all(_is_behind_quantizers(graph, name) for name in data)


def _is_dequantized(graph: Graph, tensor: str) -> bool:
    producer = graph.producers.get(tensor)
    return producer is not None and producer.op_type == "DequantizeLinear"


# ----------------------------------------------------------------------------------------------------- activations
@dataclass(frozen=True)
class _Activation:
    result: str  # the conv's own result where there is no activation
    sigmoid: str | None  # output of the Sigmoid for a SiLU, else None
    is_read_in_float: bool = False  # without activation: some operator but a sum reads the result in float


def _activation_of(graph: Graph, conv: NodeProto, tail: Container[int]) -> _Activation | None:
    """The activation after a conv; None for one that this pass does not know, and for convs at the outputs."""
    readers = graph.consumers.get(conv.output[0], [])
    kinds = sorted(reader.op_type for reader in readers)
    if kinds == ["Relu"]:
        return _Activation(readers[0].output[0], None)
    if kinds == ["Mul", "Sigmoid"]:
        product, sigmoid = sorted(readers, key=lambda reader: reader.op_type)
        if set(product.input) == {conv.output[0], sigmoid.output[0]} and graph.consumers[
            sigmoid.output[0]
        ] == [product]:
            return _Activation(product.output[0], sigmoid.output[0])
    if conv.output[0] in graph.outputs or any(id(reader) in tail for reader in readers):
        return None
    if kinds == ["Add"]:
        return _Activation(conv.output[0], None)
    if kinds and set(kinds) <= TRANSPARENT:
        return _Activation(conv.output[0], None, _is_read_in_float(graph, conv.output[0]))
    return None


def _is_read_in_float(graph: Graph, tensor: str) -> bool:
    """Whether an operator after a tensor, moving ones aside, is not a Q."""
    for node in graph.consumers.get(tensor, []):
        if node.op_type in TRANSPARENT:
            if any(_is_read_in_float(graph, result) for result in node.output):
                return True
        elif node.op_type != "QuantizeLinear":
            return True
    return False


def silu(values: Floats) -> Floats:
    """X * sigmoid(x)."""
    return values / (1 + np.exp(-values))


def assumed_histogram(result_scale: float) -> Histogram:
    """Values before a SiLU whose result has the grid `result_scale`, without data: normal, three sigma at its end."""
    sigma = 127 * result_scale / 3
    low, high = -4 * sigma, 127 * result_scale + 0.3
    centres = np.linspace(low, high, NUM_BINS)
    return Histogram(low, high, np.exp(-0.5 * (centres / sigma) ** 2))


def choose_grid(histogram: Histogram, result_scale: float = np.inf) -> Grid:
    """The grid for x that changes silu(x) least in the mean square, below the end of the result's own grid, if any."""
    x, weight = histogram.centres, histogram.counts
    end = 127 * result_scale
    wanted = np.minimum(silu(x), end)
    used = weight > 0
    x, weight, wanted = x[used], weight[used], wanted[used]
    low_end, high_end = min(float(x[0]), -0.05), max(min(float(x[-1]), end + 0.3), 0.05)
    best, best_error = Grid((high_end - low_end) / 255, 0), np.inf
    for low in np.geomspace(0.02, 1, NUM_CANDIDATES) * low_end:
        for high in np.linspace(0.3, 1, NUM_CANDIDATES) * high_end:
            scale = (high - low) / 255
            grid = Grid(float(scale), int(np.clip(np.rint(-low / scale), 0, 255)))
            error = float(weight @ (np.minimum(silu(grid.round(x)), end) - wanted) ** 2)
            if error < best_error:
                best, best_error = grid, error
    return best


def choose_positive_grid(histogram: Histogram) -> Grid:
    """The grid from 0 on that changes relu(x) least in the mean square."""
    wanted = np.maximum(histogram.centres, 0)
    ends = np.geomspace(0.02, 1, NUM_CANDIDATES**2) * max(histogram.high, 1e-3)
    errors = [histogram.counts @ (Grid(end / 255, 0).round(wanted) - wanted) ** 2 for end in ends]
    return Grid(float(ends[int(np.argmin(errors))]) / 255, 0)


def choose_signed_grid(histogram: Histogram) -> Grid:
    """The grid on both sides of zero that changes x least in the mean square."""
    x, weight = histogram.centres, histogram.counts
    end = max(abs(histogram.low), abs(histogram.high), 1e-3)
    grids = [Grid(float(high) / 127, 128) for high in np.geomspace(0.02, 1, NUM_CANDIDATES**2) * end]
    return min(grids, key=lambda grid: float(weight @ (grid.round(x) - x) ** 2))


# ------------------------------------------------------------------------------------------------------------ edits
class _Editor:
    """Adds Q/DQ pairs to a graph and counts them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.added = 0

    def carry_scales(self) -> None:
        """Step 1, in topological order, so that a chain of moving operators is carried along."""
        for node in list(self.graph.nodes):
            if node.op_type not in TRANSPARENT:
                continue
            data = node.input if node.op_type == "Concat" else node.input[:1]
            grids = {self._grid_of(name) for name in data}
            if len(grids) != 1:
                continue  # scales not shared: the operator stays in float
            (grid,) = grids
            if grid is not None:
                for result in node.output:
                    self.quantize_unless_quantized(result, grid)

    def result_grid(self, activation: _Activation) -> Grid | None:
        """The one grid that a result is quantized to, after moving operators or the sum it enters; or None."""
        if activation.is_read_in_float:
            return None
        tensor = activation.result
        grids = self._grids_behind(tensor)
        readers = self.graph.consumers.get(tensor, [])
        if not grids and len(readers) == 1 and readers[0].op_type == "Add":
            grids = self._grids_behind(readers[0].output[0])
        return grids.pop() if len(grids) == 1 else None

    def _grids_behind(self, tensor: str) -> set[Grid]:
        grids: set[Grid] = set()
        for node in self.graph.consumers.get(tensor, []):
            if node.op_type == "QuantizeLinear":
                scale, zero_point = (self.graph.constants[name] for name in node.input[1:3])
                grids.add(Grid(float(scale.item()), int(zero_point.item())))
            elif node.op_type in TRANSPARENT:
                for result in node.output:
                    grids |= self._grids_behind(result)
        return grids

    def quantize_result(self, conv: NodeProto, activation: _Activation, histogram: Histogram) -> None:
        """Step 5."""
        if activation.sigmoid is not None:
            self.quantize(conv.output[0], choose_grid(histogram))
        elif activation.result == conv.output[0]:
            self.quantize(conv.output[0], choose_signed_grid(histogram))
        else:
            self.clip_codes(conv.output[0], activation.result, choose_positive_grid(histogram))

    def quantize(self, tensor: str, grid: Grid) -> None:
        """Let every reader of `tensor` read it through Q/DQ of `grid`."""
        graph = self.graph
        scale, zero_point = graph.unique(f"{tensor}_step"), graph.unique(f"{tensor}_zero")
        graph.constants[scale] = np.asarray(grid.scale, np.float32)
        graph.constants[zero_point] = np.asarray(grid.zero_point, np.uint8)
        codes, values = graph.unique(f"{tensor}_codes"), graph.unique(f"{tensor}_values")
        graph.rewire(tensor, values)
        graph.insert(
            [
                helper.make_node(
                    "QuantizeLinear", [tensor, scale, zero_point], [codes], f"{tensor}/Quantize"
                ),
                helper.make_node(
                    "DequantizeLinear", [codes, scale, zero_point], [values], f"{tensor}/Dequantize"
                ),
            ]
        )
        self.added += 1

    def quantize_unless_quantized(self, tensor: str, grid: Grid) -> None:
        """Add Q/DQ where some reader is not a Q and the tensor is not a graph output."""
        readers = self.graph.consumers.get(tensor, [])
        if tensor not in self.graph.outputs and any(node.op_type != "QuantizeLinear" for node in readers):
            self.quantize(tensor, grid)

    def clip_codes(self, tensor: str, result: str, grid: Grid) -> None:
        """Step 2: conv -> Q -> Clip(codes, zero point, 255) -> DQ instead of conv -> ReLU; `result` keeps its name."""
        graph = self.graph
        relu = graph.producers[result]
        step, zero, codes, clipped = (
            graph.unique(f"{tensor}_{part}") for part in ("step", "zero", "codes", "clipped")
        )
        graph.constants[step] = np.asarray(grid.scale, np.float32)
        graph.constants[zero] = np.asarray(grid.zero_point, np.uint8)
        graph.remove([relu])
        clip = (
            [helper.make_node("Clip", [codes, zero], [clipped], f"{tensor}/Clip")] if grid.zero_point else []
        )
        kept = clipped if clip else codes
        graph.insert(
            [
                helper.make_node("QuantizeLinear", [tensor, step, zero], [codes], f"{tensor}/Quantize"),
                *clip,
                helper.make_node("DequantizeLinear", [kept, step, zero], [result], f"{tensor}/Dequantize"),
            ]
        )
        self.added += 1

    def _grid_of(self, tensor: str) -> Grid | None:
        producer = self.graph.producers.get(tensor)
        if producer is None or producer.op_type != "DequantizeLinear" or len(producer.input) < 3:
            return None
        scale, zero_point = (self.graph.constants.get(name) for name in producer.input[1:3])
        if scale is None or zero_point is None or scale.size != 1 or zero_point.dtype != np.uint8:
            return None
        return Grid(float(scale.item()), int(zero_point.item()))
