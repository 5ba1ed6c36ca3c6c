"""How `train` and `finetune` survive a stop: their state is saved every few minutes and after every epoch."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from core.errors import DivergenceError, StateError, WriteError
from core.types import TaskLoss
from pipeline.job import Job
from pipeline.run.progress import say
from pipeline.run.stopping import STOPPING
from training import Checkpoints, TrainingState, check_finite, not_finite, train_epochs
from training.checkpoints import NUM_KEPT
from training.loop import EpochBatches

LEAST_RATE_SCALE = 0.25  # of the learning rates, after two divergences


class Part(Protocol):
    """What a stage adds to the state."""

    def as_dict(self) -> dict[str, Any]:
        """Tensors and plain data, for a file."""

    def restore(self, saved: dict[str, Any]) -> None:
        """Restore what `as_dict` returned."""


class SavedTraining:
    """The saved states of one stage, and its log.

    Args:
        job: the job.
        folder: path of the states in the run directory.
        log: artifact with one JSON line per step.
        state: what is saved.
        kept: what else is saved.
    """

    def __init__(
        self, job: Job, folder: str, log: str, state: TrainingState, kept: Part | None = None
    ) -> None:
        self.job = job
        self.checkpoints = Checkpoints(job.run.path(folder))
        self.log = log
        self.state = state
        self.kept = kept
        self.last_saved = time.monotonic()
        self.step_saved: int | None = None
        self.never_finite = not_finite(state.state_dict())  # masks, for example

    def restore(self) -> bool:
        """Restore the newest complete state; returns whether there is one.

        Raises:
            StateError: all states are damaged, or they are of another network.
        """
        content = self.checkpoints.load(self.job.device)
        if content is None:
            return False
        try:
            self.state.load_state_dict(content["training"])
            if self.kept is not None:
                self.kept.restore(content["kept"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise StateError(
                f"the states in {self.checkpoints.folder} do not fit this network ({reason}): remove the folder to run "
                "the stage from its beginning"
            ) from error
        self.step_saved = self.state.step
        say(f"continuing after step {self.state.step} (epoch {self.state.epoch + 1})")
        return True

    def train(
        self, epoch_batches: EpochBatches, steps_per_epoch: int, task_loss: TaskLoss
    ) -> Iterator[TrainingState]:
        """Train as `training.train_epochs` does, and save the state now and then.

        After a divergence the last saved state is taken again and all learning rates are halved, at most twice.

        Raises:
            DivergenceError: it diverged once more.
            Stopped: the run was asked to stop; the state is saved.
            WriteError: the disk has no space for the states.
        """
        if self.step_saved is None:
            self._check_space()
            self._write()
        while True:
            try:
                yield from train_epochs(
                    self.state, epoch_batches, steps_per_epoch, task_loss, self.after_step
                )
                return
            except DivergenceError as error:
                self._roll_back(error)

    def after_step(self, state: TrainingState) -> None:
        """Save the state where the last one is `checkpoint_minutes` old, or the run was asked to stop.

        Signals that come from now on wait for the next call.

        Raises:
            Stopped: it was.
        """
        STOPPING.is_deferred = True
        is_due = time.monotonic() - self.last_saved >= 60.0 * self.job.config.checkpoint_minutes
        if state.shared is not None:  # a signal may have reached one process only, or the others a step later
            number = state.shared.largest(2 * (STOPPING.requested or 0) + is_due)
            STOPPING.requested, is_due = number // 2 or None, number % 2 == 1
        if STOPPING.requested is not None or is_due:
            self._write_if_possible()
        STOPPING.check()

    def save(self) -> None:
        """Save the state at the end of an epoch.

        Raises:
            Stopped: the run was asked to stop.
        """
        self._write_if_possible()
        STOPPING.is_deferred = False
        STOPPING.check()

    def _roll_back(self, error: DivergenceError) -> None:
        """Restore the last saved state and halve the learning rates; raises the error after two attempts."""
        scale = self.state.rate_scale / 2
        if scale < LEAST_RATE_SCALE:
            raise error
        say(f"warning: {error}")
        self.restore()
        self.job.stage_team.wait()  # all have read it
        self.state.rate_scale, self.state.faults.skipped = scale, 0
        say(f"all learning rates are multiplied by {scale:g} from here on")
        self._write()

    def _check_space(self) -> None:
        """Find out before any long work whether the disk has space for the states."""
        content = [self.state.model.state_dict(), None if self.kept is None else self.kept.as_dict()]
        size = sum(map(_num_bytes, content))
        size += 3 * _num_bytes(list(self.state.model.parameters()))  # average, two moments
        needed, free = (NUM_KEPT + 1) * size, shutil.disk_usage(self.job.run.directory).free
        if free < needed:
            raise WriteError(
                f"{self.job.run.directory} has {free / 1e6:.0f} MB free, the states of this training take up to "
                f"{needed / 1e6:.0f} MB: free some space or choose another run_dir"
            )

    def _write_if_possible(self) -> None:
        """Save the state; where the disk is full, keep the one before and continue."""
        try:
            self._write()
        except WriteError as error:
            if self.step_saved is None:
                raise
            say(f"warning: {error}. The state of step {self.step_saved} is kept, and training continues")
            self.last_saved = time.monotonic()

    def _write(self) -> None:
        """Save the state and write the log.

        Raises:
            DivergenceError: the state has numbers that are not finite; it is not saved.
            WriteError: it cannot be written; the states before it are as they were.
        """
        training = self.state.state_dict()
        check_finite(training, self.never_finite)
        self.last_saved = time.monotonic()
        if not self.job.stage_team.first:  # its state is that of all
            return
        self.job.run.write_lines(self.log, (record.as_dict() for record in self.state.records))
        kept = None if self.kept is None else self.kept.as_dict()
        self.checkpoints.save({"training": training, "kept": kept})
        self.last_saved, self.step_saved = time.monotonic(), self.state.step


def _num_bytes(value: Any) -> int:
    """Memory of all tensors in nested data."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_num_bytes, parts))
