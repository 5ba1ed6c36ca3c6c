"""Layer-by-layer repair of a calibrated model: rounding that fits the data, and biases without a mean error.

The graph is walked once. At every quantized layer three things are known: its input and output in the float network,
and its input in the quantized one, with all layers before it repaired already. Two repairs, each optional:

*Greedy rounding* (the problem of AdaRound, Nagel et al., arXiv:2004.10568, solved otherwise): each weight goes to the
code below or above it, such that the layer's output on the data, not the weight, changes least. With X the layer's
inputs in the quantized network, Y what the float weights make of them, and w one row of weights, the error is
quadratic,

    |w X - y|^2  =  w H w' - 2 w g' + const,      H = X X',   g = y X'

so flipping weight j by d changes it by  2 d (w H - g)_j + d^2 H_jj. The paper relaxes the choice and descends a
gradient; here the best flip of every row is made until none helps. That needs no learning rate, ends after a bounded
number of steps, and is never worse than rounding to nearest.

*Bias correction* (Nagel et al., arXiv:1906.04721, section 4.2, the empirical form): the mean of every output channel
over the images is moved back to where it is in float.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from core.grid import Grid
from quant.fake_quantize import FakeQuantize, Mode
from quant.insertion import set_mode
from quant.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear

Visit = Callable[[str, QuantizedLayer, Tensor, Tensor], None]
MAX_PATCHES = 8192  # input patches that the rounding of one layer looks at


@dataclass(frozen=True)
class LayerRepair:
    """What was done to one layer.

    Attributes:
        layer: its name.
        error_nearest: mean squared output error on the data with weights rounded to nearest; None if not rounded anew.
        error_rounded: the same with the chosen rounding.
        shift: largest mean error of an output channel that was taken out; None if its bias was left alone.
    """

    layer: str
    error_nearest: float | None = None
    error_rounded: float | None = None
    shift: float | None = None


def reconstruct(
    model: fx.GraphModule, images: Tensor, rounding: bool = True, correct_bias: bool = True
) -> list[LayerRepair]:
    """Repair the layers of an inserted and calibrated model in place; all its quantizers are switched on at the end.

    Left alone are layers that are called several times, the rounding of FP8 weights and of grouped and transposed
    convolutions, and biases that do not exist. Weights rounded anew lie on the grid, so that their quantizer hands them
    on unchanged.

    Args:
        model: result of `insert` after `calibrate`.
        images: [B, C, H, W], prepared as for inference; all pass through the network at once.
        rounding: choose the rounding of the weights by the layers' outputs.
        correct_bias: take the mean error out of every output channel.
    """
    repairs = []

    def visit(name: str, layer: QuantizedLayer, x: Tensor, target: Tensor) -> None:
        nearest = rounded = shift = None
        if rounding and _can_round(layer):
            nearest, rounded = round_by_output(layer, x, _with_float_weights(layer, x))
        if correct_bias and layer.bias is not None:
            error = _by_channel(layer, layer(x)).double().mean(0) - _by_channel(layer, target).double().mean(
                0
            )
            layer.bias -= error.to(layer.bias.dtype)
            shift = float(error.abs().max())
        repairs.append(LayerRepair(name, nearest, rounded, shift))

    model.eval()
    set_mode(model, Mode.QUANTIZE)
    with torch.no_grad():
        _walk(model, images, visit)
    return repairs


def _walk(model: fx.GraphModule, images: Tensor, visit: Visit) -> None:
    """Run the float and the quantized network side by side.

    At every quantized layer that is called once, `visit` is given its name, the layer, its quantized input and its
    float output, before its quantized output is computed.
    """
    calls = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]
    last_use = {source: node for node in model.graph.nodes for source in node.all_input_nodes}
    values: dict[fx.Node, tuple[Any, Any]] = {}
    exact: fx.Interpreter = fx.Interpreter(model)
    for node in model.graph.nodes:
        if node.op == "output":
            return
        if node.op == "placeholder":
            values[node] = (images, images)
            continue
        sides = [_arguments(node, values, side) for side in (0, 1)]
        values[node] = _both(exact, node, sides, visit, calls.count(str(node.target)) == 1)
        for source in node.all_input_nodes:
            if last_use[source] is node:
                del values[source]


def _arguments(node: fx.Node, values: dict[fx.Node, tuple[Any, Any]], side: int) -> list[Any]:
    """What the node is given in one of the two networks: arguments, and named ones."""

    def value(source: fx.Node) -> Any:
        return values[source][side]

    return [fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value)]


def _both(
    interpreter: fx.Interpreter, node: fx.Node, sides: list[list[Any]], visit: Visit, once: bool
) -> tuple[Any, Any]:
    """The node's value in the float and in the quantized network."""
    run = getattr(interpreter, node.op)
    (exact, exact_options), (rounded, rounded_options) = sides
    module = interpreter.module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, FakeQuantize):
        return exact[0], module(rounded[0])
    if not isinstance(module, QuantizedLayer):
        return run(node.target, exact, exact_options), run(node.target, rounded, rounded_options)
    module.weight_quantizer.mode = Mode.OFF
    target = module(exact[0])
    module.weight_quantizer.mode = Mode.QUANTIZE
    if once:
        visit(str(node.target), module, rounded[0], target)
    return target, module(rounded[0])


def _with_float_weights(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """What rounding is to come close to.

    The paper takes the float network's output instead, so that weights also make up for the errors of earlier
    layers; at 8 bits these are the larger part, they differ from image to image, and flips learn those of the few
    images.
    """
    layer.weight_quantizer.mode = Mode.OFF
    output: Tensor = layer(x)
    layer.weight_quantizer.mode = Mode.QUANTIZE
    return output


def _by_channel(layer: QuantizedLayer, output: Tensor) -> Tensor:
    """A layer's output as [everything else, channels]."""
    axis = -1 if isinstance(layer, nn.Linear) else 1
    return output.movedim(axis, -1).flatten(0, -2)


def _can_round(layer: QuantizedLayer) -> bool:
    if layer.weight_quantizer.grid.is_fp8:
        return False
    return isinstance(layer, QuantizedLinear) or (isinstance(layer, QuantizedConv2d) and layer.groups == 1)


def round_by_output(layer: QuantizedLayer, x: Tensor, target: Tensor) -> tuple[float, float]:
    """Round a layer's weights, in place, so that its outputs for x are close to a target.

    Args:
        layer: calibrated linear layer or ungrouped 2-D convolution.
        x: its quantized input.
        target: its float output.

    Returns:
        Mean squared output errors over the input patches looked at: rounded to nearest, and as chosen.
    """
    columns, wanted = _patches(layer, x, target)
    if layer.bias is not None:
        wanted = wanted - layer.bias
    gram, cross = columns.T @ columns, wanted.T @ columns  # [K, K], [C, K]
    quantizer = layer.weight_quantizer
    weight = layer.weight.flatten(1).float()
    scale = quantizer.scale[:, None]
    codes = choose_codes(weight / scale, scale, gram, cross, quantizer.grid)

    def error(rows: Tensor) -> float:
        return float((columns @ rows.T - wanted).square().mean())

    nearest = quantizer.grid.round(weight, scale)
    result = error(nearest), error(codes * scale)
    layer.weight.copy_((codes * scale).reshape(layer.weight.shape))
    quantizer.set_scale(quantizer.scale, layer.weight)  # the proportion to the largest weight has changed
    return result


def choose_codes(position: Tensor, scale: Tensor, gram: Tensor, cross: Tensor, grid: Grid) -> Tensor:
    """For each weight the code below or above, found by flipping the best one of every row until none helps.

    Args:
        position: weights over their scale, [C, K].
        scale: [C, 1].
        gram: inputs' second moments X X', [K, K].
        cross: outputs' products with the inputs y X', [C, K].
        grid: the codes.

    Returns:
        Codes, [C, K]; no row's error is above that of rounding to nearest.
    """
    below = position.floor().clamp(grid.low, grid.high)
    above = position.ceil().clamp(grid.low, grid.high)
    codes = grid.codes(position, 1.0)
    slope = (codes * scale) @ gram - cross
    power = gram.diagonal()
    rows = torch.arange(len(codes), device=codes.device)
    for _ in range(codes.shape[1]):
        step = (below + above - 2 * codes) * scale  # to the other code; 0 where there is none
        gain = step * (2 * slope + step * power)
        best, where = gain.min(1)
        change = torch.where(best < 0, step[rows, where], 0.0)
        if not bool((change != 0).any()):
            break
        codes[rows, where] += change / scale[:, 0]
        slope += change[:, None] * gram[where]
    return codes.round()


def _patches(layer: QuantizedLayer, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs [N, K] of output values and the values [N, C], evenly spread over images and positions."""
    if not isinstance(layer, QuantizedConv2d):
        chosen = _spread(x[..., 0].numel(), MAX_PATCHES, x.device)
        return x.flatten(0, -2)[chosen].float(), target.flatten(0, -2)[chosen].float()
    chosen = _spread(target[0, 0].numel(), max(MAX_PATCHES // len(x), 1), x.device)
    windows = []
    for image in x.float().split(1):  # one at a time: all windows of a large image take memory
        unfolded = F.unfold(image, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
        windows.append(unfolded[0][:, chosen].T)
    return torch.cat(windows), target.float().flatten(2)[:, :, chosen].transpose(1, 2).flatten(0, 1)


def _spread(count: int, most: int, device: torch.device) -> Tensor:
    """Evenly spread positions among `count`, `most` at most."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64, device=device).round().long()
