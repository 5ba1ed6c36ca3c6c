"""Float detectors: networks, decode, loss, and loading of checkpoints without running anything they name."""

from models.boxes import Decode, non_max_suppression
from models.folding import fold_detector
from models.loss import DetectionLoss
from models.yolov9 import ARCHITECTURES, Detector, build_detector

__all__ = [
    "ARCHITECTURES",
    "Decode",
    "DetectionLoss",
    "Detector",
    "build_detector",
    "fold_detector",
    "non_max_suppression",
]
