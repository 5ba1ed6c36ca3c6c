"""The training loop: quantization-aware fine-tuning, and float training with the same code.

The student learns from two teachers at once. The task loss (given as a function, so that this room needs to know no
detector) keeps it on the labels; distillation (see distillation.py) keeps its output maps, and tensors inside the
network, on the float copy's:

    loss = task_weight * sum(task terms) + distill_weight * unexplained variance of the outputs
           + feature_weight * unexplained variance of the features + dampening (see oscillation.py)

Scales are learned in the log domain (see fake_quantize.py) with a learning rate of their own: a step of 0.001 is
a relative change of 0.1 per cent for every scale.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import DivergenceError
from quant.fake_quantize import FakeQuantize, Mode, WeightFakeQuantize
from quant.finetuning.distillation import distillation_loss, feature_nodes, with_features
from quant.finetuning.oscillation import OscillationTracker, dampening_loss
from quant.insertion import quantized_layers

log = logging.getLogger(__name__)

TaskLoss = Callable[[Any, Any, tuple[int, int]], dict[str, Tensor]]
TrainingBatch = tuple[Tensor, Any]  # images [B, C, H, W] float, targets in the task loss's own form


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes:
        epochs: passes over the data.
        learning_rate: peak rate of weights and biases.
        scale_learning_rate: peak rate of the logarithms of scales.
        weight_decay: decoupled decay of weights with two or more axes.
        warmup_fraction: share of all steps over which the rate rises from 0, before it falls along a cosine.
        final_fraction: the last rate as a share of the peak.
        ema_decay: decay of the exponential moving average; 0 switches it off.
        ema_warmup: steps over which the decay grows towards its value (decay * (1 - exp(-step / warmup))); 0 for none.
        clip_norm: largest gradient norm of the weights; 0 switches clipping off.
        task_weight: weight of the task loss.
        distill_weight: weight of output distillation (needs a teacher).
        feature_weight: weight of feature distillation (needs a teacher); 0 costs nothing.
        feature_patterns: names of the tensors to compare; none takes what enters the head (see distillation.py).
        dampen_weight: strength of oscillation dampening at the last step, risen to along a cosine; 0 is none.
        freeze_threshold: flips per step above which a weight is frozen in the end, fallen to from four times as
            much along a cosine; None freezes nothing.
        amp: whether the forward pass runs under autocast to bfloat16 (CUDA only).
    """

    epochs: int
    learning_rate: float = 1e-4
    scale_learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup_fraction: float = 0.05
    final_fraction: float = 0.01
    ema_decay: float = 0.999
    ema_warmup: float = 100.0
    clip_norm: float = 10.0
    task_weight: float = 1.0
    distill_weight: float = 1.0
    feature_weight: float = 0.0
    feature_patterns: tuple[str, ...] = ()
    dampen_weight: float = 0.0
    freeze_threshold: float | None = None
    amp: bool = False


@dataclass
class StepRecord:
    """What one step did: the losses by name, the learning rate, and the gradient norm before clipping.

    `figures` are of the whole epoch and stand on its last step: the shares of weights that oscillate and that are
    frozen (0..1), and what the caller adds.
    """

    step: int
    epoch: int
    learning_rate: float
    losses: dict[str, float]
    gradient_norm: float
    seconds: float
    figures: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a JSON line."""
        record = asdict(self)
        losses, figures = record.pop("losses"), record.pop("figures")
        return {**record, **losses, **figures}


@dataclass
class TrainingState:
    """Everything a stopped training needs to go on exactly where it was (with its model's and average's weights)."""

    optimizer: torch.optim.Optimizer
    average: ModelAverage | None
    oscillation: OscillationTracker
    step: int = 0
    epoch: int = 0
    records: list[StepRecord] = field(default_factory=list)


class ModelAverage:
    """Exponential moving average of a model's parameters and floating buffers (Polyak averaging).

    Attributes:
        model: the averaged copy, in evaluation mode.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.warmup = warmup
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model."""
        self.updates += 1
        warm = 1.0 - math.exp(-self.updates / self.warmup) if self.warmup > 0 else 1.0
        decay = self.decay * warm
        current = model.state_dict()
        averaged, fresh = [], []
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                averaged.append(value)
                fresh.append(current[name].detach())
            else:
                value.copy_(current[name])
        torch._foreach_lerp_(averaged, fresh, 1.0 - decay)


def parameter_groups(model: nn.Module, options: TrainingOptions) -> list[dict[str, Any]]:
    """Split trainable parameters into decayed weights, the rest (biases, norms), and logarithms of scales."""
    scales = {
        id(module.log_scale)
        for module in model.modules()
        if isinstance(module, (FakeQuantize, WeightFakeQuantize))
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    weights = [p for p in trainable if id(p) not in scales and p.ndim >= 2]
    rest = [p for p in trainable if id(p) not in scales and p.ndim < 2]
    groups = [
        {"name": "weights", "params": weights, "peak": options.learning_rate, "decay": options.weight_decay},
        {"name": "biases", "params": rest, "peak": options.learning_rate, "decay": 0.0},
        {
            "name": "scales",
            "params": [p for p in trainable if id(p) in scales],
            "peak": options.scale_learning_rate,
            "decay": 0.0,
        },
    ]
    return [{**g, "weight_decay": g["decay"]} for g in groups if g["params"]]


def rate_factor(step: int, total: int, warmup_fraction: float, final_fraction: float) -> float:
    """Share of the peak rate at a step: linear warm-up, then a cosine down to `final_fraction`.

    For total 100, warm-up 0.1, final 0: step 0 -> 0.1, step 9 -> 1.0, step 55 -> about 0.5, step 100 -> 0.
    """
    warmup = max(1, round(total * warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def new_state(model: nn.Module, options: TrainingOptions) -> TrainingState:
    """Optimizer, average and oscillation tracker for a model at step 0."""
    groups = parameter_groups(model, options)
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.999), fused=True)
    average = ModelAverage(model, options.ema_decay, options.ema_warmup) if options.ema_decay > 0 else None
    return TrainingState(optimizer, average, OscillationTracker(model))


def train_epochs(
    model: nn.Module,
    epoch_batches: Callable[[int], Sequence[TrainingBatch] | Iterable[TrainingBatch]],
    steps_per_epoch: int,
    task_loss: TaskLoss,
    options: TrainingOptions,
    teacher: nn.Module | None = None,
    state: TrainingState | None = None,
) -> Iterator[TrainingState]:
    """Train a model in place; yields the state after every epoch so that the caller can validate, save or stop.

    Args:
        model: network whose forward returns raw maps; with quantizers switched on this is quantization-aware
            fine-tuning, without any it is float training.
        epoch_batches: epoch number -> batches (images float [B, C, H, W], targets).
        steps_per_epoch: number of batches in an epoch.
        task_loss: (raw maps, targets, (height, width)) -> named, already weighted scalar terms.
        options: how to train.
        teacher: float network to distil from, or None.
        state: state of a stopped training to go on from.

    Raises:
        DivergenceError: a loss or gradient that is not finite; the message names the terms and the remedy.
    """
    state = state or new_state(model, options)
    total = options.epochs * steps_per_epoch
    forward = _Forward(model, teacher, options)
    while state.epoch < options.epochs:
        model.train()
        for images, targets in epoch_batches(state.epoch):
            _train_step(forward, images, targets, task_loss, options, state, total)
        state.epoch += 1
        _settle_scales(model)
        if state.average is not None:
            _settle_scales(state.average.model)
        if state.records:
            state.records[-1].figures.update(state.oscillation.shares())
        model.eval()
        yield state


class _Forward:
    """The student and its teacher, each returning what the losses compare.

    Args:
        student: the model that is trained.
        teacher: float network, or None.
        options: which distillation is on; what is off is not computed.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None, options: TrainingOptions) -> None:
        self.student = student
        distilled = options.distill_weight > 0 or options.feature_weight > 0
        self.teacher = teacher.eval().requires_grad_(False) if teacher is not None and distilled else None
        self.seen: list[nn.Module] | None = None  # both, returning (outputs, features)
        if self.teacher is not None and options.feature_weight > 0:
            names = feature_nodes(self.teacher, options.feature_patterns)
            self.seen = [with_features(network, names) for network in (student, self.teacher)]

    def __call__(self, images: Tensor) -> tuple[Any, Any]:
        """The student's (outputs, features); features are empty where none are compared."""
        return self.seen[0](images) if self.seen else (self.student(images), ())

    @torch.no_grad()
    def reference(self, images: Tensor) -> tuple[Any, Any]:
        """The teacher's."""
        assert self.teacher is not None
        return self.seen[1](images) if self.seen else (self.teacher(images), ())


def _train_step(
    forward: _Forward,
    images: Tensor,
    targets: Any,
    task_loss: TaskLoss,
    options: TrainingOptions,
    state: TrainingState,
    total: int,
) -> None:
    started = time.perf_counter()
    factor = rate_factor(state.step, total, options.warmup_fraction, options.final_fraction)
    for group in state.optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    rise = 0.5 * (
        1.0 - math.cos(math.pi * min(state.step / total, 1.0))
    )  # 0 at the first step, 1 at the last
    with torch.autocast(images.device.type, torch.bfloat16, enabled=options.amp and images.is_cuda):
        terms = _loss_terms(forward, images, targets, task_loss, options)
    if options.dampen_weight > 0:
        terms["dampening"] = options.dampen_weight * rise * dampening_loss(forward.student)
    loss = torch.stack(list(terms.values())).sum()
    values = {name: float(term.detach()) for name, term in terms.items()}
    if not math.isfinite(float(loss.detach())):
        raise _diverged("loss", state.step, values, options)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norms = _clip(state.optimizer, options.clip_norm)
    if not all(math.isfinite(norm) for norm in norms.values()):
        # quantizers turn NaN into their lowest code, so a broken weight need not show in the next loss
        raise _diverged("gradient", state.step, values, options)
    state.optimizer.step()
    limit = options.freeze_threshold
    state.oscillation.update(None if limit is None else limit * (4.0 - 3.0 * rise))
    if state.average is not None:
        state.average.update(forward.student)
    state.records.append(
        StepRecord(
            step=state.step,
            epoch=state.epoch,
            learning_rate=options.learning_rate * factor,
            losses={**values, "total": float(loss.detach())},
            gradient_norm=norms.get("weights", 0.0),
            seconds=time.perf_counter() - started,
        )
    )
    state.step += 1


def _loss_terms(
    forward: _Forward, images: Tensor, targets: Any, task_loss: TaskLoss, options: TrainingOptions
) -> dict[str, Tensor]:
    terms: dict[str, Tensor] = {}
    raw, features = forward(images)
    if options.task_weight > 0:
        height, width = int(images.shape[-2]), int(images.shape[-1])
        for name, term in task_loss(raw, targets, (height, width)).items():
            terms[name] = options.task_weight * term
    if forward.teacher is not None:
        reference, wanted = forward.reference(images)
        if options.distill_weight > 0:
            terms["distillation"] = options.distill_weight * distillation_loss(raw, reference)
        if options.feature_weight > 0:
            terms["features"] = options.feature_weight * distillation_loss(features, wanted)
    if not terms:
        raise ValueError("task weight and distillation weights are all 0: nothing to learn from")
    return terms


def _clip(optimizer: torch.optim.Optimizer, clip_norm: float) -> dict[str, float]:
    """Clip each parameter group by itself (their gradients live on different sizes); norms before, by group."""
    norms = {}
    for group in optimizer.param_groups:
        limit = clip_norm if clip_norm > 0 else math.inf
        norms[group["name"]] = float(nn.utils.clip_grad_norm_(group["params"], limit))
    return norms


def _diverged(what: str, step: int, values: dict[str, float], options: TrainingOptions) -> DivergenceError:
    return DivergenceError(
        f"{what} is not finite at step {step} ({values}): lower the learning rate (now {options.learning_rate:g}) or "
        f"the scale learning rate (now {options.scale_learning_rate:g})"
    )


def _settle_scales(model: nn.Module) -> None:
    """Bring weight scales that are not learned to the weights of the last step (in training they are one behind)."""
    for layer in quantized_layers(model).values():
        quantizer = layer.weight_quantizer
        if quantizer.mode is Mode.QUANTIZE and not quantizer.learned:
            quantizer.follow(layer.weight)
