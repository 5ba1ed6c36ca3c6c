"""Float detectors: networks, decode, loss, and loading of checkpoints without running anything they name."""

from models.boxes import Decode, non_max_suppression
from models.checkpoints.loading import find_names, find_task, load_detector, save_detector
from models.checkpoints.reading import read_checkpoint
from models.detector import Detector, build_detector, placeholder_names
from models.facts import measure_network
from models.folding import fold_detector
from models.losses.detection import DetectionLoss
from models.losses.segmentation import SegmentationLoss, SegmentTargets
from models.segmentation import soft_masks, suppress_segments

__all__ = [
    "Decode",
    "DetectionLoss",
    "Detector",
    "SegmentTargets",
    "SegmentationLoss",
    "build_detector",
    "find_names",
    "find_task",
    "fold_detector",
    "load_detector",
    "measure_network",
    "non_max_suppression",
    "placeholder_names",
    "read_checkpoint",
    "save_detector",
    "soft_masks",
    "suppress_segments",
]
