"""The moving average of a model's weights, which generalises better than the weights of the last step."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn


class ModelAverage:
    """Exponential moving average of a model's parameters and floating buffers (Polyak averaging).

    Update k moves the average by 1 - d towards the model, d = decay * (1 - exp(-k / warmup)). Buffers of integers are
    copied.

    Args:
        model: network whose average is kept.
        decay: share of the average that an update keeps, 0..1.
        warmup: updates over which the decay grows towards its value; 0 for none.

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

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and the number of updates."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]
