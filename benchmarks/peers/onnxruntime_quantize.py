"""Static quantization of one ONNX file by ONNX Runtime's own tool, in Octet's environment.

    python onnxruntime_quantize.py FLOAT.onnx IMAGES.npy OUT.onnx [--ignore PATTERN ...]

IMAGES.npy is float32 [N, 3, H, W] in [0, 1]. Everything is `quantize_static`'s default. The last line of stdout is
JSON.
"""

import argparse
import json
import re
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, quantize_static


class Reader(CalibrationDataReader):
    """Hands out one image at a time."""

    def __init__(self, name: str, images: np.ndarray) -> None:
        self.batches = iter([{name: image[None]} for image in images])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next feed, None at the end."""
        return next(self.batches, None)


def main() -> None:
    """Quantize and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ignore", nargs="*", default=[], help="regular expressions of node names")
    options = parser.parse_args()
    start = time.perf_counter()
    graph = onnx.load(str(options.model)).graph
    ignored = [n.name for n in graph.node if any(re.fullmatch(p, n.name) for p in options.ignore)]
    reader = Reader(graph.input[0].name, np.load(options.images))
    quantize_static(str(options.model), str(options.out), reader, nodes_to_exclude=ignored)
    print(json.dumps({"version": onnxruntime.__version__, "seconds": round(time.perf_counter() - start, 1)}))


if __name__ == "__main__":
    main()
