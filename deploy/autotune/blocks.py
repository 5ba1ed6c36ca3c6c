"""Blocks: a weighted layer and what follows it up to the next one, and the units whose precision they depend on.

Which kernels a layer becomes depends on whether its input is quantized and on whether its result is: an INT8
convolution leaves bias, activation and quantization to a second kernel, a float one before a quantizer is not
fused with its activation, and so on. So costs are kept by block and by the precisions of all units that touch it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from onnx import ModelProto, NodeProto

from deploy.graph.view import View
from deploy.naming import module_path

INPUT = "input"  # block of what comes before the first layer


@dataclass(frozen=True)
class Blocks:
    """Blocks of a network in graph order.

    Attributes:
        units: block -> units whose tensors it reads or writes quantized.
        owners: node name or module path -> block.
        dequantizers: names of DQ nodes, which belong to no block: their readers do.
    """

    units: Mapping[str, tuple[str, ...]]
    owners: Mapping[str, str]
    dequantizers: frozenset[str]

    def of_kernel(self, nodes: Sequence[str]) -> str:
        """Block of a kernel made of some ONNX nodes: the last one, since a kernel ends a block or joins two."""
        order = list(self.units)
        names = [name for name in nodes if name not in self.dequantizers] or nodes
        found = [owner for name in names if (owner := self._owner(name)) is not None]
        return max(found, key=order.index, default=INPUT)

    def of_layers(self, names: Iterable[str]) -> list[str]:
        """Blocks of a runtime's layers in the order they run.

        Runtimes add to the names of the nodes that a layer comes from (`conv/WithoutBiases`, `a_f32_u8_b` for a reorder
        between a and b) and join them (`conv + act`): the longest known beginning of each part counts, and the last of
        several blocks. A layer without any goes with the one before.
        """
        blocks, last = [], INPUT
        for name in names:
            parts = [
                found for part in re.split(r" \+ |[(),]", name) if (found := self._known_beginning(part))
            ]
            last = self.of_kernel(parts) if parts else last
            blocks.append(last)
        return blocks

    def _known_beginning(self, name: str) -> str:
        while name and self._owner(name) is None:
            name = re.sub(r"[/_]?[^/_]*$", "", name)
        return name

    def _owner(self, name: str) -> str | None:
        return self.owners.get(name) or self.owners.get(module_path(name))


def find_blocks(model: ModelProto, units: Mapping[str, str]) -> Blocks:
    """Find the blocks of an exported graph in which every unit is quantized.

    Args:
        model: a graph with nodes named by module path (`deploy.naming`).
        units: name of a quantized tensor -> its unit.
    """
    view = View(model)
    weighted = {id(node) for node in view.weighted()}
    touched: dict[str, dict[str, None]] = {INPUT: {}}
    owners: dict[str, str] = {}
    dequantizers = set()
    made_by: dict[str, str] = {}  # tensor -> block
    for node in view.graph.nodes:
        if node.output[0] in view.fixed:
            continue
        path = module_path(node.name)
        block = path if id(node) in weighted else _latest(node, made_by, list(touched))
        touched.setdefault(block, {})
        made_by.update(dict.fromkeys(node.output, block))
        if node.op_type == "DequantizeLinear":
            dequantizers.add(node.name)
            continue
        owners[node.name] = block
        owners.setdefault(path, block)
        quantizers = [node] if node.op_type == "QuantizeLinear" else _read_quantized(view, node)
        touched[block].update(
            dict.fromkeys(units[name] for q in quantizers if (name := module_path(q.name)) in units)
        )
    return Blocks({block: tuple(found) for block, found in touched.items()}, owners, frozenset(dequantizers))


def _latest(node: NodeProto, made_by: Mapping[str, str], order: list[str]) -> str:
    """The last of the blocks that a node reads from."""
    return max((made_by[name] for name in node.input if name in made_by), key=order.index, default=INPUT)


def _read_quantized(view: View, node: NodeProto) -> list[NodeProto]:
    """The DQs that the data of a node comes from, through operators that only move values."""
    roots = [root for name in node.input if name not in view.fixed for root in view.roots(name)]
    return [found for root in roots if (found := view.dequantizer(root)) is not None]
