"""Runs in the environment of NVIDIA's modelopt, never in Octet's: INT8 quantization of one ONNX file.

    python modelopt_quantize.py FLOAT.onnx IMAGES.npy OUT.onnx [--ignore PATTERN ...] [--precision fp32]

IMAGES.npy is float32 [N, 3, H, W] in [0, 1]. Calibration runs on the CPU and the float part stays FP32 (modelopt's
default is fp16, which CPUs do not run); everything else is modelopt's default. The last line of stdout is JSON.
"""

import argparse
import json
import time
from pathlib import Path

import modelopt
import numpy as np
from modelopt.onnx.quantization import quantize


def main() -> None:
    """Quantize and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ignore", nargs="*", default=[], help="regular expressions of node names")
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32", help="of the float part")
    options = parser.parse_args()
    start = time.perf_counter()
    quantize(
        str(options.model),
        quantize_mode="int8",
        calibration_data=np.load(options.images),
        calibration_eps=["cpu"],
        nodes_to_exclude=options.ignore or None,
        high_precision_dtype=options.precision,
        output_path=str(options.out),
        log_level="WARNING",
    )
    print(json.dumps({"version": modelopt.__version__, "seconds": round(time.perf_counter() - start, 1)}))


if __name__ == "__main__":
    main()
