"""Cross-layer equalisation (Nagel et al., arXiv:1906.04721, section 4.1): even channel ranges, the same function.

Between two layers with a positively homogeneous activation, f(s x) = s f(x) for s > 0, a channel can be made smaller
in the first layer and larger in the second without any change at the output:

    W1_i / s_i,  b1_i / s_i,  W2_:i * s_i    with    s_i = sqrt(r1_i r2_i) / r2_i                    (equation 11)

r1_i and r2_i being the largest weights that make and that read channel i. ReLU and leaky ReLU are homogeneous; SiLU is
not, so the pairs around it are left alone.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quant.graph import trace

_HOMOGENEOUS_MODULES = (nn.ReLU, nn.LeakyReLU, nn.Identity)
_HOMOGENEOUS_FUNCTIONS = {F.relu, F.leaky_relu, torch.relu}
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
_MAX_ROUNDS = 20
_SETTLED = 1e-3

_Layer = nn.Conv1d | nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class EqualizationResult:
    """The equalised copy, the pairs of layers equalised, and the pairs left alone because of their activation."""

    network: nn.Module
    pairs: tuple[tuple[str, str], ...]
    left_alone: tuple[tuple[str, str], ...]


def equalize(network: nn.Module) -> EqualizationResult:
    """Return a copy of a network with even channel ranges in every pair of layers where that changes nothing.

    A pair is a layer whose one reader, after an activation or directly, is the other, each called once. Chains of
    pairs are gone through until their ranges have settled.

    Args:
        network: any network that `trace` takes, BN folded; it is not changed.

    Raises:
        TraceError: the network cannot be traced.
    """
    equalized = copy.deepcopy(network)
    graph = trace(equalized).graph
    modules = dict(equalized.named_modules())
    pairs, left_alone = _find_pairs(graph, modules)
    with torch.no_grad():
        for _ in range(_MAX_ROUNDS):
            moved = [_even_out(modules[a], modules[b]) for a, b in pairs]
            if max(moved, default=0.0) < _SETTLED:
                break
    return EqualizationResult(equalized, tuple(pairs), tuple(left_alone))


def _find_pairs(
    graph: fx.Graph, modules: dict[str, nn.Module]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    once = {name for name in calls if calls.count(name) == 1}
    pairs: list[tuple[str, str]] = []
    left_alone: list[tuple[str, str]] = []
    for node in graph.nodes:
        if node.op != "call_module" or str(node.target) not in once or len(node.users) != 1:
            continue
        (between,) = node.users
        direct = between.op == "call_module" and isinstance(modules[str(between.target)], _LAYERS)
        if not direct and (len(between.users) != 1 or len(between.all_input_nodes) != 1):
            continue
        reader = between if direct else next(iter(between.users))
        if reader.op != "call_module" or str(reader.target) not in once:
            continue
        pair = (str(node.target), str(reader.target))
        if not _fits(modules[pair[0]], modules[pair[1]]):
            continue
        (pairs if direct or _is_homogeneous(between, modules) else left_alone).append(pair)
    return pairs, left_alone


def _is_homogeneous(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _HOMOGENEOUS_MODULES)
    return node.op == "call_function" and node.target in _HOMOGENEOUS_FUNCTIONS


def _fits(first: nn.Module, second: nn.Module) -> bool:
    """Whether both are layers, and each channel of the first is read by known weights of the second."""
    if not isinstance(first, _LAYERS) or not isinstance(second, _LAYERS):
        return False
    if isinstance(first, nn.Linear) or isinstance(second, nn.Linear):
        return isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    return second.groups in (1, second.in_channels)


def _reading(second: nn.Module) -> Tensor:
    """The second layer's weights as [channels read, weights], sharing memory."""
    assert isinstance(second, _LAYERS)
    if isinstance(second, nn.Linear) or second.groups == 1:
        return second.weight.transpose(0, 1)
    outputs = second.out_channels // second.groups
    return second.weight.view(second.groups, outputs, *second.weight.shape[2:])


def _even_out(first: nn.Module, second: nn.Module) -> float:
    """Scale one pair, in place; returns the largest change of a channel, |log s|."""
    assert isinstance(first, _LAYERS)
    reading = _reading(second)
    made = first.weight.flatten(1).abs().amax(1)
    read = reading.flatten(1).abs().amax(1)
    alive = (made > 0) & (read > 0)
    s = torch.where(alive, (made * read).sqrt() / read.clamp(min=1e-30), torch.ones_like(made))
    first.weight.div_(s.reshape(-1, *(1,) * (first.weight.ndim - 1)))
    if first.bias is not None:
        first.bias.div_(s)
    reading.mul_(s.reshape(-1, *(1,) * (reading.ndim - 1)))
    return float(s.log().abs().max())
