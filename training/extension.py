"""What a kind of training adds to the loop.

The loop knows nothing of quantization. What fine-tuning adds (a learning rate for scales, distillation, frozen weights)
is an object with the methods below; it need not inherit from them, so that its package need not import this one.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from core.processes import BatchPart


class Extension(Protocol):
    """Methods that the loop calls. By default they add nothing, which is float training.

    Attributes:
        network: module that a step runs on the images. It shares its parameters with the model that is trained.
    """

    network: nn.Module

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of parameters that have a learning rate of their own.

        Each has `name`, `params`, `peak` (its peak rate), and any other option of `torch.optim.AdamW`.
        """
        return []

    def losses(
        self, outputs: Any, images: Tensor, progress: float, part: BatchPart
    ) -> tuple[Any, dict[str, Tensor]]:
        """Raw maps for the task loss, and further scalar terms by name, already weighted.

        Args:
            outputs: what `network` returned.
            images: float [B, C, H, W].
            progress: share of all steps that are done, 0..1.
            part: which images of the batch these are.
        """
        return outputs, {}

    def after_step(self, progress: float) -> None:
        """Called after each step of the optimizer, before the moving average is updated."""
        return

    def after_epoch(self, average: nn.Module | None) -> dict[str, float]:
        """Called after each epoch with the averaged model, if there is one; returns figures for the log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, in addition to the model and the optimizer: tensors and plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        return


class FloatTraining(Extension):
    """Training of a network with the task loss alone."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
