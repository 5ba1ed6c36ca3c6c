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
from torch.utils._pytree import tree_leaves, tree_map_only

from core.errors import ConfigError
from core.types import TaskLoss
from quant.calibration.calibrate import Gather
from quant.fake_quantize import Mode
from quant.insertion import activation_quantizers, placement_of, quantized_layers, quantizers, set_mode
from quant.sensitivity.probes import LayerProbe, Probe, QuantizerProbe, SiLUProbe
from quant.sensitivity.scores import UnitScore

Figures = list[list[float]]  # of each image of a batch: the sums of all activations, then of all layers
Kept = Callable[[int, Callable[[], Figures]], Figures]


def measure_fisher(
    model: fx.GraphModule,
    batches: Iterable[tuple[Tensor, Sequence[Any]]],
    task_loss: TaskLoss,
    gather: Gather | None = None,
    kept: Kept = lambda number, compute: compute(),
    products: torch.dtype = torch.float32,
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
        products: bfloat16 multiplies gradients in that type, faster on a processor that has such products: scores
            move by less than 2 %, in the median by 0.2 %.

    Raises:
        ConfigError: no image.
        ValueError: a batch with another number of targets than images.
    """
    found = []
    with _probing(model, products) as measure:
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


_Measure = Callable[[Tensor, Sequence[Any], TaskLoss], Figures]


@contextmanager
def _probing(model: fx.GraphModule, products: torch.dtype) -> Iterator[_Measure]:
    """Watch all activations and layers of the float network; gives what measures one batch."""
    modes = [(quantizer, quantizer.mode) for quantizer in quantizers(model)]
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = model.training
    model.eval().requires_grad_(False)
    set_mode(model, Mode.OFF)
    activations = [QuantizerProbe(quantizer) for quantizer in activation_quantizers(model).values()]
    layers = [LayerProbe(layer, products) for layer in quantized_layers(model).values()]
    silus = [
        SiLUProbe(module) for module in model.modules() if type(module) is nn.SiLU and not module.inplace
    ]
    try:
        with ExitStack() as hooks:
            for watcher in activations:
                hooks.callback(watcher.module.register_forward_hook(watcher.watch).remove)
            for probe in itertools.chain[LayerProbe | SiLUProbe](layers, silus):
                hooks.callback(probe.module.register_forward_hook(probe.watch).remove)
                hooks.callback(probe.module.register_forward_pre_hook(probe.enter).remove)
            yield partial(_measure, model, [*activations, *layers])
    finally:
        for quantizer, mode in modes:
            quantizer.mode = mode
        model.train(training)
        for parameter in learned:
            parameter.requires_grad_()


@torch.enable_grad()
def _measure(
    model: fx.GraphModule,
    probes: Sequence[Probe],
    images: Tensor,
    targets: Sequence[Any],
    task_loss: TaskLoss,
) -> Figures:
    """The sums of each image of a batch."""
    images = images.detach().requires_grad_()
    size = int(images.shape[-2]), int(images.shape[-1])
    outputs = model(images)
    slopes = [
        _slopes(image_of(outputs, index), target, size, task_loss) for index, target in enumerate(targets)
    ]
    maps = [values for values in tree_leaves(outputs) if isinstance(values, Tensor) and values.requires_grad]
    gradients = [torch.cat(parts) for parts in zip(*slopes, strict=True)]
    leaves = [leaf for probe in probes if isinstance(probe, LayerProbe) for leaf in probe.leaves]
    torch.autograd.grad(maps, [images, *leaves], gradients, allow_unused=True)
    figures: Figures = torch.stack([probe.take(images) for probe in probes], dim=1).tolist()
    return figures


def _slopes(outputs: Any, target: Any, size: tuple[int, int], task_loss: TaskLoss) -> list[Tensor]:
    """The gradient of one image's loss for each output that has one."""
    outputs = tree_map_only(
        Tensor, lambda values: values.detach().requires_grad_(values.requires_grad), outputs
    )
    maps = [values for values in tree_leaves(outputs) if isinstance(values, Tensor) and values.requires_grad]
    loss = torch.stack(list(task_loss(outputs, target, size).values())).sum()
    if not loss.requires_grad:
        return [torch.zeros_like(values) for values in maps]
    return list(torch.autograd.grad(loss, maps, materialize_grads=True))


def image_of(outputs: Any, index: int) -> Any:
    """The outputs of one image of a batch."""
    return tree_map_only(Tensor, lambda values: values[index : index + 1], outputs)
