"""The training loop of float training and of quantization-aware fine-tuning.

AdamW with a warm-up and a cosine, gradient clipping, a moving average of the weights, and a state that can be saved
after any step and continued exactly. A step that lacks memory is taken again in parts (see accumulation.py). What
fine-tuning does besides is an extension (see extension.py):

    loss = task_weight * sum(task terms) + sum(terms of the extension)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from core.types import TaskLoss, TrainingBatch
from training.state import TrainingState
from training.step import train_step

EpochBatches = Callable[[int, int], Iterable[TrainingBatch]]
"""(epoch, number of its samples already used) -> the epoch's other batches: images float [B, C, H, W], and targets."""


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

    A step whose loss or gradient is not finite is skipped. One that lacks memory is taken again in smaller parts.

    Raises:
        DivergenceError: more than three steps in a row were skipped; the message names the terms, the layer and the
            remedy.
        ResourceError: the memory does not suffice for one image at a time.
    """
    total = state.options.epochs * steps_per_epoch
    while state.epoch < state.options.epochs:
        state.model.train()
        for images, targets in epoch_batches(state.epoch, state.samples):
            train_step(state, images, targets, task_loss, total)
            after_step(state)
        state.epoch, state.samples = state.epoch + 1, 0
        figures = state.extension.after_epoch(None if state.average is None else state.average.model)
        if state.shared is not None:
            figures = {**figures, **state.shared.figures()}
        if state.records:
            state.records[-1].figures.update(figures)
        state.model.eval()
        yield state
