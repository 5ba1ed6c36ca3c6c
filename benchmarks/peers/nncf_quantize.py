"""Runs in the environment of NNCF, never in Octet's: post-training quantization of one ONNX file.

    python nncf_quantize.py FLOAT.onnx IMAGES.npy OUT [--ignore PATTERN ...]

OUT ending in .xml: the file is read by OpenVINO and quantized there (NNCF's first choice of backend); OUT ending in
.onnx: NNCF's ONNX backend, which writes Q/DQ. IMAGES.npy is float32 [N, 3, H, W] in [0, 1]. Everything else is NNCF's
default. The last line of stdout is JSON.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import nncf
import numpy as np


def main() -> None:
    """Quantize and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ignore", nargs="*", default=[], help="regular expressions of node names")
    options = parser.parse_args()
    images = np.load(options.images)
    ignored = nncf.IgnoredScope(patterns=options.ignore) if options.ignore else None
    start = time.perf_counter()
    quantize = with_openvino if options.out.suffix == ".xml" else with_onnx
    quantize(options.model, images, options.out, ignored)
    print(json.dumps({"version": nncf.__version__, "seconds": round(time.perf_counter() - start, 1)}))


def with_openvino(path: Path, images: np.ndarray, out: Path, ignored: Any) -> None:
    """Quantize OpenVINO's model."""
    import openvino

    model = openvino.Core().read_model(str(path))
    dataset = nncf.Dataset([image[None] for image in images])
    openvino.save_model(
        nncf.quantize(model, dataset, subset_size=len(images), ignored_scope=ignored),
        str(out),
        compress_to_fp16=False,
    )


def with_onnx(path: Path, images: np.ndarray, out: Path, ignored: Any) -> None:
    """Quantize the ONNX model itself."""
    import onnx

    model = onnx.load(str(path))
    name = model.graph.input[0].name
    dataset = nncf.Dataset([{name: image[None]} for image in images])
    onnx.save(nncf.quantize(model, dataset, subset_size=len(images), ignored_scope=ignored), str(out))


if __name__ == "__main__":
    main()
