"""Batch-normalisation folding on the fx graph, for networks that this project did not write.

Quantization needs a convolution that an engine can run as one kernel, so a normalisation after it has to be part of
its weights before a quantizer sees them (core/folding.py has the arithmetic).
"""

from __future__ import annotations

import copy
import logging
import sys

from torch import Tensor, fx, nn

from core.folding import BatchNorm, folded_parameters
from quant.graph import trace

log = logging.getLogger(__name__)

_Foldable = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.Linear


def fold_batchnorms(network: nn.Module) -> fx.GraphModule:
    """Return a traced copy in evaluation mode with each normalisation folded into the layer before it.

    A normalisation is folded where every call of its layer feeds it alone and nothing else feeds it: also where one
    layer with one normalisation serves several levels. Others (before the convolution, after a concat, or working
    with the statistics of the batch) stay as they are. Names of modules that stay are those of the network.

    Args:
        network: any network that `trace` takes; it is not changed. Frozen normalisations of torchvision count, too.

    Raises:
        TraceError: the network cannot be traced; the message names the line.
    """
    model = copy.deepcopy(network).eval()
    model = trace(_thaw(model))
    modules = dict(model.named_modules())
    calls: dict[str, list[fx.Node]] = {}
    for node in model.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    left = []
    for name, nodes in calls.items():
        norm = modules[name]
        if not isinstance(norm, BatchNorm):
            continue
        layer = _layer_before(nodes, calls, modules)
        if layer is None or norm.running_mean is None or norm.running_var is None:
            left.append(name)
            continue
        _fold(layer, norm)
        for node in nodes:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            model.graph.erase_node(node)
    if left:
        log.warning(
            "%d normalisations do not follow a layer of their own and stay float: %s",
            len(left),
            left[:6],
        )
    model.graph.lint()
    model.delete_all_unused_submodules()
    model.recompile()
    return model


def _layer_before(
    nodes: list[fx.Node], calls: dict[str, list[fx.Node]], modules: dict[str, nn.Module]
) -> _Foldable | None:
    """The one layer whose calls feed these calls of a normalisation, and nothing else; None where there is none."""
    sources = [node.args[0] if node.args else None for node in nodes]
    layers = set()
    for source in sources:
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            return None
        layers.add(str(source.target))
    if len(layers) != 1:
        return None
    name = layers.pop()
    layer = modules[name]
    if len(calls[name]) != len(nodes) or not isinstance(layer, _Foldable):
        return None
    return layer


def _fold(layer: _Foldable, norm: BatchNorm) -> None:
    """Move the normalisation into the layer's weight and bias, in place."""
    if isinstance(layer, nn.ConvTranspose2d):
        weight, bias = folded_parameters(_swapped(layer.weight, layer.groups), layer.bias, norm)
        weight = _swapped(weight, layer.groups)
    else:
        weight, bias = folded_parameters(layer.weight, layer.bias, norm)
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype))
    layer.bias = nn.Parameter(bias.to(dtype))


def _swapped(weight: Tensor, groups: int) -> Tensor:
    """[in, out / groups, h, w], as transposed convolutions have it, as [out, in / groups, h, w], and the other way."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _thaw(network: nn.Module) -> nn.Module:
    """Replace torchvision's frozen normalisations by ordinary ones that compute the same, so that they are seen."""
    torchvision_layers = sys.modules.get("torchvision.ops.misc")  # not imported: the network has none of them
    if torchvision_layers is None:
        return network
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torchvision_layers.FrozenBatchNorm2d):
                norm = nn.BatchNorm2d(child.weight.numel(), eps=child.eps).to(child.weight)
                state = child.state_dict()
                norm.load_state_dict(
                    {**state, "num_batches_tracked": norm.state_dict()["num_batches_tracked"]}
                )
                setattr(parent, name, norm.eval())
    return network
