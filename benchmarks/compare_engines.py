r"""Speed of INT8 on CPUs: Octet's engines against float ones and against NNCF's, all timed alternately in one run.

    python benchmarks/compare_engines.py --nncf-python PYTHON [--architectures yolov9t yolov9s yolov9c] [--size 640] \
        [--seconds 20] [--folder FOLDER] [--json FILE]

One image per call; random weights cost the same time as trained ones, and four random images set the scales. YOLOv9's
deployed forms t, s and c are the networks that their authors call gelan-t, -s and -c. NNCF quantizes the same float
file with its defaults, by its OpenVINO backend (for OpenVINO) and its ONNX backend (for ONNX Runtime). How to make its
environment is described in `peers/tools.py`; without it nothing is compared. Other work on the machine distorts the
ratios: build first (`--seconds 0 --folder FOLDER`), then time with the same folder on a quiet machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers.naive import Whole
from benchmarks.peers.tools import Peer, add_peer_options, circumstances, find_peers, write_result
from deploy import LatencyReport, ONNXRuntime, OpenVINORuntime, Runtime, benchmark_alternately, export_onnx
from models import build_detector, fold_detector
from quant import Mode, calibrate, insert, place, set_mode

NUM_IMAGES = 4
FILES = ("float.onnx", "octet-openvino.onnx", "octet-onnxruntime.onnx", "nncf.xml", "nncf.onnx")


def main() -> int:
    """Build, time, print; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_peer_options(parser)
    parser.add_argument("--architectures", nargs="+", default=["yolov9t", "yolov9s", "yolov9c"])
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--seconds", type=float, default=20.0, help="timed for each engine; 0 only builds")
    parser.add_argument("--threads", type=int, help="of each engine; the runtime chooses without it")
    parser.add_argument("--folder", type=Path, help="keep the models here")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    peers = find_peers(options, ["nncf"])
    if not peers:
        print("skipped: this comparison needs NNCF")
        return 0
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        for architecture in options.architectures:
            folder = (options.folder or Path(temporary)) / f"{architecture}-{options.size}"
            build(architecture, options.size, peers["nncf"], folder)
            if options.seconds > 0:
                results[architecture] = measure(folder, options)
                print_table(architecture, options.size, results[architecture])
    write_result(options.json, {**circumstances(peers), "size": options.size, "median_ms": results})
    return 0


def build(architecture: str, size: int, nncf: Peer, folder: Path) -> None:
    """Write every model file of one network; those that are there are kept."""
    if all((folder / name).exists() for name in FILES):
        return
    torch.manual_seed(0)
    detector = fold_detector(build_detector(architecture, 80)).eval()
    images = torch.rand(NUM_IMAGES, 3, size, size)
    export_onnx(
        Whole(detector.network, detector.decode).eval(),
        folder / "float.onnx",
        (size, size),
        "openvino",
        quantized=False,
        dynamic_batch=False,
    )
    network = insert(detector.network, place(detector.network))
    with torch.no_grad():
        calibrate(network, images.split(1))
    set_mode(network, Mode.QUANTIZE)
    quantized = Whole(network, detector.decode).eval()
    for target in ("openvino", "onnxruntime"):
        export_onnx(
            quantized,
            folder / f"octet-{target}.onnx",
            (size, size),
            target,
            dynamic_batch=False,
            images=[image.numpy() for image in images.split(1)],
        )
    for name in ("nncf.xml", "nncf.onnx"):
        print(f"{architecture}: {nncf.name} writes {name}", flush=True)
        nncf.quantize(folder / "float.onnx", images.numpy(), folder / name)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Time all engines of one network in turns: name -> report."""
    threads = options.threads
    floating = folder / "float.onnx"
    engines: dict[str, Runtime] = {
        "openvino fp32": OpenVINORuntime(floating, "f32", threads, batch=1),
        "openvino bf16": OpenVINORuntime(floating, "bf16", threads, batch=1),
        "openvino int8 octet": OpenVINORuntime(folder / "octet-openvino.onnx", "f32", threads, batch=1),
        "openvino int8 nncf": OpenVINORuntime(folder / "nncf.xml", "f32", threads, batch=1),
        "openvino int8 octet, rest bf16": OpenVINORuntime(
            folder / "octet-openvino.onnx", "bf16", threads, batch=1
        ),
        "openvino int8 nncf, rest bf16": OpenVINORuntime(folder / "nncf.xml", "bf16", threads, batch=1),
        "onnxruntime fp32": ONNXRuntime(floating, threads),
        "onnxruntime int8 octet": ONNXRuntime(folder / "octet-onnxruntime.onnx", threads),
        "onnxruntime int8 nncf": ONNXRuntime(folder / "nncf.onnx", threads),
    }
    try:
        shape = (1, 3, options.size, options.size)
        reports: list[LatencyReport] = benchmark_alternately(
            list(engines.values()), shape, options.seconds, warmup=3, calls_per_turn=3
        )
    finally:
        for engine in engines.values():
            engine.close()
    return {name: report.as_dict() for name, report in zip(engines, reports, strict=True)}


def print_table(architecture: str, size: int, reports: dict[str, dict[str, Any]]) -> None:
    """Medians, and how many times faster than the runtime's own FP32, as Markdown."""
    print(f"\n| {architecture}, {size} px | median ms | p99 ms | against FP32 |")
    print("| --- | ---: | ---: | ---: |")
    for name, report in reports.items():
        base = reports[f"{name.split()[0]} fp32"]["median_ms"]
        median = report["median_ms"]
        print(f"| {name} | {median:.2f} | {report['p99_ms']:.2f} | {base / median:.2f}x |")


if __name__ == "__main__":
    sys.exit(main())
