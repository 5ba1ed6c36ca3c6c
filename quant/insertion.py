"""Insertion: turns a network and a placement into the one quantized model that every stage works on."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import fx, nn

from core.errors import PlacementError
from core.names import closest_hint
from core.operators import Kind
from quant.fake_quantize import FakeQuantize, Mode, WeightFakeQuantize
from quant.fusing import FusedNetwork
from quant.graph import inputs_of, kind_of, paths_of, trace
from quant.layers import QuantizedLayer, QuantizedMatMul, quantize_layer
from quant.placement.placement import Group, Placement

ACTIVATION_QUANTIZERS = "activation_quantizers"


def insert(network: nn.Module, placement: Placement, learn_scales: bool = True) -> fx.GraphModule:
    """Return a copy of the network with fake quantizers at the places of the placement.

    Module and parameter names stay as they are; a quantized layer gains `.weight_quantizer`, and each group's one
    quantizer is `activation_quantizers.<number>`. A product of two quantized tensors becomes a module under
    the path that the placement gives it. All quantizers start switched off: the copy then
    computes bit for bit what the network computes.

    Args:
        network: the module that `place` read.
        placement: what `place` decided for it.
        learn_scales: whether fine-tuning learns the scales of activations and weights (fixed ones never move).
            Otherwise activation scales stay, and weight scales follow the largest weight of their channel. The scale
            of the network's input is never learned: the range of images is known, and only this scale would need the
            gradient for the images.

    Raises:
        PlacementError: the placement names a tensor, a reader or a layer that the network does not have, or one
            group twice.
    """
    names = [group.name for group in placement.groups]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PlacementError(
            f"the placement has two groups called {twice!r}: join their tensors, or rename one"
        )
    model = trace(copy.deepcopy(network))
    nodes = {node.name: node for node in model.graph.nodes}
    model.add_module(ACTIVATION_QUANTIZERS, nn.ModuleDict())
    for index, group in enumerate(placement.groups):
        _insert_group(model, nodes, index, group, learn_scales)
    for site in placement.weights:
        try:
            layer = model.get_submodule(site.layer)
        except AttributeError as error:
            raise PlacementError(
                _unknown("layer", site.layer, [n for n, _ in model.named_modules()])
            ) from error
        try:
            quantize_layer(layer, site.axis, site.grid, learn_scales)
        except TypeError as error:
            raise PlacementError(f"the placement quantizes the weights of {site.layer!r}: {error}") from error
    _link_grids(model)
    paths = paths_of(model.graph)
    for product in placement.matmuls:
        if product.node not in nodes:
            raise PlacementError(_unknown("node", product.node, list(nodes)))
        _quantize_matmul(model, nodes[product.node], paths[nodes[product.node]])
    model.graph.lint()
    fused = FusedNetwork(model, model.graph, type(network).__name__)
    fused.meta["placement"] = placement
    return fused.train(model.training)


def _insert_group(
    model: fx.GraphModule, nodes: dict[str, fx.Node], index: int, group: Group, learn_scales: bool
) -> None:
    of_input = all(nodes[site.node].op == "placeholder" for site in group.tensors if site.node in nodes)
    quantizer = FakeQuantize(group.grid, learn_scales and group.scale is None and not of_input)
    if group.scale is not None:
        quantizer.set_scale(group.scale)
    target = f"{ACTIVATION_QUANTIZERS}.{index}"
    model.add_submodule(target, quantizer)
    for site in group.tensors:
        for name in (site.node, *site.users):
            if name not in nodes:
                raise PlacementError(_unknown("node", name, list(nodes)))
        producer = nodes[site.node]
        with model.graph.inserting_after(producer):
            quantized = model.graph.call_module(target, (producer,))
        for user in site.users:
            if producer not in nodes[user].all_input_nodes:
                readers = ", ".join(reader.name for reader in producer.users if reader is not quantized)
                raise PlacementError(
                    f"the placement says that {user!r} reads {site.node!r}, which it does not; expected one of: "
                    f"{readers}"
                )
            nodes[user].replace_input_with(producer, quantized)


def _link_grids(model: fx.GraphModule) -> None:
    """Tell each quantized layer the one quantizer that all its inputs have passed, where there is one."""
    modules = dict(model.named_modules())
    grids: dict[str, set[str]] = {}
    for node in model.graph.nodes:
        if node.op == "call_module" and isinstance(modules[str(node.target)], QuantizedLayer):
            grids.setdefault(str(node.target), set()).update(_grids_of(inputs_of(node)[0], modules))
    for name, targets in grids.items():
        layer, quantizer = modules[name], modules.get(next(iter(targets)))
        if len(targets) == 1 and isinstance(quantizer, FakeQuantize):
            assert isinstance(layer, QuantizedLayer)
            layer.input_grid = (quantizer,)


def _quantize_matmul(model: fx.GraphModule, node: fx.Node, path: str) -> None:
    """Let a product of two tensors, each of which comes from one quantizer, multiply codes."""
    modules = dict(model.named_modules())
    operands = inputs_of(node)
    found = [_grids_of(operand, modules) for operand in operands]
    quantizers = [modules.get(next(iter(targets))) for targets in found if len(targets) == 1]
    first, second = quantizers if len(quantizers) == 2 else (None, None)
    if not (isinstance(first, FakeQuantize) and isinstance(second, FakeQuantize)):
        raise PlacementError(
            f"the placement quantizes the product {path!r}, but not each of its operands with one scale: put the "
            "tensors that it reads into groups, or take it out of `matmuls`"
        )
    model.add_submodule(path, QuantizedMatMul(first, second))
    node.op, node.target, node.args, node.kwargs = "call_module", path, tuple(operands), {}


def _grids_of(node: fx.Node, modules: dict[str, nn.Module]) -> set[str]:
    """Targets of the quantizers that a tensor comes from, back through transparent nodes; "" for any other source."""
    if node.op == "call_module" and isinstance(modules[str(node.target)], FakeQuantize):
        return {str(node.target)}
    if kind_of(node, modules) not in (Kind.TRANSPARENT, Kind.CONCAT):
        return {""}
    return set().union(*(_grids_of(source, modules) for source in inputs_of(node)))


def _unknown(what: str, name: str, known: list[str]) -> str:
    return f"the placement names {what} {name!r}, which the network does not have{closest_hint(name, known)}"


def placement_of(model: fx.GraphModule) -> Placement:
    """The placement that `insert` worked from."""
    placement = model.meta["placement"]
    assert isinstance(placement, Placement)
    return placement


def activation_quantizers(model: fx.GraphModule) -> dict[str, FakeQuantize]:
    """Group name -> its quantizer, in graph order."""
    found = {}
    for index, group in enumerate(placement_of(model).groups):
        module = model.get_submodule(f"{ACTIVATION_QUANTIZERS}.{index}")
        assert isinstance(module, FakeQuantize)
        found[group.name] = module
    return found


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Layer name -> layer with quantized weights."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def quantizers(model: nn.Module) -> Iterator[FakeQuantize | WeightFakeQuantize]:
    """Every quantizer of activations and weights, each once."""
    for module in model.modules():
        if isinstance(module, (FakeQuantize, WeightFakeQuantize)):
            yield module


def set_mode(model: nn.Module, mode: Mode) -> None:
    """Switch every quantizer of the model."""
    for quantizer in quantizers(model):
        quantizer.mode = mode
