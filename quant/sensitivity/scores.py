"""Sensitivity: what quantizing each unit costs, before anything is trained.

A unit is a placement group: its activations and the weights of the layers that read them. `fisher` (see
fisher.py) takes a gradient of the loss;

`sqnr` quantizes one unit at a time and compares the outputs with the float network's:

    score = mean over images and output maps of  |y_unit - y_float|^2 / var(y_float)      (`distillation_loss`).

Both are ratios to be ranked within one network, not accuracies.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from quant.fake_quantize import Mode
from quant.finetuning.distillation import distillation_loss, flatten_maps
from quant.insertion import placement_of, quantizers, set_mode
from quant.sensitivity.switching import SwitchedUnits


@dataclass(frozen=True)
class UnitScore:
    """Cost of one unit: its group's name, the score, and by name the figures that it was made of, if any."""

    unit: str
    score: float
    parts: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file: the parts in addition to unit and score."""
        return {"unit": self.unit, "score": self.score, **self.parts}


def measure_sqnr(
    model: fx.GraphModule, batches: Sequence[Tensor], known: Container[str] = ()
) -> Iterator[UnitScore]:
    """Yield one score per unit, in graph order: output error with that unit alone quantized.

    Args:
        model: inserted and calibrated; modes are restored at the end.
        batches: images [B, C, H, W], the first batch no smaller than the others. How images are batched makes no
            difference: each is compared by itself.
        known: names of units to leave out.
    """
    modes = [(quantizer, quantizer.mode) for quantizer in quantizers(model)]
    training = model.training
    model.eval()
    try:
        switched = SwitchedUnits(model, False, batches[0])
        with torch.inference_mode():
            set_mode(model, Mode.OFF)
            references = [model(images) for images in batches]
            units = [group.name for group in placement_of(model).groups if group.name not in known]
            for group in switched.groups(units):
                errors: dict[str, list[float]] = {unit: [] for unit in group}
                for images, wanted in zip(batches, references, strict=True):
                    for unit, outputs in zip(group, switched.outputs(group, images), strict=True):
                        errors[unit] += _output_errors(outputs, wanted)
                for unit, found in errors.items():
                    yield UnitScore(unit, sum(found) / len(found))
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
