"""Sensitivity: what quantizing each unit costs, before anything is trained.

A unit is a placement group: its activations and the weights of the layers that read them. Two methods:

`fisher` needs one backward pass per image of the float network. For a unit with values x, quantized values Q(x)
and loss gradient g, the expected rise of the loss is, to second order and with the diagonal of the Fisher
information instead of the Hessian (FIT, arXiv:2210.08502),

    score = mean over images of  sum g^2 (Q(x) - x)^2,     weights and activations added.

The same sum is the expected square of the loss's first-order change g (Q(x) - x) where rounding errors are independent:
it says how far the loss moves, up or down.

`sqnr` quantizes one unit at a time and compares the outputs with the float network's:

    score = mean over images and output maps of  |y_unit - y_float|^2 / var(y_float)      (`distillation_loss`).

Both are ratios to be ranked within one network, not accuracies.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from core.errors import ConfigError
from core.types import TaskLoss
from quant.calibration.calibrate import Gather
from quant.fake_quantize import FakeQuantize, Mode, WeightFakeQuantize
from quant.finetuning.distillation import distillation_loss, flatten_maps
from quant.insertion import activation_quantizers, placement_of, quantized_layers, quantizers, set_mode
from quant.layers import QuantizedLayer


@dataclass(frozen=True)
class UnitScore:
    """Cost of one unit: its group's name, the score, and by name the figures that it was made of, if any."""

    unit: str
    score: float
    parts: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file: the parts in addition to unit and score."""
        return {"unit": self.unit, "score": self.score, **self.parts}


def measure_fisher(
    model: fx.GraphModule,
    batches: Iterable[tuple[Tensor, Sequence[Any]]],
    task_loss: TaskLoss,
    gather: Gather | None = None,
) -> list[UnitScore]:
    """Score every unit with one backward pass per image; the most sensitive unit comes first.

    The gradients are those of each image's own loss, so that the scores do not depend on how images are batched.

    Args:
        model: inserted and calibrated; its weights, modes and gradients are left as they were.
        batches: images [B, C, H, W], and for each image its targets as the task loss takes them for a batch of one.
        task_loss: the loss whose rise counts.
        gather: where several processes take the images in turn, one after the other: collects an item from all of them.
            The images' figures are added up in their order, so that the scores are those of one process.

    Raises:
        ConfigError: no image.
        ValueError: a batch with another number of targets than images.
    """
    groups = activation_quantizers(model)
    layers = quantized_layers(model)
    errors = [_rounding_error(layer) for layer in layers.values()]
    weights = [layer.weight for layer in layers.values()]
    found: list[tuple[list[float], list[float]]] = []  # of each image: by activation, by layer
    with _probing(model, groups) as probes, torch.enable_grad():
        for image, target in _single_images(batches):
            size = (int(image.shape[-2]), int(image.shape[-1]))
            image.requires_grad_()  # or its quantizer would get no gradient
            loss = torch.stack(list(task_loss(model(image), target, size).values())).sum()
            _, *gradients = torch.autograd.grad(loss, [image, *weights], allow_unused=True)
            of_weights = [
                0.0 if gradient is None else float(torch.dot(gradient.square().flatten(), error.flatten()))
                for gradient, error in zip(gradients, errors, strict=True)
            ]
            found.append(([probe.take() for probe in probes.values()], of_weights))
    shares = [found] if gather is None else gather(found)
    ordered = [image for turn in itertools.zip_longest(*shares) for image in turn if image is not None]
    num_images = len(ordered)
    if num_images == 0:
        raise ConfigError("sensitivity got no image: raise sensitivity.images above 0")
    activation_sums = {name: sum(image[0][index] for image in ordered) for index, name in enumerate(groups)}
    weight_sums = {name: sum(image[1][index] for image in ordered) for index, name in enumerate(layers)}
    scores = []
    for group in placement_of(model).groups:
        parts = {
            "activations": activation_sums[group.name] / num_images,
            "weights": sum(weight_sums[layer] for layer in group.layers) / num_images,
        }
        scores.append(UnitScore(group.name, sum(parts.values()), parts))
    return sorted(scores, key=lambda score: -score.score)


def _single_images(batches: Iterable[tuple[Tensor, Sequence[Any]]]) -> Iterator[tuple[Tensor, Any]]:
    """Every image [1, C, H, W] with its targets."""
    for images, targets in batches:
        if len(images) != len(targets):
            raise ValueError(
                f"a batch of {len(images)} images has {len(targets)} targets; expected one per image, each in the "
                "form that the task loss takes for a batch of one"
            )
        yield from zip(images.detach().split(1), targets, strict=True)


def _rounding_error(layer: QuantizedLayer) -> Tensor:
    """Squared rounding and clipping error of every weight of a layer, [shape of the weight]."""
    weight, quantizer = layer.weight.detach(), layer.weight_quantizer
    return (quantizer.grid.round(weight, quantizer.steps(weight.ndim)) - weight).square()


def measure_sqnr(
    model: fx.GraphModule, batches: Sequence[Tensor], known: Container[str] = ()
) -> Iterator[UnitScore]:
    """Yield one score per unit, in graph order: output error with that unit alone quantized.

    Args:
        model: inserted and calibrated; modes are restored at the end.
        batches: images [B, C, H, W], used once for the reference and once per unit. How images are batched makes no
            difference: each is compared by itself.
        known: names of units to leave out.
    """
    groups = activation_quantizers(model)
    layers = quantized_layers(model)
    modes = [(quantizer, quantizer.mode) for quantizer in quantizers(model)]
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            set_mode(model, Mode.OFF)
            references = [model(images) for images in batches]
            for group in placement_of(model).groups:
                if group.name in known:
                    continue
                parts: list[FakeQuantize | WeightFakeQuantize] = [groups[group.name]]
                parts += [layers[name].weight_quantizer for name in group.layers]
                for part in parts:
                    part.mode = Mode.QUANTIZE
                pairs = zip(batches, references, strict=True)
                found = [error for images, wanted in pairs for error in _output_errors(model(images), wanted)]
                for part in parts:
                    part.mode = Mode.OFF
                yield UnitScore(group.name, sum(found) / len(found))
    finally:
        for quantizer, mode in modes:
            quantizer.mode = mode
        model.train(training)


def _output_errors(outputs: Any, references: Any) -> Iterator[float]:
    """Unexplained variance of each image's output maps."""
    pairs = list(zip(flatten_maps(outputs), flatten_maps(references), strict=True))
    for index in range(len(pairs[0][0])):
        image = slice(index, index + 1)
        yield float(
            distillation_loss([found[image] for found, _ in pairs], [wanted[image] for _, wanted in pairs])
        )


class _Probe:
    """Watches the tensor that passes a quantizer: adds up g^2 (Q(x) - x)^2 in the backward pass."""

    def __init__(self, quantizer: FakeQuantize) -> None:
        self.quantizer = quantizer
        self.total: Tensor | None = None

    def watch(self, x: Tensor) -> Tensor:
        """Return x with a gradient hook."""
        with torch.no_grad():
            error = self.quantizer.grid.round(x.float(), self.quantizer.scale).sub_(x).square_()

        def add(gradient: Tensor) -> None:
            found = torch.dot(gradient.float().square().reshape(-1), error.reshape(-1))
            self.total = found if self.total is None else self.total + found

        if x.requires_grad:
            x.register_hook(add)
        return x

    def take(self) -> float:
        """The sum since the last call."""
        total, self.total = self.total, None
        return 0.0 if total is None else float(total)


@contextmanager
def _probing(model: fx.GraphModule, groups: dict[str, FakeQuantize]) -> Iterator[dict[str, _Probe]]:
    """Run the float network with a probe at every activation quantizer."""
    modes = [(quantizer, quantizer.mode) for quantizer in quantizers(model)]
    training = model.training
    model.eval()
    set_mode(model, Mode.OFF)
    probes = {name: _Probe(quantizer) for name, quantizer in groups.items()}
    handles = []
    for name, observed in groups.items():
        handles.append(observed.register_forward_hook(_hook(probes[name].watch)))
    try:
        yield probes
    finally:
        for handle in handles:
            handle.remove()
        for quantizer, mode in modes:
            quantizer.mode = mode
        model.train(training)


def _hook(watch: Callable[[Tensor], Tensor]) -> Callable[[Any, Any, Tensor], Tensor]:
    return lambda _module, _inputs, output: watch(output)
