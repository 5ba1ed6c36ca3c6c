"""Steps whose loss or gradient is not finite: skipped, up to a limit, with the layer that is to blame.

A single bad batch costs one step. Where several steps in a row fail, the model itself has diverged, and the training
ends with an error that its caller may answer by going back to an earlier state.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import DivergenceError

MAX_SKIPPED = 3  # steps in a row
_log = logging.getLogger(__name__)


class Faults:
    """Counts bad steps in a row, and undoes what their forward pass did to buffers such as those of batch norm.

    Args:
        model: the model that is trained.

    Attributes:
        skipped: bad steps since the last good one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.skipped = 0
        self._first = ""
        self._buffers: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on."""
        return {"skipped": self.skipped, "first": self._first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.skipped, self._first = state["skipped"], state["first"]

    def remember_buffers(self) -> None:
        """Called before a step."""
        current = list(self.model.buffers())
        if len(self._buffers) != len(current):
            self._buffers = [buffer.clone() for buffer in current]
        elif current:
            torch._foreach_copy_(self._buffers, current)

    def restore_buffers(self) -> None:
        """Make buffers what they were before the step."""
        for buffer, before in zip(self.model.buffers(), self._buffers, strict=True):
            buffer.copy_(before)

    def skip(self, what: str, step: int, values: dict[str, float], cause: str, remedy: str) -> None:
        """Take a bad step back.

        Raises:
            DivergenceError: `MAX_SKIPPED` steps in a row were bad before; the message is about the first of them.
        """
        self.restore_buffers()
        if self.skipped == 0:
            self._first = f"{what} is not finite at step {step} ({values}){cause and f', first in {cause}'}"
        if self.skipped >= MAX_SKIPPED:
            raise DivergenceError(f"{self._first}, nor in the {MAX_SKIPPED} steps after it: {remedy}")
        self.skipped += 1
        _log.warning(
            "%s is not finite at step %d%s: step skipped", what, step, cause and f", first in {cause}"
        )


def bad_parameter(model: nn.Module, gradients: bool) -> str:
    """The last parameter in the model's order that is not finite, or whose gradient is not; empty where all are."""
    for name, parameter in reversed(list(model.named_parameters())):
        value = parameter.grad if gradients else parameter.detach()
        if value is not None and not bool(torch.isfinite(value).all()):
            return f"the gradient of {name}" if gradients else name
    return ""


@torch.no_grad()
def bad_layer(model: nn.Module, network: nn.Module, images: Tensor) -> str:
    """The images, the parameter, or the first layer to run, that is not finite; empty where all are.

    Args:
        model: the model that is trained.
        network: what a step runs on the images.
        images: [B, C, H, W].
    """
    if not bool(torch.isfinite(images).all()):
        return "the images"
    if name := bad_parameter(model, gradients=False):
        return name
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(f"the output of {name}")

        return hook

    leaves = [
        (name, module) for name, module in model.named_modules() if name and not list(module.children())
    ]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def check_finite(state: Any, remembered: frozenset[str], path: str = "") -> None:
    """Find numbers that are not finite in a state that is to be saved.

    Args:
        state: nested dicts and lists of tensors.
        remembered: paths of tensors that never were finite, such as masks.
        path: of `state`, for the message.

    Raises:
        DivergenceError: there are some.
    """
    bad = sorted(not_finite(state, path) - remembered)
    if bad:
        raise DivergenceError(
            f"{bad[0]} is not finite ({len(bad)} tensors of the state): the state is not saved; lower the learning rate"
        )


def not_finite(state: Any, path: str = "") -> frozenset[str]:
    """Paths of a state's tensors that are not finite."""
    if isinstance(state, Tensor):
        is_bad = state.is_floating_point() and not bool(torch.isfinite(state).all())
        return frozenset({path}) if is_bad else frozenset()
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    parts = (not_finite(value, f"{path}.{key}" if path else str(key)) for key, value in items)
    return frozenset().union(*parts)
