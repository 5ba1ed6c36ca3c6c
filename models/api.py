"""The public names of the package, see `models`."""

from models.boxes import Decode, best_pairs, non_max_suppression
from models.checkpoints.loading import find_head, find_names, find_task, load_detector, save_detector
from models.checkpoints.reading import read_checkpoint
from models.detector import Detector, build_detector, placeholder_names, select_head
from models.facts import measure_network
from models.folding import fold_detector
from models.losses.detection import DetectionLoss
from models.losses.dual import DualLoss, detector_loss
from models.losses.segmentation import SegmentationLoss, SegmentTargets
from models.overlaps import pairwise_iou
from models.segmentation import best_segments, soft_masks, suppress_segments
from models.swapping import check_swappable, swap_activation

__all__ = [
    "Decode",
    "DetectionLoss",
    "Detector",
    "DualLoss",
    "SegmentTargets",
    "SegmentationLoss",
    "best_pairs",
    "best_segments",
    "build_detector",
    "check_swappable",
    "detector_loss",
    "find_head",
    "find_names",
    "find_task",
    "fold_detector",
    "load_detector",
    "measure_network",
    "non_max_suppression",
    "pairwise_iou",
    "placeholder_names",
    "read_checkpoint",
    "save_detector",
    "select_head",
    "soft_masks",
    "suppress_segments",
    "swap_activation",
]
