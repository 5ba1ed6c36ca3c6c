"""Reading a network's fx graph: what each node is to quantization.

The kind of a node (see `core.operators`) is decided by the module's type or the function called, never by the name
under which a network holds it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from core.errors import TraceError
from core.operators import NONNEGATIVE, OPERATORS, RESIZE, Kind, Names

_ROOTS: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "operator": operator}


def _resolve(name: str) -> Any:
    """What a name of the table, such as `F.max_pool2d`, stands for."""
    root, _, attribute = name.partition(".")
    return getattr(_ROOTS[root], attribute)


def _modules(names: Names) -> tuple[type[nn.Module], ...]:
    return tuple(_resolve(name) for name in names.modules)


def _functions(names: Names) -> frozenset[Any]:
    return frozenset(_resolve(name) for name in names.functions)


WEIGHTED_MODULES = _modules(OPERATORS[Kind.WEIGHTED])
_KINDS_OF_MODULES = {kind: _modules(names) for kind, names in OPERATORS.items()}
_KINDS_OF_FUNCTIONS = {function: kind for kind, names in OPERATORS.items() for function in _functions(names)}
_KINDS_OF_METHODS = {method: kind for kind, names in OPERATORS.items() for method in names.methods}
_RESIZE_MODULES, _RESIZE_FUNCTIONS = _modules(RESIZE), _functions(RESIZE)
_NONNEGATIVE_MODULES, _NONNEGATIVE_FUNCTIONS = _modules(NONNEGATIVE), _functions(NONNEGATIVE)


class _Tracer(fx.Tracer):
    """Keeps every torch.nn module whole and remembers in which module each node was made."""

    record_stack_traces = True


def trace(network: nn.Module) -> fx.GraphModule:
    """Return the fx graph of a network; a GraphModule comes back as it is.

    Raises:
        TraceError: the forward pass depends on tensor values; the message names the line.
    """
    if isinstance(network, fx.GraphModule):
        return network
    tracer = _Tracer()
    try:
        graph = tracer.trace(network)
    except (fx.proxy.TraceError, TypeError, RuntimeError, ValueError) as error:
        where = _last_user_line(error)
        raise TraceError(
            f"{type(network).__name__} cannot be traced at {where}: {error}. Quantization reads the network from "
            "its fx graph: move control flow that depends on tensor values out of forward, or wrap it with "
            "torch.fx.wrap"
        ) from error
    _drop_identities(network, graph)
    module = fx.GraphModule(network, graph, type(network).__name__)
    module.train(network.training)
    return module


def _drop_identities(network: nn.Module, graph: fx.Graph) -> None:
    """Remove nodes that pass their input on (folded batch norms), so that neighbours are neighbours."""
    for node in list(graph.nodes):
        if node.op == "call_module" and isinstance(network.get_submodule(str(node.target)), nn.Identity):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _last_user_line(error: BaseException) -> str:
    place = "an unknown line"
    trace_back = error.__traceback__
    while trace_back is not None:
        code = trace_back.tb_frame.f_code
        if "torch/fx" not in code.co_filename and "torch/nn/modules/module" not in code.co_filename:
            place = f"{code.co_filename}:{trace_back.tb_lineno} ({code.co_name})"
        trace_back = trace_back.tb_next
    return place


def kind_of(node: fx.Node, modules: dict[str, nn.Module]) -> Kind:
    """Say what a node is to quantization."""
    if node.op == "call_module":
        return _kind_of_module(modules[str(node.target)])
    if node.op == "call_function":
        kind = _kind_of_function(node)
    elif node.op == "call_method":
        kind = _KINDS_OF_METHODS.get(str(node.target), Kind.FLOAT)
    else:
        return Kind.FLOAT
    if kind is Kind.MATMUL and any(operand.op == "get_attr" for operand in inputs_of(node)):
        return Kind.FLOAT  # a parameter that is not a layer's
    return kind


def _kind_of_module(module: nn.Module) -> Kind:
    if isinstance(module, _RESIZE_MODULES):
        return Kind.TRANSPARENT if module.mode == "nearest" else Kind.FLOAT
    return next((kind for kind, types in _KINDS_OF_MODULES.items() if isinstance(module, types)), Kind.FLOAT)


def _kind_of_function(node: fx.Node) -> Kind:
    function: Any = node.target
    if function in _RESIZE_FUNCTIONS:
        mode = node.kwargs.get("mode", node.args[3] if len(node.args) > 3 else "nearest")
        return Kind.TRANSPARENT if mode == "nearest" else Kind.FLOAT
    kind = _KINDS_OF_FUNCTIONS.get(function, Kind.FLOAT)
    if kind is Kind.ADD and len(node.all_input_nodes) != 2:
        return Kind.FLOAT
    return kind


def is_nonnegative(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node's function has no negative results, whatever it is given."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _NONNEGATIVE_MODULES)
    if node.op == "call_function":
        return node.target in _NONNEGATIVE_FUNCTIONS
    return node.op == "call_method" and node.target in NONNEGATIVE.methods


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """Tensor inputs of a weighted, transparent, concat, add, average or matmul node, in order.

    Only concats, sums and matrix products have several; what else a node is given (sizes, indices) is not data.
    """
    arguments = [*node.args, *node.kwargs.values()]
    names: Any = {"call_function": _KINDS_OF_FUNCTIONS, "call_method": _KINDS_OF_METHODS}.get(node.op, {})
    if names.get(node.target) in (Kind.ADD, Kind.MATMUL):
        return [argument for argument in arguments if isinstance(argument, fx.Node)]
    data = next((a for a in arguments if isinstance(a, (fx.Node, list, tuple))), ())
    parts = [data] if isinstance(data, fx.Node) else data
    return [part for part in parts if isinstance(part, fx.Node)]


def paths_of(graph: fx.Graph) -> dict[fx.Node, str]:
    """Readable names, the same in every trace: a module's path, or the function within its module.

    Several calls of one module or function are numbered: `layer1.0.relu_0`, `layer1.0.relu_1`.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        calls.setdefault(_path(node), []).append(node)
    paths = {}
    for path, nodes in calls.items():
        for index, node in enumerate(nodes):
            paths[node] = path if len(nodes) == 1 else f"{path}_{index}"
    return paths


def _path(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"input.{node.name}" if node.name != "input" else node.name
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    scope = next(reversed(stack), "") if stack else ""
    short = (
        node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    )
    return f"{scope}.{short}" if scope else short
