"""Datasets, augmentation, loaders, the synthetic set, and COCO metrics."""

from core.errors import DataError
from data.augment import AugmentOptions
from data.dataset import DetectionDataset, ground_truth, open_dataset
from data.formats.synthetic import generate_synthetic
from data.images import list_images, read_image
from data.letterbox import PAD_VALUE, LetterboxInfo, letterbox, letterbox_boxes, to_input, unletterbox
from data.loader import DetectionLoader, build_loader
from data.masks import Rle, decode_mask
from data.metrics.detection import DetectionMetrics, Found, Predict, compute_metrics, evaluate, to_picture
from data.samples import Batch, Dataset, Instances, Sample

__all__ = [
    "PAD_VALUE",
    "AugmentOptions",
    "Batch",
    "DataError",
    "Dataset",
    "DetectionDataset",
    "DetectionLoader",
    "DetectionMetrics",
    "Found",
    "Instances",
    "LetterboxInfo",
    "Predict",
    "Rle",
    "Sample",
    "build_loader",
    "compute_metrics",
    "decode_mask",
    "evaluate",
    "generate_synthetic",
    "ground_truth",
    "letterbox",
    "letterbox_boxes",
    "list_images",
    "open_dataset",
    "read_image",
    "to_input",
    "to_picture",
    "unletterbox",
]
