"""Float detectors: networks, decode, loss, and loading of checkpoints without running anything they name."""

from models.boxes import Decode, non_max_suppression
from models.detector import ARCHITECTURES, Detector, build_detector
from models.errors import CheckpointError
from models.facts import count_parameters, measure_network
from models.folding import fold_detector
from models.loading import load_detector, save_detector
from models.loss import DetectionLoss
from models.reading import Checkpoint, read_checkpoint

__all__ = [
    "ARCHITECTURES",
    "Checkpoint",
    "CheckpointError",
    "Decode",
    "DetectionLoss",
    "Detector",
    "build_detector",
    "count_parameters",
    "fold_detector",
    "load_detector",
    "measure_network",
    "non_max_suppression",
    "read_checkpoint",
    "save_detector",
]
