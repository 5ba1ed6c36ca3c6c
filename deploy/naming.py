"""Names of nodes and tensors in an exported file: the paths that the caller gives, instead of torch's own names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from onnx import ModelProto


def rename_scopes(model: ModelProto, names: Mapping[str, str]) -> None:
    """Rename what ran in the given submodules, in place; the graph's inputs and outputs keep their names.

    torch names a node `/network/scopes.12/Conv`, its result `/network/scopes.12/Conv_output_0` and a parameter
    `network.scopes.12.weight`. With the path `stem.conv` for `scopes.12` they become `stem.conv`, `stem.conv` and
    `stem.conv.weight`: the node that makes a submodule's one result, and that result, have the path itself as their
    name, every other node and tensor has the path in front.

    Args:
        model: as torch's exporter wrote it.
        names: submodule, as in torch's names (`scopes.12`), to path; paths differ from each other.
    """
    if not names:
        return
    scope = re.compile(r"(?:.*[/.])?(" + "|".join(map(re.escape, names)) + r")(?=[/.])")
    graph = model.graph
    tensors = {value.name: value.name for value in (*graph.input, *graph.output)}

    def renamed(name: str) -> str:
        found = scope.match(name)
        return name if found is None else names[found[1]] + name[found.end() :]

    results = _results(model, scope)
    for node in graph.node:
        if node.name in results:
            path = names[results[node.name]]
            tensors.setdefault(node.output[0], path)
            node.name = path
        node.name = renamed(node.name)
    for node in graph.node:
        for names_of in (node.input, node.output):
            names_of[:] = [tensors.get(name) or renamed(name) for name in names_of]
    for tensor in graph.initializer:
        tensor.name = tensors.get(tensor.name) or renamed(tensor.name)
    del graph.value_info[:]


def module_path(name: str) -> str:
    """The path in the name of a node or tensor that `rename_scopes` named; any other name as it is."""
    return name.partition("/")[0] or name


def _results(model: ModelProto, scope: re.Pattern[str]) -> dict[str, str]:
    """Name of the node that makes the one tensor of a scope that is read outside -> scope."""
    scopes = {node.name: found[1] for node in model.graph.node if (found := scope.match(node.name))}
    makers = {name: node for node in model.graph.node for name in node.output}
    read: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            origin = scopes.get(makers[name].name) if name in makers else None
            if origin is not None and origin != scopes.get(node.name):
                read.setdefault(origin, set()).add(name)
    for value in model.graph.output:
        maker = makers.get(value.name)
        if maker is not None and maker.name in scopes:
            read.setdefault(scopes[maker.name], set()).add(value.name)
    return {makers[name].name: origin for origin, (name, *rest) in read.items() if not rest}
