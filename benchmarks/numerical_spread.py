"""How far AP moves when the same INT8 network is computed in another order, and what is left of it on average.

    python benchmarks/numerical_spread.py runs/bccd/latest [--split val] [--views 8] [--json out.json]

A quantized network is a chain of roundings. Two executions that differ in the last bit of a float (another thread
count, memory layout, library or engine) now and then round a value to the neighbouring code; the next layer
spreads it, and after a dozen layers a fifth of all codes differ by a step or more. Every such execution is equally
right, and each has its own AP. On a hundred images the APs lie up to 0.004 apart, so a single pair of figures cannot
tell whether one of two executions is better by 0.001.

The script measures the float network and the run's quantized model: in torch on whole numbers (as every row of the
report), in torch on floats in several orders, in ONNX Runtime node by node, and in the CPU engines. No CPU engine runs
FP8: there it is torch, and ONNX Runtime node by node. With `--views N`
each is measured on N views of the images, moved by up to three pixels, boxes moved back: the chance of single
roundings then averages out. Printed are the AP on the first view (the images as they are), the mean over the views, and
the mean difference to the float network and to torch with its standard error over the views.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.views import SHIFTS, ap_of_views, mean_difference
from configs.compose import read
from data import Found, Predict
from deploy import ONNXRuntime, OpenVINORuntime, Runtime
from pipeline.evaluation.suppression import is_nms_free
from pipeline.job import Job
from pipeline.run.directory import CONFIG, Run
from pipeline.stages.export import export_exact, export_quantized, has_fp8
from quant import quantized_layers

Decoded = Callable[[Tensor], Tensor]
NO_RUN = "numerical_spread: skipped, no run directory given (python benchmarks/numerical_spread.py runs/bccd/latest)"
FLOAT, TORCH = "float", "torch, whole numbers"


def executions(job: Job, folder: Path, orders: bool) -> dict[str, Decoded]:
    """Name -> images [B, 3, H, W] to decoded outputs: the float network and ways of computing the quantized one."""
    decode = job.networks.detector.decode
    whole, floats = job.networks.best()[0], job.networks.best()[0]
    for layer in quantized_layers(floats).values():
        layer.input_grid = ()

    def torch_with(network: nn.Module, threads: int, layout: torch.memory_format) -> Decoded:
        def decoded(images: Tensor) -> Tensor:
            torch.set_num_threads(threads)
            return decode(network(images.contiguous(memory_format=layout)))

        return decoded

    def engine(runtime: Runtime) -> Decoded:
        return lambda images: torch.from_numpy(runtime.infer(images.numpy()))

    plain, last = torch.contiguous_format, torch.channels_last
    found = {FLOAT: torch_with(job.networks.detector.network, 1, plain), TORCH: torch_with(whole, 1, plain)}
    if has_fp8(whole):
        path = export_exact(job, folder / "exact.onnx")
        return found | {"ONNX Runtime, node by node": engine(ONNXRuntime(path, optimize=False))}
    export_quantized(job, "openvino", folder / "openvino.onnx")
    export_quantized(job, "onnxruntime", folder / "onnxruntime.onnx")
    if orders:
        export_quantized(job, "trt10", folder / "trt10.onnx")
        found |= {
            "torch, whole numbers, 2 threads, channels last": torch_with(whole, 2, last),
            "torch, floats": torch_with(floats, 1, plain),
            "torch, floats, 2 threads": torch_with(floats, 2, plain),
            "torch, floats, channels last": torch_with(floats, 1, last),
            "ONNX Runtime, signed graph, node by node": engine(
                ONNXRuntime(folder / "trt10.onnx", optimize=False)
            ),
        }
    return found | {
        "engine OpenVINO": engine(OpenVINORuntime(folder / "openvino.onnx", "f32")),
        "engine ONNX Runtime": engine(ONNXRuntime(folder / "onnxruntime.onnx")),
    }


def detections_of(job: Job, decoded: Decoded) -> Predict:
    """Images to detections, chosen as for every row."""
    nms_free = is_nms_free(job.networks.detector.decode)

    def predict(images: Tensor) -> Sequence[Found]:
        return job.evaluator.detections(decoded(images), nms_free=nms_free)

    return predict


def describe(ap: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Per execution: AP of the first view, mean over views, mean difference to float and torch, standard errors."""
    found = {}
    for name, values in ap.items():
        found[name] = {"first": values[0], "mean": float(np.mean(values))}
        for label, reference in (("float", FLOAT), ("torch", TORCH)):
            difference, error = mean_difference(values, ap[reference])
            found[name] |= {f"to_{label}": difference, f"to_{label}_error": error}
    return found


def main(arguments: list[str]) -> int:
    """Run the benchmark; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", help="run directory of train_qat.py")
    parser.add_argument("--split", default="val", help="split to measure on")
    parser.add_argument("--views", type=int, default=1, choices=range(1, len(SHIFTS) + 1), metavar="N")
    parser.add_argument(
        "--orders", action="store_true", help="also torch in other orders, and ONNX Runtime literally"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    if options.run is None:
        print(NO_RUN)
        return 0
    run = Run.open(Path(options.run))
    config = read(run.path(CONFIG))
    config.data.val_split, config.data.workers = options.split, 0
    job = Job(config, run)
    ap: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, decoded in executions(job, Path(folder), options.orders).items():
            ap[name] = ap_of_views(job, detections_of(job, decoded), options.views)
    figures = describe(ap)
    print(f"{config.experiment}, {options.split}: {len(job.splits.val)} images, {options.views} views")
    for name, row in figures.items():
        print(
            f"  {name:48s} AP {row['first']:.4f}   mean {row['mean']:.4f}   to float {row['to_float']:+.4f} "
            f"± {row['to_float_error']:.4f}   to torch {row['to_torch']:+.4f} ± {row['to_torch_error']:.4f}"
        )
    if options.json is not None:
        result: dict[str, Any] = {"images": len(job.splits.val), "ap": ap, "figures": figures}
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
