"""The pass that only OpenVINO needs: concats of quantized tensors without a zero point.

Why it exists: on CPUs without AMX, OpenVINO runs INT8 convolutions on unsigned data and carries the sign as a zero
point of 128. It spreads that zero point over the channels of a concat, and the convolution behind the concat
then loses it: OpenVINO 2026.4.1 on AVX-512 VNNI gives boxes that are off by tens of pixels, without a word. (The
`engine` stage's comparison with torch is what found it.) A zero point on one tensor is handled well.

So around concats the zero point is taken out of the quantizers and put back behind the concat, where it is one
scalar again. With scale s, code q in [-128, 127] and u = q + 128 in [0, 255]:

    before   Q -> DQ = s q ------------------------> Concat ----------------> Conv
    after    Q -> DQ = s u = s q + 128 s ----------> Concat --- minus 128 s -> Conv

Values, grid and clipping stay what they were; the subtraction becomes the convolution's scalar zero point again
and costs nothing at run time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto, helper

from deploy.graph import Graph
from deploy.passes import PassResult

CARRIERS = frozenset(("Concat", "MaxPool", "Reshape", "Resize", "Slice", "Split", "Transpose"))
OFFSET = 128


@dataclass
class Region:
    """Tensors that quantized values reach through operations which only move or select them."""

    tensors: list[str] = field(default_factory=list)
    quantizers: list[tuple[NodeProto, NodeProto]] = field(default_factory=list)  # (Q, DQ)
    concats: list[NodeProto] = field(default_factory=list)


def shift_concats(graph: Graph) -> PassResult:
    """Take the zero point out of every region that holds a concat, and subtract it where the region ends."""
    edits = 0
    for region in find_regions(graph):
        scale = _common_scale(graph, region)
        if scale is not None:
            edits += _shift(graph, region, scale)
    graph.reindex()
    return PassResult(edits=edits)


def find_regions(graph: Graph) -> list[Region]:
    """Regions around concats: connected sets of quantized tensors, concats and carriers, in graph order."""
    regions: dict[str, Region] = {}
    for dequantize in list(graph.nodes):
        quantize = (
            graph.producers.get(dequantize.input[0]) if dequantize.op_type == "DequantizeLinear" else None
        )
        if quantize is None or quantize.op_type != "QuantizeLinear":
            continue
        region = Region([], [(quantize, dequantize)], [])
        _spread(graph, dequantize.output[0], region, regions)
    distinct = list({id(region): region for region in regions.values()}.values())
    return [region for region in distinct if region.concats]


def _spread(graph: Graph, start: str, region: Region, regions: dict[str, Region]) -> None:
    """Follow a tensor through its carriers into `region`, taking in every region met on the way."""
    pending = [start]
    while pending:
        tensor = pending.pop()
        met = regions.get(tensor)
        if met is region:
            continue
        if met is not None:
            region.tensors += met.tensors
            region.quantizers += met.quantizers
            region.concats += [
                node for node in met.concats if all(node is not known for known in region.concats)
            ]
            regions.update(dict.fromkeys(met.tensors, region))
            continue
        regions[tensor] = region
        region.tensors.append(tensor)
        for node in graph.consumers.get(tensor, []):
            if not _carries(node, tensor):
                continue
            if node.op_type == "Concat" and all(node is not known for known in region.concats):
                region.concats.append(node)
            pending += [name for name in node.output if name]


def _carries(node: NodeProto, tensor: str) -> bool:
    return node.op_type == "Concat" or (node.op_type in CARRIERS and node.input[0] == tensor)


def _common_scale(graph: Graph, region: Region) -> float | None:
    """The scale of all signed per-tensor quantizers of a region; None where the pass does not apply."""
    inside = set(region.tensors)
    if any(name not in inside for concat in region.concats for name in concat.input):
        return None  # a float tensor enters a concat
    if any(name in graph.outputs for name in region.tensors):
        return None
    scales = set()
    for quantize, dequantize in region.quantizers:
        if len(graph.consumers.get(quantize.output[0], [])) != 1 or len(dequantize.input) < 3:
            return None
        for node in (quantize, dequantize):
            scale, zero = graph.constants.get(node.input[1]), graph.constants.get(node.input[2])
            if scale is None or zero is None or scale.size != 1 or zero.dtype != np.int8 or zero.any():
                return None
            scales.add(float(scale.reshape(())))
    return scales.pop() if len(scales) == 1 else None


def _shift(graph: Graph, region: Region, scale: float) -> int:
    """Rewrite one region; returns the number of quantizers and subtractions touched."""
    upper = graph.unique("unsigned_offset")
    graph.constants[upper] = np.asarray(OFFSET, np.uint8)
    zero = graph.unique("unsigned_zero")
    graph.constants[zero] = np.asarray(0, np.uint8)
    for quantize, dequantize in region.quantizers:
        quantize.input[2] = upper
        dequantize.input[2] = zero
    offset = graph.unique("concat_offset")
    graph.constants[offset] = np.asarray(OFFSET * scale, np.float32)
    subtractions = []
    for tensor in region.tensors:
        leaving = [node for node in graph.consumers.get(tensor, []) if not _carries(node, tensor)]
        if not leaving:
            continue
        centred = graph.unique(f"{tensor}_centred")
        for node in leaving:
            for index, name in enumerate(node.input):
                if name == tensor:
                    node.input[index] = centred
        subtractions.append(helper.make_node("Sub", [tensor, offset], [centred], name=centred))
    graph.insert(subtractions)
    return len(region.quantizers) + len(subtractions)
