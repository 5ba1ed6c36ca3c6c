"""Average-pools of codes as depthwise convolutions, for ONNX Runtime.

ONNX Runtime's integer average-pool converts to float and back; its integer depthwise convolution does not, and takes a
fraction of the time. The mean of n codes is a convolution with codes 1 and scale 1/n. Where n is a power of two the
scale is exact, so both round the same quotient, and the results are equal.
"""

from __future__ import annotations

from math import prod

import numpy as np
from onnx import ModelProto, NodeProto, helper

from deploy.graph.model import Graph, tensor_shapes
from deploy.graph.passes import GraphPass, PassResult

KEPT = ("kernel_shape", "strides", "pads", "dilations")  # what both operators have


def depthwise_averages(model: ModelProto) -> GraphPass:
    """Make the pass; `model` gives the channels of the pools."""
    shapes = tensor_shapes(model)

    def depthwise_averages(graph: Graph) -> PassResult:
        count = 0
        for pool in [node for node in graph.nodes if node.op_type == "AveragePool"]:
            shape = shapes.get(pool.output[0], ())
            channels = shape[1] if len(shape) == 4 else None
            if channels is None or not _is_between_quantizers(graph, pool) or not _has_power_of_two(pool):
                continue
            graph.remove([pool])
            graph.insert(_convolution(graph, pool, channels))
            count += 1
        return PassResult(0, count, count)

    return depthwise_averages


def _is_between_quantizers(graph: Graph, pool: NodeProto) -> bool:
    producer, readers = graph.producers.get(pool.input[0]), graph.consumers.get(pool.output[0], [])
    is_read = bool(readers) and pool.output[0] not in graph.outputs
    return (
        is_read
        and producer is not None
        and producer.op_type == "DequantizeLinear"
        and all(reader.op_type == "QuantizeLinear" for reader in readers)
    )


def _has_power_of_two(pool: NodeProto) -> bool:
    """Whether every mean is that of n values, padding included, and n is a power of two."""
    given = {attribute.name: attribute for attribute in pool.attribute}
    area = prod(given["kernel_shape"].ints)
    is_padded = "pads" in given and any(given["pads"].ints)
    counts_padding = "count_include_pad" in given and given["count_include_pad"].i == 1
    is_plain = "auto_pad" not in given and not ("ceil_mode" in given and given["ceil_mode"].i)
    return is_plain and (counts_padding or not is_padded) and area & (area - 1) == 0


def _convolution(graph: Graph, pool: NodeProto, channels: int) -> list[NodeProto]:
    kernel = next(attribute for attribute in pool.attribute if attribute.name == "kernel_shape").ints
    codes, scale, zero, weight = (
        graph.unique(f"{pool.name}.{part}") for part in ("codes", "scale", "zero", "weight")
    )
    graph.constants[codes] = np.ones((channels, 1, *kernel), np.int8)
    graph.constants[scale] = np.asarray(1 / prod(kernel), np.float32)
    graph.constants[zero] = np.asarray(0, np.int8)
    conv = helper.make_node("Conv", [pool.input[0], weight], [pool.output[0]], pool.name, group=channels)
    conv.attribute.extend(attribute for attribute in pool.attribute if attribute.name in KEPT)
    make_weight = helper.make_node(
        "DequantizeLinear", [codes, scale, zero], [weight], f"{pool.name}/Dequantize"
    )
    return [make_weight, conv]
