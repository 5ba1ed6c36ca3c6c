"""INT8 against float on this machine's CPU runtimes: one network, all engines alternately in one run.

    python benchmarks/deploy_engines.py [--architecture yolov9t] [--size 320] [--activation silu] [--seconds 3]

Random weights cost the same time as trained ones. The last line of stdout is JSON with the medians in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deploy import ONNXRuntime, OpenVINORuntime, Runtime, benchmark_alternately, export_onnx
from models import build_detector, fold_detector
from quant import Mode, calibrate, insert, place, set_mode


class Whole(nn.Module):
    """Network and decode in one."""

    def __init__(self, network: nn.Module, decode: nn.Module) -> None:
        super().__init__()
        self.network, self.decode = network, decode

    def forward(self, images: Tensor) -> Tensor:
        """Images to decoded boxes."""
        return self.decode(self.network(images))


def main() -> None:
    """Export, load and time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", default="yolov9t")
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--activation", default="silu")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    torch.manual_seed(0)
    size = (options.size, options.size)
    detector = build_detector(options.architecture, 80, activation=options.activation)
    detector = fold_detector(detector).eval()
    floating = Whole(detector.network, detector.decode)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = export_onnx(floating, folder / "float.onnx", size, "openvino", quantized=False).path
        network = insert(detector.network, place(detector.network))
        with torch.no_grad():
            calibrate(network, [torch.rand(1, 3, *size)])
        set_mode(network, Mode.QUANTIZE)
        quantized = Whole(network, detector.decode).eval()
        paths = {
            t: export_onnx(quantized, folder / f"{t}.onnx", size, t).path
            for t in ("openvino", "onnxruntime", "trt10")
        }
        threads = options.threads
        engines: dict[str, Runtime] = {
            "openvino fp32": OpenVINORuntime(plain, "f32", threads, batch=1),
            "openvino bf16": OpenVINORuntime(plain, "bf16", threads, batch=1),
            "openvino int8": OpenVINORuntime(paths["openvino"], "f32", threads, batch=1),
            "openvino int8, bf16 for the rest": OpenVINORuntime(paths["openvino"], "bf16", threads, batch=1),
            "onnxruntime fp32": ONNXRuntime(plain, threads),
            "onnxruntime int8, TensorRT's graph": ONNXRuntime(paths["trt10"], threads),
            "onnxruntime int8": ONNXRuntime(paths["onnxruntime"], threads),
        }
        reports = benchmark_alternately(
            list(engines.values()), (1, 3, *size), options.seconds, calls_per_turn=3
        )
    medians = {name: report.median_ms for name, report in zip(engines, reports, strict=True)}
    for name, median in medians.items():
        base = medians[f"{name.split()[0]} fp32"]
        print(f"{name:36s} {median:8.2f} ms  {base / median:5.2f} x fp32")
    print(json.dumps({"architecture": options.architecture, "size": options.size, "median_ms": medians}))


if __name__ == "__main__":
    main()
