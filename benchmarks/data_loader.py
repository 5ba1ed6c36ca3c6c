"""Times the package `data`: images per second of the loader, seconds of both metric engines.

Without workers the loader's time is processor time of this process, so that other work on the machine counts little.

Usage: python benchmarks/data_loader.py [--root FOLDER] [--size 320] [--batch 16] [--workers 0 1 2] [--images 5000]

Without --root the built-in synthetic set is used. The metric part needs no images: detections are random boxes around
random objects, as many as a COCO validation run with 300 detections per image would have at most.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
from data.dataset import DetectionDataset
from data.metrics.detection import compute_metrics


def time_loader(dataset: DetectionDataset, size: int, batch: int, workers: int, augmented: bool) -> float:
    """Images per second over one pass, after a first pass that starts the workers and fills the file cache."""
    options = data.AugmentOptions() if augmented else None
    loader = data.build_loader(dataset, size, batch, workers, options, shuffle=augmented)
    clock = time.perf_counter if workers else time.process_time
    elapsed = 0.0
    for epoch in range(2):
        loader.set_epoch(epoch)
        start = clock()
        for _ in loader:
            pass
        elapsed = clock() - start
    return len(dataset) / elapsed


def make_detections(images: int, per_image: int, classes: int, seed: int = 0) -> tuple[dict, np.ndarray]:
    """Seven objects per image and detections scattered around them."""
    random = np.random.default_rng(seed)
    corners = random.uniform(0, 400, (images, 7, 2))
    sides = random.uniform(8, 200, (images, 7, 2))
    labels = random.integers(0, classes, (images, 7))
    annotations = [
        {
            "id": 1 + i * 7 + k,
            "image_id": i + 1,
            "category_id": int(labels[i, k]) + 1,
            "bbox": [*corners[i, k].tolist(), *sides[i, k].tolist()],
            "area": float(sides[i, k].prod()),
            "iscrowd": 0,
        }
        for i in range(images)
        for k in range(7)
    ]
    truth = {
        "info": {},
        "images": [{"id": i + 1, "height": 640, "width": 640} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": k + 1, "name": str(k)} for k in range(classes)],
    }
    chosen = random.integers(0, 7, (images, per_image))
    rows = np.arange(images)[:, None]
    noise = random.normal(0, 0.15, (images, per_image, 4)) * np.tile(sides[rows, chosen], 2)
    low = corners[rows, chosen] + noise[..., :2]
    high = np.maximum(corners[rows, chosen] + sides[rows, chosen] + noise[..., 2:], low + 1)
    ids = np.broadcast_to((rows + 1)[..., None], (images, per_image, 1))
    scores = random.random((images, per_image, 1))
    found = np.concatenate([ids, low, high, scores, labels[rows, chosen][..., None]], axis=2)
    return truth, found.reshape(-1, 7).astype(np.float64)


def main() -> None:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, help="dataset; default: the synthetic set")
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=5000, help="images of the metric part")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        root = arguments.root or data.generate_synthetic(Path(folder) / "set", 300, 50, arguments.size, 0)
        if arguments.root is None:
            print(f"synthetic set: 350 images of {arguments.size} px in {time.perf_counter() - start:.1f} s")
        start = time.perf_counter()
        dataset = data.open_dataset(root, "train")
        print(f"open and verify: {len(dataset) / (time.perf_counter() - start):.0f} images/s")
        for workers in arguments.workers:
            for augmented in (False, True):
                rate = time_loader(dataset, arguments.size, arguments.batch, workers, augmented)
                kind = "augmented" if augmented else "letterbox"
                print(f"loader, {workers} workers, {kind}: {rate:.0f} images/s")
    truth, found = make_detections(arguments.images, 150, 80)
    ids = [image["id"] for image in truth["images"]]
    parts = [found[found[:, 0] == image_id, 1:] for image_id in ids]
    for engine in ("hotcoco", "pycocotools"):
        start = time.perf_counter()
        metrics = compute_metrics(parts, ids, truth, engine)
        elapsed = time.perf_counter() - start
        print(f"metrics, {engine}: {len(found)} detections in {elapsed:.2f} s, AP {metrics.ap:.6f}")


if __name__ == "__main__":
    main()
