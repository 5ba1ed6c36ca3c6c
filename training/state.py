"""The state of a training: everything that the next step depends on, saved and loaded exactly."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from training.accumulation import Accumulation, TargetsOf, rows_of
from training.average import ModelAverage
from training.divergence import Faults
from training.extension import Extension, FloatTraining
from training.random_states import random_states, restore_random_states
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
        micro_batch: most images of one forward and backward pass, in each process; None for the whole batch.
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
    micro_batch: int | None = None


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


class TrainingState:
    """A model in training: everything that the next step depends on.

    Args:
        model: network that is trained in place; its forward returns raw maps.
        options: how to train.
        extension: what is added to float training; None adds nothing.
        team: the processes that take every step together, each on its share of the batch; they start with the model of
            the first.
        targets_of: divides the targets of a batch (see accumulation.py).

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
        targets_of: TargetsOf = rows_of,
    ) -> None:
        self.model = model
        if team.size > 1:
            model.load_state_dict(
                team.share({name: value.cpu() for name, value in model.state_dict().items()})
            )
        self.options = options
        self.extension = FloatTraining(model) if extension is None else extension
        self.shared = SharedStep(team, self.extension.network, model) if team.size > 1 else None
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
        self.accumulation = Accumulation(options.micro_batch, targets_of, self.shared)

    @property
    def network(self) -> nn.Module:
        """What a step runs on the images."""
        return self.extension.network if self.shared is None else self.shared.network

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
            "accumulation": self.accumulation.state_dict(),
            "random": random_states(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, for the same network; sets the random states of this process as well.

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
        self.accumulation.load_state_dict(state["accumulation"])
        self.extension.load_state_dict(state["extension"])
        self.step, self.epoch, self.samples = state["step"], state["epoch"], state["samples"]
        self.records = [StepRecord(**record) for record in state["records"]]
        restore_random_states(state["random"])


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
