"""Reading a network's fx graph: what each node is to quantization.

Four kinds (see docs/quantization.md): *weighted* nodes want INT8 data and INT8 weights; quantize-dequantize commutes
through *transparent* ones; *arithmetic* ones take INT8 and make a new tensor with a scale of its own; the
rest is *float*. Kinds are decided by the module type or the function called, never by a name.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from core.errors import TraceError


class Kind(enum.Enum):
    """What a node is to quantization."""

    WEIGHTED = "weighted"
    TRANSPARENT = "transparent"
    CONCAT = "concat"  # transparent where its inputs share one scale
    ADD = "add"
    AVERAGE = "average"
    FLOAT = "float"


WEIGHTED_MODULES = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
_TRANSPARENT_MODULES = (
    nn.MaxPool2d,
    nn.Flatten,
    nn.Unflatten,
    nn.PixelShuffle,
    nn.ChannelShuffle,
    nn.Dropout,
    nn.Dropout2d,
)
_TRANSPARENT_FUNCTIONS: set[Callable[..., Any]] = {
    operator.getitem,
    torch.chunk,
    torch.split,
    torch.flatten,
    torch.reshape,
    torch.permute,
    torch.transpose,
    torch.squeeze,
    torch.unsqueeze,
    torch.max_pool2d,
    F.max_pool2d,
    F.pixel_shuffle,
    F.dropout,
}
_TRANSPARENT_METHODS = {
    "chunk",
    "split",
    "view",
    "reshape",
    "flatten",
    "permute",
    "transpose",
    "squeeze",
    "unsqueeze",
    "contiguous",
    "expand",
}
_CONCAT_FUNCTIONS: set[Callable[..., Any]] = {torch.cat, torch.concat, torch.stack}
_ADD_FUNCTIONS: set[Callable[..., Any]] = {operator.add, torch.add, operator.iadd}
_AVERAGE_MODULES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_RECTIFYING_MODULES = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax)
_RECTIFYING_FUNCTIONS: set[Callable[..., Any]] = {
    torch.relu,
    torch.sigmoid,
    torch.softmax,
    F.relu,
    F.relu6,
    F.sigmoid,
    F.hardsigmoid,
    F.softmax,
}
_RECTIFYING_METHODS = {"relu", "sigmoid", "softmax"}
_AVERAGE_FUNCTIONS: set[Callable[..., Any]] = {
    torch.nn.functional.avg_pool2d,
    torch.nn.functional.adaptive_avg_pool2d,
}


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
    """Remove nodes that hand their input on (folded batch norms), so that neighbours are neighbours."""
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
        return _kind_of_function(node)
    if node.op == "call_method" and node.target in _TRANSPARENT_METHODS:
        return Kind.TRANSPARENT
    return Kind.FLOAT


def _kind_of_module(module: nn.Module) -> Kind:
    if isinstance(module, WEIGHTED_MODULES):
        return Kind.WEIGHTED
    if isinstance(module, _TRANSPARENT_MODULES):
        return Kind.TRANSPARENT
    if isinstance(module, nn.Upsample) and module.mode == "nearest":
        return Kind.TRANSPARENT
    if isinstance(module, _AVERAGE_MODULES):
        return Kind.AVERAGE
    return Kind.FLOAT


def _kind_of_function(node: fx.Node) -> Kind:
    function: Any = node.target
    if function in _CONCAT_FUNCTIONS:
        return Kind.CONCAT
    if function in _ADD_FUNCTIONS and len(node.all_input_nodes) == 2:
        return Kind.ADD
    if function is F.interpolate:
        mode = node.kwargs.get("mode", node.args[3] if len(node.args) > 3 else "nearest")
        return Kind.TRANSPARENT if mode == "nearest" else Kind.FLOAT
    if function in _AVERAGE_FUNCTIONS:
        return Kind.AVERAGE
    if function in _TRANSPARENT_FUNCTIONS:
        return Kind.TRANSPARENT
    return Kind.FLOAT


def is_rectified(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node's function has no negative results, whatever it is given."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _RECTIFYING_MODULES)
    if node.op == "call_function":
        return node.target in _RECTIFYING_FUNCTIONS
    return node.op == "call_method" and node.target in _RECTIFYING_METHODS


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """Tensor inputs of a weighted, transparent, concat, add or average node, in order.

    Only concats and sums have several; what else a node is given (sizes, indices) is not data.
    """
    arguments = [*node.args, *node.kwargs.values()]
    if node.op == "call_function" and node.target in _ADD_FUNCTIONS:
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
