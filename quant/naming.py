"""Names for export: each node of a graph runs in a separate module, so that an exporter can tell the nodes apart.

Exporters name what they write after the modules that ran. A traced network calls its layers from one flat forward, and
functions (concat, sum) run in no module at all: `conv_19`, `Concat_3`. The module made here has one numbered submodule
for each node, and the names say which path of the placement (see `quant.graph.paths_of`) each number belongs to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from quant.fake_quantize import FakeQuantize
from quant.graph import paths_of, trace

QUANTIZER = "/quantizer"
"""Appended to the name of a tensor: the name of its quantizer."""


class _Call(nn.Module):
    """A function, or a tensor method given by its name, as a module."""

    def __init__(self, target: Callable[..., Any] | str) -> None:
        super().__init__()
        self.targets = (target,)  # in a tuple, or TorchScript would try to compile it

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The result of the call; of a method the first argument is the owner."""
        (target,) = self.targets
        function = getattr(args[0], target) if isinstance(target, str) else target
        return function(*args[isinstance(target, str) :], **kwargs)


def with_named_nodes(network: nn.Module) -> tuple[fx.GraphModule, dict[str, str]]:
    """A module that computes what a network computes and shares its parameters, and names for its submodules.

    Args:
        network: any fx-traceable module, quantized or not; it is not changed.

    Returns:
        The module, and for each submodule (`scopes.12`) the path of its node: that of the layer, of the function within
        its module, or of the quantized tensor with `/quantizer` appended.
    """
    traced = trace(network)
    paths = paths_of(traced.graph)
    modules = dict(traced.named_modules())
    root = nn.Module()
    scopes = root.scopes = nn.ModuleList()
    names: dict[str, str] = {}
    graph = copy.deepcopy(traced.graph)
    for node, original in zip(graph.nodes, traced.graph.nodes, strict=True):
        if node.op not in ("call_module", "call_function", "call_method"):
            continue
        scope = f"scopes.{len(scopes)}"
        if node.op == "call_module":
            scopes.append(copy.copy(modules[str(node.target)]))  # one that is called twice needs two names
        else:
            scopes.append(_Call(node.target))
        is_quantizer = isinstance(scopes[-1], FakeQuantize)
        names[scope] = f"{paths[original.all_input_nodes[0]]}{QUANTIZER}" if is_quantizer else paths[original]
        node.op, node.target = "call_module", scope
    for node in graph.nodes:
        if node.op == "get_attr":
            setattr(root, str(node.target).replace(".", "_"), _attribute(traced, str(node.target)))
            node.target = str(node.target).replace(".", "_")
    module = fx.GraphModule(root, graph, type(network).__name__)
    return module.train(traced.training), names


def _attribute(model: nn.Module, path: str) -> Any:
    for name in path.split("."):
        model = getattr(model, name)
    return model
