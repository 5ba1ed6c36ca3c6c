"""The outputs of a network with one unit after the other switched, without computing again what lies before the unit.

Switching a unit changes the values behind its quantizer and its layers, and no others. So the network runs once with no
unit switched and keeps the values that the changed parts read; then each unit needs its changed part only. That is the
same operators on the same values as in a whole pass, and so the same outputs, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from quant.fake_quantize import FakeQuantize, Mode, WeightFakeQuantize
from quant.insertion import activation_quantizers, placement_of, quantized_layers, set_mode

LIMIT = 1 << 30  # bytes of kept values
MOST = 32  # units for which one pass over the network keeps values

Values = dict[fx.Node, Any]
LastUses = dict[fx.Node, list[fx.Node]]  # for nodes, the sources that none of the later ones reads


def switch_units(model: fx.GraphModule, quantized: set[str]) -> None:
    """Switch the given units on (activations and the weights that read them) and all others off."""
    set_mode(model, Mode.OFF)
    for unit, parts in _parts_of_units(model).items():
        if unit in quantized:
            for part in parts:
                part.mode = Mode.QUANTIZE


def _parts_of_units(model: fx.GraphModule) -> dict[str, list[FakeQuantize | WeightFakeQuantize]]:
    quantizer_of, layers = activation_quantizers(model), quantized_layers(model)
    return {
        group.name: [quantizer_of[group.name], *(layers[name].weight_quantizer for name in group.layers)]
        for group in placement_of(model).groups
    }


class SwitchedUnits:
    """Outputs of an inserted and calibrated model in which all units are on, or all off, except for one.

    Args:
        model: in evaluation mode; its quantizers are switched while `outputs` runs, and stay so.
        quantized: whether the other units are on.
        images: a batch as large as any later one, to see how much memory each value takes.
        limit: bytes of values to keep at most. The values that one unit needs are kept in any case.
        most: units at a time.

    A network that changes a tensor in place is computed as a whole for each unit.
    """

    def __init__(
        self,
        model: fx.GraphModule,
        quantized: bool,
        images: Tensor,
        limit: int = LIMIT,
        most: int = MOST,
    ) -> None:
        self.model = model
        self.quantized = quantized
        self.limit = limit
        self.most = most
        self.parts = _parts_of_units(model)
        self.modules = dict(model.named_modules())
        self.interpreter: fx.Interpreter = fx.Interpreter(model)
        self.changed = self._changed_by_units()
        self.needed = {unit: _read_from_outside(nodes) for unit, nodes in self.changed.items()}
        self.last_uses: dict[str, LastUses] = {}
        self.sizes: dict[fx.Node, int] = {}
        self.works_in_place = False
        self._measure(images)

    def groups(self, units: Sequence[str]) -> list[list[str]]:
        """Divide units, in their order, into groups whose kept values fit into the limit."""
        groups: list[list[str]] = []
        kept: set[fx.Node] = set()
        for unit in units:
            together = kept | self.needed[unit]
            fits = sum(self.sizes[node] for node in together) <= self.limit
            if groups and fits and len(groups[-1]) < self.most:
                groups[-1].append(unit)
                kept = together
            else:
                groups.append([unit])
                kept = set(self.needed[unit])
        return groups

    def outputs(self, units: Sequence[str], images: Tensor) -> Iterator[Any]:
        """The network's outputs for images [B, C, H, W], with each of the units switched in turn."""
        switch_units(self.model, set(self.parts) if self.quantized else set())
        kept: Values = {}
        if not self.works_in_place:
            needed: set[fx.Node] = set().union(*(self.needed[unit] for unit in units))
            before = _before(needed, self.model.graph)
            kept = self._run(before, _last_uses(before), images, {}, needed)
        for unit in units:
            self._switch(unit, not self.quantized)
            if self.works_in_place:
                yield self.model(images)
            else:
                changed = self.changed[unit]
                if unit not in self.last_uses:
                    self.last_uses[unit] = _last_uses(changed)
                yield self._run(changed, self.last_uses[unit], images, kept, set())[changed[-1]]
            self._switch(unit, self.quantized)

    def _switch(self, unit: str, on: bool) -> None:
        for part in self.parts[unit]:
            part.mode = Mode.QUANTIZE if on else Mode.OFF

    def _changed_by_units(self) -> dict[str, list[fx.Node]]:
        """For each unit the nodes whose values change with it, in the order of the graph; the output is the last."""
        units_of_part: dict[int, set[str]] = {}
        for unit, parts in self.parts.items():
            for part in parts:
                units_of_part.setdefault(id(part), set()).add(unit)
        changed: dict[str, list[fx.Node]] = {unit: [] for unit in self.parts}
        units_of: dict[fx.Node, set[str]] = {}
        for node in self.model.graph.nodes:
            units: set[str] = set().union(*(units_of[source] for source in node.all_input_nodes))
            for module in self.modules[str(node.target)].modules() if node.op == "call_module" else ():
                units |= units_of_part.get(id(module), set())
            units_of[node] = units
            for unit in self.parts if node.op == "output" else units:
                changed[unit].append(node)
        return changed

    def _run(
        self,
        nodes: list[fx.Node],
        last_uses: LastUses,
        images: Tensor,
        given: Values,
        needed: set[fx.Node],
    ) -> Values:
        """Compute nodes, given values of others; returns the values that are needed, and the output's."""
        values: Values = {}

        def value(source: fx.Node) -> Any:
            return values[source] if source in values else given[source]

        for node in nodes:
            values[node] = self._compute(node, images, value)
            for source in last_uses.get(node, ()):
                if source not in needed:
                    values.pop(source, None)
        return values

    def _compute(self, node: fx.Node, images: Tensor, value: Callable[[fx.Node], Any]) -> Any:
        if node.op == "placeholder":
            return images
        if node.op == "output":
            return fx.node.map_arg(node.args[0], value)
        arguments = fx.node.map_arg(node.args, value)
        named = fx.node.map_arg(node.kwargs, value) if node.kwargs else {}
        if node.op == "call_module":
            return self.modules[str(node.target)](*arguments, **named)
        return getattr(self.interpreter, node.op)(node.target, arguments, named)

    @torch.no_grad()
    def _measure(self, images: Tensor) -> None:
        """Run once, to see the size of each value and whether any is changed in place."""
        nodes = list(self.model.graph.nodes)
        last_use = _last_uses(nodes)
        images = images.clone(
            memory_format=torch.preserve_format
        )  # no inference tensor: these have no version
        switch_units(self.model, set(self.parts) if self.quantized else set())
        values: Values = {}
        for node in nodes:
            sources = [tensor for source in node.all_input_nodes for tensor in _tensors(values[source])]
            versions = [tensor._version for tensor in sources]
            values[node] = self._compute(node, images, values.__getitem__)
            self.works_in_place |= versions != [tensor._version for tensor in sources]
            self.sizes[node] = sum(tensor.nbytes for tensor in _tensors(values[node]))
            for source in last_use.get(node, ()):
                del values[source]


def _last_uses(nodes: list[fx.Node]) -> LastUses:
    last = {source: node for node in nodes for source in node.all_input_nodes}
    found: LastUses = {}
    for source, node in last.items():
        found.setdefault(node, []).append(source)
    return found


def _before(nodes: set[fx.Node], graph: fx.Graph) -> list[fx.Node]:
    """Some nodes and all that they depend on, in the order of the graph."""
    found = set(nodes)
    for node in reversed(graph.nodes):
        if node in found:
            found.update(node.all_input_nodes)
    return [node for node in graph.nodes if node in found]


def _read_from_outside(nodes: list[fx.Node]) -> set[fx.Node]:
    return {source for node in nodes for source in node.all_input_nodes} - set(nodes)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
