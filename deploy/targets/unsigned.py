"""INT8 activations as unsigned codes: the same grid, q + 128 instead of q.

CPU runtimes multiply unsigned activations with signed weights; ONNX Runtime has its fast kernels for that case only.
OpenVINO (2026.4) accepts signed activations, but on CPUs without AMX it rewrites them to unsigned ones and then
loses the zero point after a concat of a split tensor: gelan-t on BCCD falls from AP 0.597 to 0.449 while each conv
by itself is right. With the zero point written into the file both runtimes compute what torch computes.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto

from core.errors import DeployError
from deploy.graph.model import Graph
from deploy.graph.passes import GraphPass, PassRequest, PassResult

ZERO_POINT = 128


def passes(model: ModelProto, request: PassRequest) -> list[GraphPass]:
    """The passes of the target openvino."""
    return [unsigned_activations]


def unsigned_activations(graph: Graph) -> PassResult:
    """Give every Q/DQ of an activation uint8 codes with zero point 128 instead of int8 codes with zero point 0.

    Raises:
        DeployError: an activation has a zero point other than int8 0 or uint8, or its codes are read by other nodes.
    """
    edits = 0
    for node in graph.nodes:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.input[0] in graph.constants:
            continue
        zero_point = graph.constants.get(node.input[2]) if len(node.input) > 2 else np.zeros((), np.uint8)
        if zero_point is not None and zero_point.dtype == np.uint8:
            continue
        if zero_point is None or zero_point.dtype != np.int8 or np.any(zero_point):
            raise DeployError(
                f"'{node.name}' has the zero point {zero_point}; a symmetric int8 activation (0) is expected."
            )
        if node.op_type == "QuantizeLinear":
            readers = {reader.op_type for reader in graph.consumers.get(node.output[0], [])}
            if readers - {"DequantizeLinear"} or node.output[0] in graph.outputs:
                raise DeployError(
                    f"The codes of '{node.name}' are read by {sorted(readers)}; only DequantizeLinear may."
                )
        name = f"{node.input[2]}_unsigned"
        graph.constants[name] = np.full(zero_point.shape, ZERO_POINT, np.uint8)
        node.input[2] = name
        edits += 1
    graph.reindex()
    return PassResult(edits=edits)
