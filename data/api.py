"""The public names of the package, see `data`."""

from data.augment import AugmentOptions
from data.classes import class_positions, reorder_classes
from data.dataset import ground_truth, open_dataset
from data.formats.synthetic import generate_synthetic
from data.images import list_images, read_image
from data.inventory import Inventory
from data.letterbox import letterbox, to_input, unletterbox
from data.loader import DetectionLoader, build_loader
from data.masks import Rle, decode_mask, outlines_of
from data.metrics.detection import (
    DetectionMetrics,
    compute_metrics,
    evaluate,
    measure_agreement,
    measure_operating_point,
    resample_score,
)
from data.metrics.detections import (
    Detections,
    Found,
    Predict,
    collect,
    in_pictures,
    join_batches,
    join_shares,
    to_picture,
)
from data.samples import Batch, Dataset, Instances, Sample

__all__ = [
    "AugmentOptions",
    "Batch",
    "Dataset",
    "DetectionLoader",
    "DetectionMetrics",
    "Detections",
    "Found",
    "Instances",
    "Inventory",
    "Predict",
    "Rle",
    "Sample",
    "build_loader",
    "class_positions",
    "collect",
    "compute_metrics",
    "decode_mask",
    "evaluate",
    "generate_synthetic",
    "ground_truth",
    "in_pictures",
    "join_batches",
    "join_shares",
    "letterbox",
    "list_images",
    "measure_agreement",
    "measure_operating_point",
    "open_dataset",
    "outlines_of",
    "read_image",
    "reorder_classes",
    "resample_score",
    "to_input",
    "to_picture",
    "unletterbox",
]
