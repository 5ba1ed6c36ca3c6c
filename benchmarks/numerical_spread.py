"""How far AP moves when the same INT8 network is computed in another order.

    python benchmarks/numerical_spread.py runs/bccd/latest [--splits val,train] [--json out.json]

A quantized network is a chain of roundings. Two executions that differ in the last bit of a float (another thread
count, memory layout, library or engine) now and then round a value to the neighbouring code; the next layer
spreads it, and after a dozen layers a fifth of all codes differ by a step or more. Every such execution is equally
right, and each has its own AP. This script measures the same run's quantized model as torch computes it on
whole numbers (as every row of the report is), as torch computes it on floats in several orders, and in the CPU engines,
and prints the APs beside each other. The range over the float orders is what no comparison between engines can resolve
on that many images.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.compose import read
from deploy import ONNXRuntime, OpenVINORuntime, Runtime
from pipeline.deploying import export_quantized
from pipeline.job import Job
from pipeline.measuring import value_of
from pipeline.run import CONFIG, Run
from quant import quantized_layers

Decoded = Callable[[Tensor], Tensor]
NO_RUN = "numerical_spread: skipped, no run directory given (python benchmarks/numerical_spread.py runs/bccd/latest)"


def executions(job: Job, folder: Path) -> dict[str, Decoded]:
    """Name -> images [B, 3, H, W] to decoded outputs, for every way of computing the run's best quantized model."""
    decode = job.detector.decode
    whole, floats = job.best_quantized()[0], job.best_quantized()[0]
    for layer in quantized_layers(floats).values():
        layer.input_grid = ()

    def torch_with(network: nn.Module, threads: int, layout: torch.memory_format) -> Decoded:
        def decoded(images: Tensor) -> Tensor:
            torch.set_num_threads(threads)
            return decode(network(images.contiguous(memory_format=layout)))

        return decoded

    def engine(runtime: Runtime) -> Decoded:
        return lambda images: torch.from_numpy(runtime.infer(images.numpy()))

    for target in ("openvino", "onnxruntime", "trt10"):
        export_quantized(job, target, folder / f"{target}.onnx")
    plain, last = torch.contiguous_format, torch.channels_last
    return {
        "torch, whole numbers": torch_with(whole, 1, plain),
        "torch, whole numbers, 2 threads, channels last": torch_with(whole, 2, last),
        "torch, floats": torch_with(floats, 1, plain),
        "torch, floats, 2 threads": torch_with(floats, 2, plain),
        "torch, floats, channels last": torch_with(floats, 1, last),
        "ONNX Runtime, signed graph": engine(ONNXRuntime(folder / "trt10.onnx", optimize=False)),
        "OpenVINO": engine(OpenVINORuntime(folder / "openvino.onnx", "f32")),
        "ONNX Runtime": engine(ONNXRuntime(folder / "onnxruntime.onnx")),
    }


def measure(job: Job, ways: dict[str, Decoded]) -> dict[str, dict[str, float]]:
    """AP of each way on the job's validation split, and how far its outputs are from the first way's.

    `scores` is the mean difference of the class scores over the anchors that the first way gives more than 0.1.
    """
    reference: list[Tensor] = []
    found = {}
    for name, decoded in ways.items():
        outputs: list[Tensor] = []

        def predict(
            images: Tensor, decoded: Decoded = decoded, outputs: list[Tensor] = outputs
        ) -> list[Tensor]:
            outputs.append(decoded(images))
            return job.detections(outputs[-1])

        with torch.inference_mode():
            ap = value_of(job.evaluate_batches(predict, job.val_loader(1)))
        reference = reference or outputs
        found[name] = {"ap": ap, "scores": score_difference(reference, outputs)}
        print(f"  {name:48s} AP {ap:.4f}   scores differ by {found[name]['scores']:.5f}", flush=True)
    return found


def score_difference(reference: list[Tensor], outputs: list[Tensor]) -> float:
    """Mean over the confident anchors of the largest class score difference."""
    differences = []
    for expected, found in zip(reference, outputs, strict=True):
        confident = expected[:, 4:].amax(1) > 0.1
        differences.append((expected - found)[:, 4:].abs().amax(1)[confident])
    return float(torch.cat(differences).mean())


def main(arguments: list[str]) -> int:
    """Run the benchmark; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", help="run directory of train_qat.py")
    parser.add_argument("--splits", default="val", help="comma-separated splits, each measured by itself")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    if options.run is None:
        print(NO_RUN)
        return 0
    run = Run.open(Path(options.run))
    results: dict[str, Any] = {}
    for split in options.splits.split(","):
        config = read(run.path(CONFIG))
        config.data.val_split, config.data.limit_val, config.data.workers = split, None, 0
        job = Job(config, run)
        print(f"{config.experiment}, split {split}, {len(job.val_set)} images")
        with tempfile.TemporaryDirectory() as folder:
            results[split] = measure(job, executions(job, Path(folder)))
        aps = [figures["ap"] for figures in results[split].values()]
        print(f"  range of AP over all: {max(aps) - min(aps):.4f}")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
