"""Networks whose generated code has fewer passes over memory, and fewer calls, than their graph has nodes.

SiLU is computed in the one quantizer that reads it, and the weights of several layers are quantized together
(quant/weights.py). Only the generated code is another one. The graph stays as it was inserted, so that what reads a
graph, runs it node by node or exports it sees every tensor. Values and gradients are the same, bit for bit; where a
quantizer cannot take SiLU (see `FakeQuantize.of_silu`), the two modules are called.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from core.grid import Grid
from quant.fake_quantize import FakeQuantize, scales_of
from quant.layers import QuantizedLayer
from quant.weights import NUM_TOGETHER, quantized_weights


class FusedNetwork(fx.GraphModule):
    """A `GraphModule` whose forward pass takes fewer steps than its graph, with the same results."""

    def recompile(self) -> Any:
        """Generate the forward pass from the graph; to be called after each change of the graph."""
        graph = self._graph
        try:
            self._graph = _fused(graph, self)
            return super().recompile()
        finally:
            self._graph = graph


def quantized_silu(silu: nn.SiLU, quantizer: FakeQuantize, x: Tensor, scale: Tensor) -> Tensor:
    """quantizer(silu(x)); `scale` is that of the quantizer."""
    if not (silu._forward_hooks or silu._forward_pre_hooks):
        y = quantizer.of_silu(x, scale)
        if y is not None:
            return y
    result: Tensor = quantizer(silu(x), scale)
    return result


def _fused(graph: fx.Graph, root: nn.Module) -> fx.Graph:
    """A copy of a graph with fewer calls: of SiLU where only its quantizer reads it, and of quantizers of weights."""
    modules = dict(root.named_modules(remove_duplicate=False))
    fused = copy.deepcopy(graph)
    _pass_scales(fused, modules)
    for node in list(fused.nodes):
        if _is_call(node, FakeQuantize, modules):
            _fuse_silu(fused, node, modules)
    runs: list[tuple[Grid, list[fx.Node]]] = []
    for node in fused.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, QuantizedLayer):
            grid = layer.weight_quantizer.grid
            if not runs or len(runs[-1][1]) == NUM_TOGETHER or grid != runs[-1][0]:
                runs.append((grid, []))
            runs[-1][1].append(node)
    for _, run in runs:
        weights = _from_one_call(fused, run, quantized_weights)
        for node in run:
            node.kwargs = {**node.kwargs, "quantized": weights[str(node.target)]}
    return fused


def _pass_scales(fused: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Let quantizers of activations get their scales from one call before the first of them."""
    calls = [node for node in fused.nodes if _is_call(node, FakeQuantize, modules)]
    if calls:
        given = _from_one_call(fused, calls, scales_of)
        for node in calls:
            node.args = (*node.args, given[str(node.target)])


def _fuse_silu(fused: fx.Graph, node: fx.Node, modules: dict[str, nn.Module]) -> None:
    source = node.args[0]
    if not (isinstance(source, fx.Node) and _is_call(source, nn.SiLU, modules) and len(source.users) == 1):
        return
    with fused.inserting_before(node):
        parts = [fused.get_attr(str(part.target)) for part in (source, node)]
        together = fused.call_function(quantized_silu, (*parts, source.args[0], *node.args[1:]))
    node.replace_all_uses_with(together)
    fused.erase_node(node)
    fused.erase_node(source)


def _from_one_call(
    fused: fx.Graph, calls: list[fx.Node], function: Callable[..., tuple[Any, ...]]
) -> dict[str, fx.Node]:
    """What a function gives for each of the modules that are called, in one call before the first, by module."""
    targets = list(dict.fromkeys(str(node.target) for node in calls))  # some are called several times
    with fused.inserting_before(calls[0]):
        results = fused.call_function(function, tuple(fused.get_attr(target) for target in targets))
        return {
            target: fused.call_function(operator.getitem, (results, i)) for i, target in enumerate(targets)
        }


def _is_call(node: fx.Node, kind: type[nn.Module], modules: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and type(modules[str(node.target)]) is kind
