"""How `train` and `finetune` survive a stop: their state is saved every few minutes and after every epoch."""

from __future__ import annotations

import time
from typing import Any, Protocol

from core.errors import StateError
from pipeline.job import Job
from pipeline.run.progress import say
from pipeline.run.stopping import STOPPING
from training import Checkpoints, TrainingState


class Part(Protocol):
    """What a stage adds to the state."""

    def as_dict(self) -> dict[str, Any]:
        """Tensors and plain data, for a file."""

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what `as_dict` gave."""


class SavedTraining:
    """The saved states of one stage, and its log.

    Args:
        job: the job.
        folder: where the states lie in the run directory.
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

    def restore(self) -> bool:
        """Go on from the newest state that is whole; returns whether there is one.

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
            raise StateError(
                f"the states in {self.checkpoints.folder} do not fit this network ({str(error)[:200]}): remove the "
                "folder to run the stage from its beginning"
            ) from error
        say(f"going on after step {self.state.step} (epoch {self.state.epoch + 1})")
        return True

    def after_step(self, state: TrainingState) -> None:
        """Save the state where the last one is `checkpoint_minutes` old, or the run was asked to stop.

        Signals that come from now on wait for the next call.

        Raises:
            Stopped: it was.
        """
        STOPPING.is_deferred = True
        age = time.monotonic() - self.last_saved
        if STOPPING.requested is not None or age >= 60.0 * self.job.config.checkpoint_minutes:
            self._write()
        STOPPING.check()

    def save(self) -> None:
        """Save the state at the end of an epoch.

        Raises:
            Stopped: the run was asked to stop.
        """
        self._write()
        STOPPING.is_deferred = False
        STOPPING.check()

    def _write(self) -> None:
        self.job.run.write_lines(self.log, (record.as_dict() for record in self.state.records))
        kept = None if self.kept is None else self.kept.as_dict()
        self.checkpoints.save({"training": self.state.state_dict(), "kept": kept})
        self.last_saved = time.monotonic()
