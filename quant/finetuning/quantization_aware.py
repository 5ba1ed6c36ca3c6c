"""What quantization-aware fine-tuning adds to the training loop.

The student learns from the labels through the task loss, and from a teacher, its float copy, through distillation (see
distillation.py) of its output maps and of tensors inside the network:

    loss = task loss + distill_weight * unexplained variance of the outputs
           + feature_weight * unexplained variance of the features + dampening (see oscillation.py)

Scales of activations and weights are learned in the log domain (see fake_quantize.py) with a learning rate of their
own: a step of 0.001 is a relative change of 0.1 per cent for every scale.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.processes import BatchPart, num_processes
from quant.fake_quantize import FakeQuantize, Mode, WeightFakeQuantize
from quant.finetuning.distillation import (
    SeenValues,
    distillation_loss,
    feature_nodes,
    flatten_maps,
    images_compared,
    with_features,
)
from quant.finetuning.oscillation import OscillationTracker, dampening_loss
from quant.insertion import quantized_layers

log = logging.getLogger(__name__)
_SEEN = "seen_"  # before the names of sums in a saved state


@dataclass(frozen=True)
class FineTuningOptions:
    """What fine-tuning adds to the options of training.

    Attributes:
        scale_learning_rate: peak rate of the logarithms of scales.
        distill_weight: weight of output distillation (needs a teacher).
        feature_weight: weight of feature distillation (needs a teacher); 0 costs nothing.
        distill_images: share of the images of each batch that distillation compares, above 0 and at most 1. The
            teacher runs on these alone; another share of the batch's places follows in the next step.
        feature_patterns: names of the tensors to compare; none takes what enters the head (see distillation.py).
        dampen_weight: strength of oscillation dampening at the last step, risen to along a cosine; 0 is none.
        freeze_threshold: flips per step above which a weight is frozen in the end, fallen to from four times as
            much along a cosine; None freezes nothing.
    """

    scale_learning_rate: float = 1e-3
    distill_weight: float = 1.0
    feature_weight: float = 0.0
    distill_images: float = 1.0
    feature_patterns: tuple[str, ...] = ()
    dampen_weight: float = 0.0
    freeze_threshold: float | None = None


class QuantizationAware:
    """An extension of the training loop (`training.Extension`) for a model with quantizers switched on.

    Args:
        model: the student, from `insert`, calibrated.
        options: what to add; what is off is not computed.
        teacher: float network to distil from, set to evaluation mode and frozen; None distils nothing.

    Attributes:
        network: the student, returning (outputs, features) where features are compared.

    Raises:
        DistillationError: a feature pattern matches nothing, or the student lacks a tensor of the teacher.
    """

    def __init__(
        self, model: nn.Module, options: FineTuningOptions, teacher: nn.Module | None = None
    ) -> None:
        self.model = self.network = model
        self.options = options
        distilled = options.distill_weight > 0 or options.feature_weight > 0
        self.teacher = teacher.eval().requires_grad_(False) if teacher is not None and distilled else None
        self.with_features = self.teacher is not None and options.feature_weight > 0
        if self.teacher is not None and self.with_features:
            names = feature_nodes(self.teacher, options.feature_patterns)
            self.network, self.teacher = with_features(model, names), with_features(self.teacher, names)
        self.oscillation = OscillationTracker(model)
        self.seen = {"distillation": SeenValues(), "features": SeenValues()}
        self._has_warned = False

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The logarithms of learned scales, each once, without weight decay."""
        quantizers = [m for m in self.model.modules() if isinstance(m, (FakeQuantize, WeightFakeQuantize))]
        scales = {id(quantizer.log_scale) for quantizer in quantizers}
        learned = [p for p in self.model.parameters() if p.requires_grad and id(p) in scales]
        rate = self.options.scale_learning_rate
        return [{"name": "scales", "params": learned, "peak": rate, "weight_decay": 0.0}]

    def losses(
        self, outputs: Any, images: Tensor, progress: float, part: BatchPart
    ) -> tuple[Any, dict[str, Tensor]]:
        """The student's raw maps, and the terms of distillation and dampening."""
        raw, features = outputs if self.with_features else (outputs, ())
        options = self.options
        terms: dict[str, Tensor] = {}
        if self.teacher is not None:
            terms |= self._distillation(raw, features, images, part)
        if options.dampen_weight > 0:
            weight = (
                options.dampen_weight * _rise(progress) / num_processes()
            )  # the weights are the same in all
            terms["dampening"] = weight * dampening_loss(self.model)
        return raw, terms

    def _distillation(self, raw: Any, features: Any, images: Tensor, part: BatchPart) -> dict[str, Tensor]:
        """The terms of the images that are compared; the student's pass was over all, and theirs is cut out of it."""
        assert self.teacher is not None
        options, terms = self.options, {}
        raw, features = flatten_maps(raw), flatten_maps(features)
        if options.distill_images < 1 and self._are_of_images([*raw, *features], images):
            compared = images_compared(options.distill_images, part)
            images = images[compared]
            raw, features = ([values[compared] for values in maps] for maps in (raw, features))
        seen = self.seen if options.distill_images < 1 else {}
        reference, wanted = raw, features
        if len(images) > 0:
            with torch.no_grad():
                answers = self.teacher(images)
            reference, wanted = answers if self.with_features else (answers, ())
        if options.distill_weight > 0:
            terms["distillation"] = options.distill_weight * distillation_loss(
                raw, reference, seen=seen.get("distillation")
            )
        if self.with_features:
            terms["features"] = options.feature_weight * distillation_loss(
                features, wanted, seen=seen.get("features")
            )
        return terms

    def _are_of_images(self, maps: list[Tensor], images: Tensor) -> bool:
        """Whether the first axis of every map is that of the images; says so once where it is not."""
        if all(values.shape[:1] == images.shape[:1] for values in maps):
            return True
        if not self._has_warned:
            log.warning(
                "distillation compares all images of each batch (distill_images=%g would be faster): the first axis of "
                "an output of the network is not that of the images",
                self.options.distill_images,
            )
            self._has_warned = True
        return False

    def after_step(self, progress: float) -> None:
        """Count the weights that flipped, and freeze those that flip too often."""
        for values in self.seen.values():
            values.after_step()
        limit = self.options.freeze_threshold
        self.oscillation.update(None if limit is None else limit * (4.0 - 3.0 * _rise(progress)))

    def after_epoch(self, average: nn.Module | None) -> dict[str, float]:
        """Settle weight scales that are not learned; returns the shares of weights that oscillate and are frozen."""
        _settle_scales(self.model)
        if average is not None:
            _settle_scales(average)
        return self.oscillation.shares()

    def state_dict(self) -> dict[str, Any]:
        """The counts of oscillations, and the sums of the teacher's values so far."""
        seen = {
            _SEEN + name: values.earlier for name, values in self.seen.items() if values.earlier is not None
        }
        return {**self.oscillation.state_dict(), **seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; raises ValueError where it is of another network."""
        self.oscillation.load_state_dict(
            {name: value for name, value in state.items() if not name.startswith(_SEEN)}
        )
        device = next(self.model.parameters()).device
        for name, values in self.seen.items():
            earlier = state.get(_SEEN + name)
            values.earlier = None if earlier is None else earlier.to(device)


def _rise(progress: float) -> float:
    """Half a cosine: 0 at the first step, 1 at the last."""
    return 0.5 * (1.0 - math.cos(math.pi * progress))


def _settle_scales(model: nn.Module) -> None:
    """Bring weight scales that are not learned to the weights of the last step (in training they lag one step)."""
    for layer in quantized_layers(model).values():
        quantizer = layer.weight_quantizer
        if quantizer.mode is Mode.QUANTIZE and not quantizer.learned:
            quantizer.follow(layer.weight)
