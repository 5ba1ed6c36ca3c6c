r"""Speed of INT8 on CPUs: Octet's engines against float ones and against NNCF's, all timed alternately in one run.

    python benchmarks/compare_engines.py --nncf-python PYTHON [--architectures yolov9t yolov9s yolov9c] [--size 640] \
        [--seconds 20] [--clock wall|cpu] [--mode latency|throughput] [--batches 1 8] [--rounds 5] \
        [--runtimes openvino onnxruntime] [--folder FOLDER] [--json FILE]

Networks with attention have an engine more: with its matrix products in INT8 (`quant.attention=matmul`). `--clock cpu`
takes the processor time of the process instead of wall time, with one thread: other work on the machine
then slows an engine by its share of the caches only.

`--mode throughput` keeps requests in flight instead of timing single calls (`peers/throughput.py`): alternately,
`--seconds` for each engine, `--rounds` times, for each batch. Files then have a dynamic batch, which is fixed when they
are compiled.

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
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers.naive import Whole
from benchmarks.peers.throughput import CHOSEN_BY_OPENVINO, print_against, print_throughput, serve_in_turns
from benchmarks.peers.tools import Peer, add_peer_options, circumstances, find_peers, write_result
from deploy import ONNXRuntime, OpenVINORuntime, Runtime, benchmark_alternately, export_onnx
from deploy.benchmark.timing import summarize
from models import Detector, build_detector, fold_detector
from quant import Mode, PlacementOptions, calibrate, insert, place, set_mode

NUM_IMAGES = 4
RUNTIMES = ("openvino", "onnxruntime")
NNCF_FILES = {"openvino": "nncf.xml", "onnxruntime": "nncf.onnx"}
RESULTS = {"latency": "median_ms", "throughput": "images_per_second"}  # key in the JSON
MATMUL = "octet-matmul"  # our files with INT8 products, where there are any


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
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: one thread, processor time"
    )
    parser.add_argument("--mode", choices=("latency", "throughput"), default="latency")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="of throughput")
    parser.add_argument("--rounds", type=int, default=5, help="of throughput")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES)
    parser.add_argument("--folder", type=Path, help="keep the models here")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    peers = find_peers(options, ["nncf"])
    if not peers:
        print("skipped: this comparison needs NNCF")
        return 0
    results: dict[str, Any] = {}
    in_flight = options.mode == "throughput"
    with tempfile.TemporaryDirectory() as temporary:
        for architecture in options.architectures:
            name = f"{architecture}-{options.size}{'-dynamic' if in_flight else ''}"
            folder = (options.folder or Path(temporary)) / name
            build(architecture, options.size, peers["nncf"], folder, options.runtimes, in_flight)
            if options.seconds > 0 and in_flight:
                results[architecture] = throughput(architecture, folder, options)
            elif options.seconds > 0:
                results[architecture] = measure(folder, options)
                print_table(architecture, options.size, results[architecture])
    write_result(options.json, {**circumstances(peers), "size": options.size, RESULTS[options.mode]: results})
    return 0


def build(
    architecture: str,
    size: int,
    nncf: Peer,
    folder: Path,
    runtimes: Sequence[str],
    dynamic_batch: bool = False,
) -> None:
    """Write every model file of one network; those that are there are kept."""
    files = [NNCF_FILES[runtime] for runtime in runtimes]
    ours = ["float.onnx", *(f"octet-{runtime}.onnx" for runtime in runtimes)]
    if all((folder / name).exists() for name in (*ours, *files)):
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
        dynamic_batch=dynamic_batch,
    )
    build_octet(detector, images, PlacementOptions(), folder, "octet", runtimes, dynamic_batch)
    with_products = PlacementOptions(attention="matmul")
    if place(detector.network, with_products).matmuls:
        build_octet(detector, images, with_products, folder, MATMUL, runtimes, dynamic_batch)
    for name in files:
        print(f"{architecture}: {nncf.name} writes {name}", flush=True)
        nncf.quantize(folder / "float.onnx", images.numpy(), folder / name)


def build_octet(
    detector: Detector,
    images: torch.Tensor,
    options: PlacementOptions,
    folder: Path,
    name: str,
    runtimes: Sequence[str],
    dynamic_batch: bool = False,
) -> None:
    """Quantize one network, and write its file for each runtime."""
    network: nn.Module = insert(detector.network, place(detector.network, options))
    with torch.no_grad():
        calibrate(network, images.split(1))  # type: ignore[arg-type]
    set_mode(network, Mode.QUANTIZE)
    for target in runtimes:
        export_onnx(
            Whole(network, detector.decode).eval(),
            folder / f"{name}-{target}.onnx",
            (images.shape[2], images.shape[3]),
            target,
            dynamic_batch=dynamic_batch,
            images=[image.numpy() for image in images.split(1)],
        )


def measure(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Time all engines of one network alternately: name -> report."""
    threads = 1 if options.clock == "cpu" else options.threads
    wanted = {n: e for n, e in engines_of(folder, threads).items() if n.split()[0] in options.runtimes}
    engines = {name: open_engine() for name, open_engine in wanted.items()}
    shape = (1, 3, options.size, options.size)
    try:
        if options.clock == "cpu":
            return processor_time(engines, shape, options.seconds)
        reports = benchmark_alternately(
            list(engines.values()), shape, options.seconds, warmup=3, calls_per_turn=3
        )
    finally:
        for engine in engines.values():
            engine.close()
    return {name: report.as_dict() for name, report in zip(engines, reports, strict=True)}


def throughput(architecture: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Print the throughput of all engines of one network for every batch; returns images per second of each round."""
    results = {}
    for batch in options.batches:
        engines = engines_of(folder, options.threads, batch, CHOSEN_BY_OPENVINO)
        wanted = {n: e for n, e in engines.items() if n.split()[0] in options.runtimes}
        found = serve_in_turns(wanted, batch, options.size, options.seconds, options.rounds)
        print_throughput(f"{architecture}, {options.size} px, batch {batch}", found)
        for runtime in options.runtimes:
            print_against(f"{runtime} int8 octet", f"{runtime} int8 nncf", found)
        results[f"batch {batch}"] = {name: vars(served) for name, served in found.items()}
    return results


def processor_time(
    engines: Mapping[str, Runtime], shape: tuple[int, ...], seconds: float
) -> dict[str, dict[str, Any]]:
    """Processor time of single calls alternately, until each engine has had `seconds` of it."""
    images = np.random.default_rng(0).random(shape, dtype=np.float32)
    spent = call_times(engines, images, seconds)
    return {name: summarize(name, "", shape[0], times).as_dict() for name, times in spent.items()}


def call_times(
    engines: Mapping[str, Runtime], images: NDArray[np.float32], seconds: float
) -> dict[str, list[float]]:
    """Seconds of processor time of each call, in rounds that call every engine once, until each has had `seconds`."""
    spent: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        engine.infer(images)
    while min(sum(times) for times in spent.values()) < seconds:
        for name, engine in engines.items():
            start = time.process_time()
            engine.infer(images)
            spent[name].append(time.process_time() - start)
    return spent


def engines_of(
    folder: Path, threads: int | None, batch: int = 1, streams: int = 1
) -> dict[str, Callable[[], Runtime]]:
    """What opens each engine of one network; the name begins with its runtime."""

    def openvino(name: str, hint: str = "f32") -> Callable[[], Runtime]:
        return lambda: OpenVINORuntime(folder / name, hint, threads, batch=batch, streams=streams)

    def onnxruntime(name: str) -> Callable[[], Runtime]:
        return lambda: ONNXRuntime(folder / name, threads if streams == 1 else 1)

    engines = {
        "openvino fp32": openvino("float.onnx"),
        "openvino bf16": openvino("float.onnx", "bf16"),
        "openvino int8 octet": openvino("octet-openvino.onnx"),
        "openvino int8 nncf": openvino("nncf.xml"),
        "openvino int8 octet, rest bf16": openvino("octet-openvino.onnx", "bf16"),
        "openvino int8 nncf, rest bf16": openvino("nncf.xml", "bf16"),
        "onnxruntime fp32": onnxruntime("float.onnx"),
        "onnxruntime int8 octet": onnxruntime("octet-onnxruntime.onnx"),
        "onnxruntime int8 nncf": onnxruntime("nncf.onnx"),
    }
    if list(folder.glob(f"{MATMUL}-*")):
        engines |= {
            "openvino int8 octet, products int8": openvino(f"{MATMUL}-openvino.onnx"),
            "onnxruntime int8 octet, products int8": onnxruntime(f"{MATMUL}-onnxruntime.onnx"),
        }
    return engines


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
