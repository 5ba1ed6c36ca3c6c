"""Distillation: how far a student's tensors are from its float teacher's, and which tensors to compare.

Every term is the unexplained variance of one tensor,

    mean((s - t)^2) / var(t),

so that 0.01 means one per cent for every tensor of every network, and no tensor or network size can drown the others.
A level of a detector that never sees an object answers with nearly a constant; in units of its own tiny variance its
rounding noise would drown the levels that matter. So the variance of a map counts as at least a tenth of the mean
variance of the maps with as many channels (the same branch on other levels).
Besides the outputs, tensors inside the network can be compared (FitNets, arXiv:1412.6550). A student made by `insert`
has the node names of its teacher's graph, so a tensor is found in both by one name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn

from core.errors import DistillationError
from core.names import closest_hint
from core.operators import Kind
from core.processes import BatchPart, num_processes, sum_over_processes
from quant.fusing import FusedNetwork
from quant.graph import inputs_of, kind_of, paths_of, trace

_EPSILON = 1e-8
VARIANCE_FLOOR = 0.1


def flatten_maps(raw: Any) -> list[Tensor]:
    """Tensors of a nested tuple, list or dict of outputs, in order."""
    if isinstance(raw, Tensor):
        return [raw]
    values: Iterable[Any] = raw.values() if isinstance(raw, dict) else raw
    return [tensor for value in values for tensor in flatten_maps(value)]


class SeenValues:
    """Number, sum and sum of squares of each map's values, over the images that a training has compared.

    A few images can be too few for a variance: a map varies where objects are, and most of them may have none. Where a
    step compares a part of its batch, variances are therefore those of its images and of all images before.

    Attributes:
        earlier: the three sums of the steps that are done, float64 [maps, 3]; None before the first.
    """

    def __init__(self) -> None:
        self.earlier: Tensor | None = None
        self._latest: Tensor | None = None

    def and_those_of(self, step: Tensor) -> Tensor:
        """The sums with those of the current step; a step that is taken again counts once."""
        self._latest = step if self.earlier is None else self.earlier + step
        return self._latest

    def after_step(self) -> None:
        """Keep those of the step that is done."""
        self.earlier = self._latest


def distillation_loss(
    student: Any, teacher: Any, floor: float = VARIANCE_FLOOR, seen: SeenValues | None = None
) -> Tensor:
    """Unexplained variance of the teacher's maps, averaged over maps; a scalar, 0 where they agree.

    For each map: mean((s - t)^2) / var(t). A student that answers the teacher's mean everywhere gets 1.

    Args:
        student: maps in any nesting, [B, C, ...] each.
        teacher: as many maps of the same shapes.
        floor: least var(t), as a share of the mean variance of the teacher's maps with as many channels.
        seen: the teacher's values on the images of earlier steps, which its variances are to include.

    Where several processes share the batch, variances are of the whole batch, and the results add up to its loss.
    """
    wanted = [target.detach().float() for target in flatten_maps(teacher)]
    variances, counts = _variances(wanted, seen)
    terms = []
    for s, t, own, count in zip(flatten_maps(student), wanted, variances, counts, strict=True):
        alike = [
            var for other, var in zip(wanted, variances, strict=True) if other.shape[1:2] == t.shape[1:2]
        ]
        variance = torch.maximum(own, floor * torch.stack(alike).mean()).clamp(min=_EPSILON)
        terms.append((s.float() - t).square().sum() / count / variance)
    return torch.stack(terms).mean()


def _variances(maps: list[Tensor], seen: SeenValues | None) -> tuple[list[Tensor], list[float]]:
    """Variance of each map's values, and the number of those of this step, at least 1; over all processes."""
    if num_processes() == 1 and seen is None:
        return [values.var() for values in maps], [float(values.numel()) for values in maps]
    moments = [
        torch.stack(
            [
                values.new_tensor(values.numel()).double(),
                values.double().sum(),
                values.double().square().sum(),
            ]
        )
        for values in maps
    ]
    step = sum_over_processes(torch.stack(moments))
    counts, sums, squares = (step if seen is None else seen.and_those_of(step)).unbind(dim=1)
    variances = ((squares - sums.square() / counts.clamp(min=1)) / (counts - 1).clamp(min=1)).float()
    return list(variances), step[:, 0].clamp(min=1).tolist()


def images_compared(share: float, batch: BatchPart) -> slice:
    """Which images of a part of a batch distillation compares in a step.

    Of a batch of B images these are n = round(share * B) in successive places, at least one; the places move on from
    step to step, so that B / n steps, rounded up, have been at all of them. In a shuffled batch they are a random
    sample. Processes that share a batch have its images in turn: their numbers of compared images differ by one at
    most.

    Args:
        share: of the images of the whole batch, above 0 and at most 1.
        batch: step, and places of the part's images in the whole batch.
    """
    total = batch.num_images
    num_compared = max(1, round(share * total))
    num_windows = -(-total // num_compared)
    window = batch.step % num_windows
    begin = round(window * (total - num_compared) / max(num_windows - 1, 1))
    places = batch.places
    first, last = (
        len(range(places.start, min(bound, places.stop), places.step))
        for bound in (begin, begin + num_compared)
    )
    return slice(first, last)


def feature_nodes(network: nn.Module, patterns: Sequence[str] = ()) -> list[str]:
    """Names of the graph nodes whose tensors feature distillation compares.

    Without patterns these are the last tensors that several outputs depend on: every later computation serves one
    output alone. In a detector these are the inputs of the head, one map per level. In a network with one output it
    is the input of the last weighted layer.

    Args:
        network: the float network, or anything `trace` reads.
        patterns: readable names (as in a placement) with * and ?, e.g. `neck.*`; module calls and sums.

    Raises:
        DistillationError: a pattern matches nothing, or the network has no tensor between input and output.
    """
    graph = trace(network).graph
    chosen = _matching(graph, patterns) if patterns else _where_outputs_part(graph)
    if not chosen:
        chosen = _read_by_last_layers(trace(network))
    if not chosen:
        raise DistillationError(
            "the network computes nothing between input and output that could be compared: switch feature "
            "distillation off, or name tensors by pattern"
        )
    return [node.name for node in graph.nodes if node.name in chosen]


def with_features(network: nn.Module, names: Sequence[str]) -> fx.GraphModule:
    """The same network, its parameters shared, returning (outputs, features): the named nodes' tensors in order.

    Raises:
        DistillationError: the graph has no node of such a name.
    """
    traced = trace(network)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    outputs = graph.graph_copy(traced.graph, copies)
    found = {node.name: copy for node, copy in copies.items()}
    missing = [name for name in names if name not in found]
    if missing:
        raise DistillationError(
            f"the student has no node {missing[0]!r}: insert quantizers into a copy of the teacher"
        )
    graph.output((outputs, tuple(found[name] for name in names)))
    module = FusedNetwork(traced, graph, f"{type(traced).__name__}WithFeatures")
    module.train(traced.training)
    return module


def _matching(graph: fx.Graph, patterns: Sequence[str]) -> set[str]:
    paths = {
        path: node.name
        for node, path in paths_of(graph).items()
        if node.op not in {"placeholder", "output", "get_attr"}
    }
    chosen = set()
    for pattern in patterns:
        matched = {name for path, name in paths.items() if fnmatchcase(path, pattern)}
        if not matched:
            raise DistillationError(
                f"pattern {pattern!r} matches no tensor of the network{closest_hint(pattern, list(paths))}"
            )
        chosen |= matched
    return chosen


def _where_outputs_part(graph: fx.Graph) -> set[str]:
    """Computed nodes that serve several outputs, and that a node which serves one alone reads."""
    serves: dict[fx.Node, set[fx.Node]] = {node: set() for node in graph.nodes}
    chosen = set()
    for node in reversed(graph.nodes):
        if node.op == "output":
            for leaf in node.all_input_nodes:
                serves[leaf].add(leaf)
            continue
        for source in node.all_input_nodes:
            serves[source] |= serves[node]
    for node in graph.nodes:
        if node.op == "output" or len(serves[node]) != 1:
            continue
        chosen |= {
            source.name for source in node.all_input_nodes if len(serves[source]) > 1 and _computed(source)
        }
    return chosen


def _read_by_last_layers(network: fx.GraphModule) -> set[str]:
    """What the weighted layer nearest to the output reads."""
    modules = dict(network.named_modules())
    for node in reversed(network.graph.nodes):
        if kind_of(node, modules) is Kind.WEIGHTED:
            return {source.name for source in inputs_of(node) if _computed(source)}
    return set()


def _computed(node: fx.Node) -> bool:
    return node.op not in {"placeholder", "get_attr"}
