"""The training loop of float training and of quantization-aware fine-tuning.

AdamW with a warm-up and a cosine, gradient clipping, a moving average of the weights, and a state that can be saved
after any step and continued exactly. What fine-tuning does besides is an extension (see extension.py):

    loss = task_weight * sum(task terms) + sum(terms of the extension)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from core.types import TaskLoss, TrainingBatch
from training.average import ModelAverage
from training.divergence import Faults, bad_layer, bad_parameter
from training.extension import Extension, FloatTraining
from training.random_states import random_states, restore_random_states
from training.schedule import rate_factor
from training.shared_step import SharedStep
from training.team import ALONE, Team


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes:
        epochs: passes over the data.
        learning_rate: peak rate of weights and biases.
        weight_decay: decoupled decay of weights with two or more axes.
        warmup_fraction: share of all steps over which the rate rises from 0, before it falls along a cosine.
        final_fraction: the last rate as a share of the peak.
        ema_decay: decay of the exponential moving average; 0 switches it off.
        ema_warmup: steps over which the decay grows towards its value (see average.py); 0 for none.
        clip_norm: largest gradient norm of each parameter group; 0 switches clipping off.
        task_weight: weight of the task loss.
        autocast: whether the forward pass runs under autocast to bfloat16.
        channels_last: whether images, and with them all activations, are laid out in channels-last.
    """

    epochs: int
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    warmup_fraction: float = 0.05
    final_fraction: float = 0.01
    ema_decay: float = 0.999
    ema_warmup: float = 100.0
    clip_norm: float = 10.0
    task_weight: float = 1.0
    autocast: bool = False
    channels_last: bool = False


@dataclass
class StepRecord:
    """What one step did: the losses by name, the learning rate, and the weights' gradient norm before clipping.

    `figures` are of the whole epoch and given with its last step: those of the extension, and what the caller adds.
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


EpochBatches = Callable[[int, int], Iterable[TrainingBatch]]
"""(epoch, number of its samples already used) -> the epoch's other batches: images float [B, C, H, W], and targets."""


class TrainingState:
    """A model in training: everything that the next step depends on.

    Args:
        model: network that is trained in place; its forward returns raw maps.
        options: how to train.
        extension: what is added to float training; None adds nothing.
        team: the processes that take every step together, each on its share of the batch; they start with the model of
            the first.

    Attributes:
        step: steps done.
        epoch: whole epochs done.
        samples: samples of the current epoch that are done, over all processes.
        records: what the steps did; skipped ones have none.
        rate_scale: factor on all learning rates, lowered by whoever goes back to an earlier state after a divergence.
    """

    def __init__(
        self,
        model: nn.Module,
        options: TrainingOptions,
        extension: Extension | None = None,
        team: Team = ALONE,
    ) -> None:
        self.model = model
        if team.size > 1:
            model.load_state_dict(
                team.share({name: value.cpu() for name, value in model.state_dict().items()})
            )
        self.options = options
        self.extension = FloatTraining(model) if extension is None else extension
        self.shared = SharedStep(team, self.extension.network, model) if team.size > 1 else None
        self.network = self.extension.network if self.shared is None else self.shared.network
        groups = parameter_groups(model, options, self.extension.parameter_groups())
        self.optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.999), fused=True)
        self.average = (
            ModelAverage(model, options.ema_decay, options.ema_warmup) if options.ema_decay > 0 else None
        )
        self.step = 0
        self.epoch = 0
        self.samples = 0
        self.records: list[StepRecord] = []
        self.rate_scale = 1.0
        self.faults = Faults(model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def averaged(self) -> nn.Module:
        """The model to evaluate and keep: the moving average, or the model itself without one."""
        return self.model if self.average is None else self.average.model

    def state_dict(self) -> dict[str, Any]:
        """All that a stopped training needs to continue exactly; tensors and plain data."""
        return {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "extension": self.extension.state_dict(),
            "step": self.step,
            "epoch": self.epoch,
            "samples": self.samples,
            "records": [asdict(record) for record in self.records],
            "rate_scale": self.rate_scale,
            "faults": self.faults.state_dict(),
            "random": random_states(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, for the same network; sets the random states of this process as well.

        Learning rates and weight decay are those of this object's options, which may be others than those of the state;
        new learning rates are not lowered by the state's `rate_scale`.
        """
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        chosen = [(group["peak"], group["weight_decay"]) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        is_same = [group["peak"] for group in self.optimizer.param_groups] == [peak for peak, _ in chosen]
        self.rate_scale = state["rate_scale"] if is_same else 1.0
        for group, (peak, weight_decay) in zip(self.optimizer.param_groups, chosen, strict=True):
            group.update(peak=peak, weight_decay=weight_decay)
        self.faults.load_state_dict(state["faults"])
        self.extension.load_state_dict(state["extension"])
        self.step, self.epoch, self.samples = state["step"], state["epoch"], state["samples"]
        self.records = [StepRecord(**record) for record in state["records"]]
        restore_random_states(state["random"])


def train_epochs(
    state: TrainingState,
    epoch_batches: EpochBatches,
    steps_per_epoch: int,
    task_loss: TaskLoss,
    after_step: Callable[[TrainingState], None] = lambda _: None,
) -> Iterator[TrainingState]:
    """Train a model in place; yields the state after every epoch so that the caller can validate, save or stop.

    Args:
        state: new, or of a training that was stopped after any step, to continue from.
        epoch_batches: see `EpochBatches`.
        steps_per_epoch: number of batches in a whole epoch.
        task_loss: see `core.types.TaskLoss`.
        after_step: called after every step; may save the state, or raise to stop.

    A step whose loss or gradient is not finite is skipped.

    Raises:
        DivergenceError: more than three such steps in a row; the message names the terms, the layer and the remedy.
    """
    total = state.options.epochs * steps_per_epoch
    while state.epoch < state.options.epochs:
        state.model.train()
        for images, targets in epoch_batches(state.epoch, state.samples):
            _train_step(state, images, targets, task_loss, total)
            after_step(state)
        state.epoch, state.samples = state.epoch + 1, 0
        figures = state.extension.after_epoch(None if state.average is None else state.average.model)
        if state.shared is not None:
            figures = {**figures, **state.shared.figures()}
        if state.records:
            state.records[-1].figures.update(figures)
        state.model.eval()
        yield state


def parameter_groups(
    model: nn.Module, options: TrainingOptions, others: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Split trainable parameters into decayed weights, the rest (biases, norms), and the groups of the extension."""
    taken = {id(parameter) for group in others for parameter in group["params"]}
    own = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    weights, rest = [p for p in own if p.ndim >= 2], [p for p in own if p.ndim < 2]
    peak = options.learning_rate
    groups = [
        {"name": "weights", "params": weights, "peak": peak, "weight_decay": options.weight_decay},
        {"name": "biases", "params": rest, "peak": peak, "weight_decay": 0.0},
        *others,
    ]
    return [group for group in groups if group["params"]]


def _train_step(state: TrainingState, images: Tensor, targets: Any, task_loss: TaskLoss, total: int) -> None:
    """One step of the optimizer."""
    options, shared = state.options, state.shared
    if options.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    if shared is not None:
        shared.time_alone(lambda: _loss(_loss_terms(state, images, targets, task_loss, 0.0)))
    started = time.perf_counter()
    factor = rate_factor(state.step, total, options.warmup_fraction, options.final_fraction)
    for group in state.optimizer.param_groups:
        group["lr"] = group["peak"] * factor * state.rate_scale
    state.faults.remember_buffers()
    progress = min(state.step / total, 1.0)
    with nullcontext() if shared is None else shared.together():
        terms = _loss_terms(state, images, targets, task_loss, progress)
        loss = _loss(terms)
        values, num_images = _summed(state, terms, len(images))
        state.samples += num_images
        is_finite = math.isfinite(values["total"])
        state.optimizer.zero_grad(set_to_none=True)
        if is_finite:  # gradients are averaged over the processes, and have to add up
            (loss if shared is None else loss * shared.team.size).backward()
    if not is_finite:
        return _skip(state, "loss", values, bad_layer(state.model, state.extension.network, images))
    norms = _clip(state.optimizer, options.clip_norm)
    if not all(math.isfinite(norm) for norm in norms.values()):
        # a clipped activation hides an infinite weight, so a broken step need not show in the next loss
        return _skip(state, "gradient", values, bad_parameter(state.model, gradients=True))
    state.optimizer.step()
    state.faults.skipped = 0
    state.extension.after_step(progress)
    if state.average is not None:
        state.average.update(state.model)
    state.records.append(
        StepRecord(
            step=state.step,
            epoch=state.epoch,
            learning_rate=options.learning_rate * factor * state.rate_scale,
            losses=values,
            gradient_norm=norms.get("weights", 0.0),
            seconds=time.perf_counter() - started,
        )
    )
    if shared is not None:
        shared.count(len(images), state.records[-1].seconds)
    state.step += 1


def _loss(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def _summed(state: TrainingState, terms: dict[str, Tensor], num_images: int) -> tuple[dict[str, float], int]:
    """The terms' values and `total`, and the number of images; those of the whole batch where processes share it."""
    values = {name: float(term.detach()) for name, term in terms.items()}
    if state.shared is None:
        return {**values, "total": float(_loss(terms).detach())}, num_images
    found = state.shared.sum(
        torch.tensor([*values.values(), num_images], dtype=torch.float64, device=state.device)
    )
    *numbers, count = found.tolist()
    return {**dict(zip(values, numbers, strict=True)), "total": sum(numbers)}, int(count)


def _loss_terms(
    state: TrainingState, images: Tensor, targets: Any, task_loss: TaskLoss, progress: float
) -> dict[str, Tensor]:
    terms: dict[str, Tensor] = {}
    with torch.autocast(images.device.type, torch.bfloat16, enabled=state.options.autocast):
        raw, added = state.extension.losses(state.network(images), images, progress)
        if state.options.task_weight > 0:
            height, width = int(images.shape[-2]), int(images.shape[-1])
            for name, term in task_loss(raw, targets, (height, width)).items():
                terms[name] = state.options.task_weight * term
    terms |= added
    if not terms:
        raise ValueError("the weights of all loss terms are 0: give the task loss or distillation a weight")
    return terms


def _clip(optimizer: torch.optim.Optimizer, clip_norm: float) -> dict[str, float]:
    """Clip each parameter group by itself (their gradients differ in size) unless a norm is not finite.

    Returns:
        The norms before, by group.
    """
    limit = clip_norm if clip_norm > 0 else math.inf
    groups = {group["name"]: group["params"] for group in optimizer.param_groups}
    norms = {
        name: nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        for name, parameters in groups.items()
    }
    values = {name: float(norm) for name, norm in norms.items()}
    if all(map(math.isfinite, values.values())):
        for name, parameters in groups.items():
            nn.utils.clip_grads_with_norm_(parameters, limit, norms[name])
    return values


def _skip(state: TrainingState, what: str, values: dict[str, float], cause: str) -> None:
    """Take a step back whose loss or gradient is not finite, and continue with the next."""
    rates = [
        f"that of {group['name']} (now {group['peak']:g})"
        for group in state.optimizer.param_groups
        if group["name"] not in {"weights", "biases"}
    ]
    remedy = " or ".join([f"the learning rate (now {state.options.learning_rate:g})", *rates])
    state.faults.skip(what, state.step, values, cause, f"lower {remedy}")
    state.step += 1
