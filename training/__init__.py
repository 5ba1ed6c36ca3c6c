"""Training: the loop that float training and fine-tuning share, and processes that share the work."""

from training.checkpoints import Checkpoints
from training.divergence import check_finite, not_finite
from training.extension import Extension
from training.loop import train_epochs
from training.state import StepRecord, TrainingOptions, TrainingState

__all__ = [
    "Checkpoints",
    "Extension",
    "StepRecord",
    "TrainingOptions",
    "TrainingState",
    "check_finite",
    "not_finite",
    "train_epochs",
]
