"""Sensitivity by Fisher information: one forward and one backward pass over the images score every unit.

For a unit with values x, quantized values Q(x) and loss gradient g, the expected rise of the loss is, to second order
and with the diagonal of the Fisher information instead of the Hessian (FIT, arXiv:2210.08502),

    score = mean over images of  sum g^2 (Q(x) - x)^2,     weights and activations added.

The same sum is the expected square of the loss's first-order change g (Q(x) - x) where rounding errors are independent:
it says how far the loss moves, up or down.

The gradients are those of each image's own loss. Images still pass through the network in batches: a gradient
for activations has the image as its first axis, and the gradient for a layer's weights is computed from the layer's
input and the gradient of its output, image by image, instead of by autograd, which would add the images up.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from core.errors import ConfigError
from core.types import TaskLoss
from quant.calibration.calibrate import Gather
from quant.fake_quantize import FakeQuantize, Mode
from quant.insertion import activation_quantizers, placement_of, quantized_layers, quantizers, set_mode
from quant.layers import QuantizedConv2d, QuantizedConvTranspose2d, QuantizedLayer, QuantizedLinear
from quant.native.statistics import squared_changes, squared_weight_changes
from quant.rounding import round_to_grid
from quant.sensitivity.scores import UnitScore

Figures = list[list[float]]  # of each image of a batch: the sums of all activations, then of all layers
Kept = Callable[[int, Callable[[], Figures]], Figures]
PIECE = 1 << 17  # values rounded at a time on a CPU, so that they stay in its cache


def measure_fisher(
    model: fx.GraphModule,
    batches: Iterable[tuple[Tensor, Sequence[Any]]],
    task_loss: TaskLoss,
    gather: Gather | None = None,
    kept: Kept = lambda number, compute: compute(),
) -> list[UnitScore]:
    """Score every unit with one backward pass per batch; the most sensitive unit comes first.

    Args:
        model: inserted and calibrated; its weights, modes and gradients are left as they were.
        batches: images [B, C, H, W], and for each image its targets as the task loss takes them for a batch of one.
            How images are batched changes no more than the last digits.
        task_loss: the loss whose rise counts.
        gather: where several processes take the batches in turn, one after the other: collects an item from all of
            them. The images' figures are added up in their order, so that the scores are those of one process.
        kept: given the number of a batch of this process and what computes its figures, returns them; a caller can
            keep them, for a run that is stopped.

    Raises:
        ConfigError: no image.
        ValueError: a batch with another number of targets than images.
    """
    found = []
    with _probing(model) as measure:
        for number, (images, targets) in enumerate(batches):
            if len(images) != len(targets):
                raise ValueError(
                    f"a batch of {len(images)} images has {len(targets)} targets; expected one per image, each in the "
                    "form that the task loss takes for a batch of one"
                )
            found.append(kept(number, partial(measure, images, targets, task_loss)))
    shares = [found] if gather is None else gather(found)
    turns = itertools.zip_longest(*shares, fillvalue=())
    images_in_order = [image for turn in turns for batch in turn for image in batch]
    if not images_in_order:
        raise ConfigError("sensitivity got no image: raise sensitivity.images above 0")
    means = [sum(sums) / len(images_in_order) for sums in zip(*images_in_order, strict=True)]
    return _scores(model, means)


def _scores(model: fx.GraphModule, means: list[float]) -> list[UnitScore]:
    """The units by falling score, from the means over the images in the order of `Figures`."""
    groups, layers = activation_quantizers(model), quantized_layers(model)
    of_groups, of_layers = (
        dict(zip(groups, means, strict=False)),
        dict(zip(layers, means[len(groups) :], strict=True)),
    )
    scores = []
    for group in placement_of(model).groups:
        parts = {
            "activations": of_groups[group.name],
            "weights": sum(of_layers[layer] for layer in group.layers),
        }
        scores.append(UnitScore(group.name, sum(parts.values()), parts))
    return sorted(scores, key=lambda score: -score.score)


class _Sums:
    """Sums by image of g^2 (Q(x) - x)^2, of one activation quantizer or layer."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parts: list[Tensor] = []

    def take(self, images: Tensor) -> Tensor:
        """The sums since the last call, [B]; 0 where there was no gradient."""
        parts, self.parts = self.parts, []
        return torch.stack(parts).sum(0) if parts else images.new_zeros(len(images))


class _Activations(_Sums):
    """Watches the tensors that pass a quantizer."""

    def __init__(self, quantizer: FakeQuantize) -> None:
        super().__init__(quantizer)
        self.quantizer = quantizer

    def watch(self, _module: Any, _inputs: Any, output: Tensor) -> None:
        """The quantizer's forward hook."""
        x = output.detach()  # a hook that held `output` itself would be a cycle
        if output.requires_grad:
            output.register_hook(lambda gradient: self.parts.append(self._sums(x, gradient)))

    def _sums(self, x: Tensor, gradient: Tensor) -> Tensor:
        scale, grid = float(self.quantizer.scale), self.quantizer.grid
        found = squared_changes(x, gradient, scale, grid)
        if found is None and gradient.stride() != x.stride():
            gradient = torch.empty_like(x).copy_(gradient)
            found = squared_changes(x, gradient, scale, grid)
        return self._sums_in_torch(x, gradient) if found is None else found

    def _sums_in_torch(self, x: Tensor, gradient: Tensor) -> Tensor:
        order = [0, *sorted(range(1, x.ndim), key=x.stride, reverse=True)]  # as they lie in memory: no copies
        x, gradient = x.permute(order).flatten(1), gradient.permute(order).flatten(1)
        if x.device.type != "cpu" or x.numel() <= PIECE:
            return self._sum(x, gradient)
        pairs = zip(x.split(1), gradient.split(1), strict=True)
        return torch.cat([self._sum_of_pieces(*pair) for pair in pairs])

    def _sum_of_pieces(self, x: Tensor, gradient: Tensor) -> Tensor:
        sums = map(self._sum, x.split(PIECE, 1), gradient.split(PIECE, 1))
        return torch.stack(list(sums)).sum(0)

    def _sum(self, x: Tensor, gradient: Tensor) -> Tensor:
        change = round_to_grid(x, self.quantizer.scale, self.quantizer.grid)
        return change.sub_(x).mul_(gradient).square_().sum(1)


class _Weights(_Sums):
    """Watches the inputs and the output gradients of a layer."""

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__(layer)
        self.layer = layer
        quantizer, weight = layer.weight_quantizer, layer.weight.detach()
        self.error = quantizer.grid.round(weight, quantizer.steps(weight.ndim)).sub_(weight)
        self.error_channels_last = self.error.permute(0, 2, 3, 1).contiguous() if _is_plain(layer) else None
        self.num_calls = 0
        self.gradients: Tensor | None = None  # of each image, where the layer is called several times
        self.leaves: list[Tensor] = []  # inputs that no gradient would reach

    def enter(self, _module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """The layer's forward pre-hook: an input without a gradient, such as one after `detach`, gets one."""
        if inputs[0].requires_grad:
            return None
        self.leaves.append(inputs[0].detach().requires_grad_())
        return self.leaves[-1], *inputs[1:]

    def watch(self, _module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """The layer's forward hook."""
        x = inputs[0].detach()
        self.num_calls += 1
        if output.requires_grad:
            output.register_hook(lambda gradient: self._add(x, gradient))

    def _add(self, x: Tensor, gradient: Tensor) -> None:
        if self.num_calls == 1 and (sums := self._sums_of_one_call(x, gradient)) is not None:
            self.parts.append(sums)
            return
        found = weight_gradients(self.layer, x, gradient)
        if self.num_calls == 1:
            self.parts.append(self._sum(found))
        else:
            self.gradients = found if self.gradients is None else self.gradients + found

    def _sums_of_one_call(self, x: Tensor, gradient: Tensor) -> Tensor | None:
        """The sums without a tensor of gradients; None where there is no kernel for it."""
        layer = self.layer
        if self.error_channels_last is None or x.ndim != 4:
            return None
        assert isinstance(layer, QuantizedConv2d)
        assert not isinstance(layer.padding, str)
        return squared_weight_changes(x, gradient, self.error_channels_last, layer.stride, layer.padding)

    def _sum(self, gradients: Tensor) -> Tensor:
        return gradients.mul_(self.error).square_().flatten(1).sum(1)

    def take(self, images: Tensor) -> Tensor:
        """As in the base class."""
        if self.gradients is not None:
            self.parts.append(self._sum(self.gradients))
        self.gradients, self.num_calls = None, 0
        self.leaves.clear()
        return super().take(images)


def weight_gradients(layer: QuantizedLayer, x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient for a layer's weight in float, of each image by itself: [B, shape of the weight].

    Args:
        layer: the layer, whose quantizer is off.
        x: its input, [B, ...].
        gradient: the gradient of the loss for its output.
    """
    if isinstance(layer, QuantizedLinear):
        rows = (values.reshape(len(values), -1, values.shape[-1]) for values in (gradient, x))
    elif isinstance(layer, QuantizedConv2d) and _is_pointwise(layer):
        rows = (values.permute(0, 2, 3, 1).flatten(1, 2) for values in (gradient, x))
    else:
        pairs = zip(x.split(1), gradient.split(1), strict=True)
        return torch.stack([_convolution_gradient(layer, *pair) for pair in pairs])
    outputs, inputs = rows
    return torch.bmm(outputs.transpose(1, 2), inputs).reshape(-1, *layer.weight.shape)


def _is_plain(layer: QuantizedLayer) -> bool:
    """Whether the kernel computes the layer's sums."""
    if not isinstance(layer, QuantizedConv2d) or isinstance(layer.padding, str):
        return False
    return layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"


def _is_pointwise(layer: QuantizedConv2d) -> bool:
    plain = layer.kernel_size == layer.stride == (1, 1) and layer.groups == 1
    return plain and layer.padding in ((0, 0), "valid", "same")


def _convolution_gradient(layer: QuantizedLayer, x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient for a convolution's weight, of one image."""
    assert not isinstance(layer, QuantizedLinear)
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        weight = layer.weight.detach().requires_grad_()
        with torch.enable_grad():
            output = layer._conv_forward(x, weight, None)  # type: ignore[operator, union-attr]
        return torch.autograd.grad(output, weight, gradient)[0]
    transposed = isinstance(layer, QuantizedConvTranspose2d)
    found: Tensor = torch.ops.aten.convolution_backward(
        gradient, x, layer.weight, None, layer.stride, layer.padding, layer.dilation, transposed,
        layer.output_padding, layer.groups, (False, True, False),
    )[1]  # fmt: skip
    return found


_Measure = Callable[[Tensor, Sequence[Any], TaskLoss], Figures]


@contextmanager
def _probing(model: fx.GraphModule) -> Iterator[_Measure]:
    """Watch all activations and layers of the float network; gives what measures one batch."""
    modes = [(quantizer, quantizer.mode) for quantizer in quantizers(model)]
    training = model.training
    model.eval()
    set_mode(model, Mode.OFF)
    activations = [_Activations(quantizer) for quantizer in activation_quantizers(model).values()]
    weights = [_Weights(layer) for layer in quantized_layers(model).values()]
    watched: list[_Activations | _Weights] = [*activations, *weights]

    def measure(images: Tensor, targets: Sequence[Any], task_loss: TaskLoss) -> Figures:
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            outputs, size = model(images), (int(images.shape[-2]), int(images.shape[-1]))
            losses = [
                term
                for index, target in enumerate(targets)
                for term in task_loss(image_of(outputs, index), target, size).values()
            ]
            leaves = [leaf for sums in weights for leaf in sums.leaves]
            torch.autograd.grad(torch.stack(losses).sum(), [images, *leaves], allow_unused=True)
        figures: Figures = torch.stack([sums.take(images) for sums in watched], dim=1).tolist()
        return figures

    try:
        with ExitStack() as hooks:
            for sums in watched:
                hooks.callback(sums.module.register_forward_hook(sums.watch).remove)
            for layer in weights:
                hooks.callback(layer.module.register_forward_pre_hook(layer.enter).remove)
            yield measure
    finally:
        for quantizer, mode in modes:
            quantizer.mode = mode
        model.train(training)


def image_of(outputs: Any, index: int) -> Any:
    """The outputs of one image of a batch."""
    return tree_map_only(Tensor, lambda values: values[index : index + 1], outputs)
