"""COCO AP of an engine on a data set, with the same functions as every row of a report.

    python scripts/evaluate_engine.py ENGINE DATA IMAGE_SIZE [--split val] [--batch 1] [--json FILE]

ENGINE is a TensorRT .engine, an OpenVINO .xml or an .onnx file. The last line of stdout is the AP. Exit code 3 when
the engine or the data cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run from anywhere, like the shells beside it

from core.errors import DataError, DeployError
from data import build_loader, evaluate, open_dataset
from deploy import ONNXRuntime, OpenVINORuntime, Runtime, TensorRTRuntime
from models import non_max_suppression

EXIT_UNUSABLE = 3
CONFIDENCE, IOU, MAX_DETECTIONS = 0.001, 0.7, 300


def load(path: Path, batch: int) -> Runtime:
    """The runtime for a file, by its ending."""
    match path.suffix:
        case ".engine":
            return TensorRTRuntime(path)
        case ".xml":
            return OpenVINORuntime(path, batch=batch)
        case ".onnx":
            return ONNXRuntime(path)
    raise DeployError(f"{path.name} is no engine: expected .engine, .xml or .onnx")


def main() -> int:
    """Evaluate; returns the exit code."""
    parser = argparse.ArgumentParser(description="COCO AP of an engine.")
    parser.add_argument("engine", type=Path)
    parser.add_argument("data", type=Path, help="YOLO tree or COCO JSON folder")
    parser.add_argument("image_size", type=int)
    parser.add_argument("--split", default="val")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--limit", type=int, help="images to use; all by default")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        dataset = open_dataset(options.data, options.split)
        batches = build_loader(dataset, options.image_size, options.batch, limit=options.limit)
        with load(options.engine, options.batch) as runtime:

            def predict(images: Tensor) -> list[Tensor]:
                array = images.cpu().numpy()
                missing = options.batch - len(array)
                filled = np.concatenate([array, np.zeros((missing, *array.shape[1:]), np.float32)])
                output = torch.from_numpy(runtime.infer(filled)[: len(array)])
                return non_max_suppression(output, CONFIDENCE, IOU, MAX_DETECTIONS)

            metrics = evaluate(predict, batches, dataset)
    except (DeployError, DataError) as error:
        print(error, file=sys.stderr)
        return EXIT_UNUSABLE
    if options.json is not None:
        options.json.write_text(
            json.dumps({"engine": str(options.engine), **metrics.as_dict()}, indent=2) + "\n"
        )
    print(f"{metrics.ap:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
