"""The moving average of a model's weights, which generalises better than the weights of the last step."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

Place = tuple[Mapping[str, Tensor | None], str]
"""The parameters or buffers of a module, and a name among them."""


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
        self._averaged = _places(self.model)
        self._places = _places(model)
        self._source = model

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model."""
        self.updates += 1
        warm = 1.0 - math.exp(-self.updates / self.warmup) if self.warmup > 0 else 1.0
        decay = self.decay * warm
        if model is not self._source:
            self._source, self._places = model, _places(model)
        values, fresh = _tensors(self._averaged), _tensors(self._places)
        pairs = list(zip(values, fresh, strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([value for value, _ in floats], [now for _, now in floats], 1.0 - decay)
        for value, now in pairs:
            if not value.is_floating_point():
                value.copy_(now)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and the number of updates."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]


def _places(model: nn.Module) -> list[Place]:
    """Where a model keeps the tensors of its `state_dict`, which takes milliseconds to make, each once."""
    found: dict[int, Place] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and name not in module._non_persistent_buffers_set:
                    found.setdefault(id(tensor), (tensors, name))
    return list(found.values())


def _tensors(places: list[Place]) -> list[Tensor]:
    """What is there now: a module may have been given another tensor since."""
    return [cast("Tensor", tensors[name]) for tensors, name in places]
