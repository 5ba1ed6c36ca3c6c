"""`train_qat.py` whose second process is killed after its sixth training step, on torchrun's first start only."""

from __future__ import annotations

import os
import signal
from typing import Any

from pipeline.stages.saved_training import SavedTraining
from train_qat import main

after_step = SavedTraining.after_step


def killed(saved: SavedTraining, state: Any) -> None:
    """After a step, as the stage has it."""
    after_step(saved, state)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and state.step == 6:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    SavedTraining.after_step = killed  # type: ignore[method-assign]
    main()
