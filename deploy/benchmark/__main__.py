"""The benchmark command: time an engine in a scenario, by layer, or against others in one run.

    python -m deploy.benchmark MODEL --runtime openvino --batch 1,4,8,12 --json out.json
    python -m deploy.benchmark --compare float.onnx@openvino:bf16 int8.onnx@openvino

A model is a path, with @RUNTIME and :PRECISION after it where they differ from the options. Without a runtime the file
decides: .xml is OpenVINO's, .engine TensorRT's, an .onnx goes to the runtime that it was exported for, else to
OpenVINO. Exit code 3 when a model cannot be loaded or run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.command import command_parser, path_argument, reports_errors, run_command, size_argument
from core.confinement import confine, run_confined
from core.errors import DeployError
from core.files import write_json, write_text
from core.image_size import ImageSize
from core.machine import describe_machine
from core.runtimes import RUNTIMES
from deploy.benchmark.layers import draw_layers, format_layers
from deploy.benchmark.pinning import PINNINGS, pin_process
from deploy.benchmark.scenarios import SCENARIOS, run_scenario
from deploy.benchmark.timing import LatencyReport, benchmark_alternately
from deploy.runtimes.base import EngineRequest, Runtime
from deploy.runtimes.engines import (
    find_batch,
    find_image_size,
    open_engine,
    runs_on_cpu,
    runtime_class,
    runtime_of,
)

DEFAULT_SIDE = 1280  # pixels, for limits, where the command line names no size

EXAMPLES = (
    "%(prog)s model.onnx --batch 1,4,8 --per-layer",
    "%(prog)s --compare float.onnx@openvino:bf16 model.onnx@openvino --table latency.md",
)


@dataclass(frozen=True)
class ModelSpec:
    """One engine of the command line: PATH[@RUNTIME[:PRECISION]]."""

    path: Path
    runtime: str
    precision: str | None

    @property
    def label(self) -> str:
        """Name in tables."""
        return f"{self.path.name}@{self.runtime}" + (f":{self.precision}" if self.precision else "")


def parse_spec(text: str, runtime: str | None, precision: str | None) -> ModelSpec:
    """Read PATH[@RUNTIME[:PRECISION]]; raises DeployError on an unknown runtime or an unreadable .onnx file."""
    name, _, rest = text.partition("@")
    path = path_argument(name)
    name, _, hint = rest.partition(":")
    if name:
        RUNTIMES[name]  # an unknown one raises
    return ModelSpec(path, name or runtime or runtime_of(path), hint or precision)


@reports_errors
def main(arguments: Sequence[str] | None = None, program: str = "python -m deploy.benchmark") -> int:
    """Run the command; returns the exit code."""
    options = _parser(program).parse_args(arguments)
    pin_process(options.pin, options.threads)
    if options.compare:
        result = _compare(options)
    elif options.model is None:
        raise DeployError("No model given; pass a path, or --compare A B.")
    else:
        result = _measure(options)
    if options.json is not None:
        write_json(options.json, result)
    return 0


# ---------------------------------------------------------------------------------------------------------- one model
def _measure(options: argparse.Namespace) -> dict[str, Any]:
    _confine([options.model], options)
    spec = parse_spec(options.model, options.runtime, options.precision)
    sizes = options.shapes or [image_size(spec.path)]
    shapes = [(batch, 3, *size) for size in sizes for batch in choose_batches([spec], options.batch)]
    static = options.scenario != "elastic" and not options.dynamic
    rows: list[dict[str, Any]] = []
    groups = [[shape] for shape in shapes] if static else [shapes]
    for group in groups:
        with load_runtime(spec, options, group[0] if static else None) as runtime:
            first_ms = first_call(runtime, group[0])
            reports = run_scenario(
                runtime, options.scenario, group, options.time, options.warmup, options.streams
            )
            for shape, report in zip(group, reports, strict=True):
                rows.append(_row(spec, runtime, report, shape, first_ms))
    print(format_rows(rows))
    result: dict[str, Any] = {"scenario": options.scenario, "rows": rows, "machine": describe_machine()}
    if options.per_layer:
        result["layers"] = _per_layer(spec, options, shapes[0])
    return result


def _confine(models: Sequence[str], options: argparse.Namespace) -> None:
    """Limit this process to what models of these sizes need, where all of them run on a CPU."""
    paths = [path_argument(text.partition("@")[0]) for text in models]
    sizes = options.shapes or [ImageSize.of(DEFAULT_SIDE)]
    largest = max(options.batch or [1]) * options.streams * max(size.height * size.width for size in sizes)
    confine(paths, 4 * 3 * largest, options.trust or not all(runs_on_cpu(path) for path in paths))


def _row(
    spec: ModelSpec, runtime: Runtime, report: LatencyReport, shape: tuple[int, ...], first_ms: float
) -> dict[str, Any]:
    return {
        "model": spec.label,
        **report.as_dict(),
        "shape": list(shape),
        "size": f"{shape[2]}x{shape[3]}",
        "load_seconds": runtime.load_seconds,
        "first_inference_ms": first_ms,
        "size_bytes": runtime.size_bytes,
        "versions": runtime.versions,
    }


def first_call(runtime: Runtime, shape: tuple[int, int, int, int]) -> float:
    """Milliseconds of the first inference, which pays for what a runtime postpones."""
    images = np.zeros(shape, np.float32)
    start = time.perf_counter()
    runtime.infer_outputs(images)
    return (time.perf_counter() - start) * 1000


def _per_layer(
    spec: ModelSpec, options: argparse.Namespace, shape: tuple[int, int, int, int]
) -> list[dict[str, Any]]:
    images = np.random.default_rng(0).random(shape, dtype=np.float32)
    with (
        tempfile.TemporaryDirectory() as folder,
        load_runtime(spec, options, shape, Path(folder) / "profile") as runtime,
    ):
        end = time.perf_counter() + max(options.time / 4, 0.2)
        while time.perf_counter() < end:
            runtime.infer_outputs(images)
        layers = runtime.layer_times()
    print(format_layers(layers))
    if options.plot is not None:
        write_text(options.plot, draw_layers(layers))
    return [{"name": i.name, "type": i.type, "precision": i.precision, "ms": i.milliseconds} for i in layers]


# ---------------------------------------------------------------------------------------------------------- comparison
def _compare(options: argparse.Namespace) -> dict[str, Any]:
    _confine(options.compare, options)
    specs = [parse_spec(text, options.runtime, options.precision) for text in options.compare]
    size = (options.shapes or [image_size(specs[0].path)])[0]
    rows: list[dict[str, Any]] = []
    for batch in choose_batches(specs, options.batch):
        shape = (batch, 3, *size)
        runtimes = [load_runtime(spec, options, shape) for spec in specs]
        firsts = [first_call(runtime, shape) for runtime in runtimes]
        reports = benchmark_alternately(runtimes, shape, options.time, warmup=3)
        for spec, runtime, report, first in zip(specs, runtimes, reports, firsts, strict=True):
            ratio = reports[0].median_ms / report.median_ms
            rows.append({**_row(spec, runtime, report, shape, first), "speedup": ratio})
        for runtime in runtimes:
            runtime.close()
    print(format_rows(rows))
    if options.table is not None:
        write_text(options.table, format_comparison(rows, len(specs)))
    print(f"speedup: median of {specs[0].label} / median of the row, measured alternately in one run")
    return {"scenario": "compare", "rows": rows, "machine": describe_machine()}


# ----------------------------------------------------------------------------------------------------------- loading
def load_runtime(
    spec: ModelSpec,
    options: argparse.Namespace,
    shape: tuple[int, int, int, int] | None,
    profile: Path | None = None,
) -> Runtime:
    """Load a model for a fixed shape, or dynamic when `shape` is None."""
    request = EngineRequest(
        variant=spec.precision,
        threads=options.threads,
        batch=shape[0] if shape else None,
        image_size=shape[2:] if shape else None,
        streams=options.streams,
        pinning={"none": None, "core": True, "numa": False}[options.pin],
        cuda_graph=options.graph,
        profile=profile,
    )
    return open_engine(spec.runtime, spec.path, request)


def choose_batches(specs: Sequence[ModelSpec], wanted: Sequence[int] | None) -> Sequence[int]:
    """The batches that are asked for; without any the one that a model is fixed to, else 1.

    Raises:
        DeployError: a model is fixed to another batch, and its runtime cannot change that.
    """
    fixed = {spec: find_batch(spec.path) for spec in specs}
    chosen = wanted or [next((batch for batch in fixed.values() if batch), 1)]
    for spec, batch in fixed.items():
        others = [size for size in chosen if batch is not None and size != batch]
        if others and not runtime_class(spec.runtime).can_reshape:
            raise DeployError(
                f"{spec.label} takes batches of {batch} only, not of {others[0]}: use --batch {batch}, or export it "
                "with dynamic_batch=true."
            )
    return chosen


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) from a file's input shape or metadata; raises DeployError if neither states it."""
    size = find_image_size(path)
    if size is None:
        raise DeployError(f"{path} does not state its image size; pass --shapes HEIGHTxWIDTH.")
    return size


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a text table."""
    columns = {
        "model": "model", "precision": "precision", "size": "size", "batch": "batch", "median_ms": "median",
        "mean_ms": "mean", "std_ms": "std", "p90_ms": "p90", "p95_ms": "p95", "p99_ms": "p99",
        "images_per_second": "images/s", "first_inference_ms": "first", "load_seconds": "load s",
        "size_bytes": "bytes", "speedup": "speedup",
    }  # fmt: skip
    used = [key for key in columns if all(key in row for row in rows)]
    lines = [[columns[key] for key in used]]
    for row in rows:
        lines.append([f"{row[key]:.2f}" if isinstance(row[key], float) else str(row[key]) for key in used])
    widths = [max(len(line[i]) for line in lines) for i in range(len(used))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def format_comparison(rows: Sequence[dict[str, Any]], num_models: int) -> str:
    """Latency by batch as deployers publish it: one row a batch, one column a model, difference to the first."""
    models = [f"{row['model']} ({row['precision']})" for row in rows[:num_models]]
    lines = [
        "| batch | " + " | ".join(f"{name}, ms" for name in models) + " |",
        "|---" * (num_models + 1) + "|",
    ]
    for start in range(0, len(rows), num_models):
        group = rows[start : start + num_models]
        first = group[0]["median_ms"]
        cells = [f"{first:.2f}"]
        cells += [
            f"{r['median_ms']:.2f} ({r['median_ms'] - first:+.2f}, x{r['speedup']:.2f})" for r in group[1:]
        ]
        lines.append(f"| {group[0]['batch']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _parser(program: str) -> argparse.ArgumentParser:
    parser = command_parser(program, "Time engines; times are in ms.", EXAMPLES)
    parser.add_argument("model", nargs="?", help="PATH[@RUNTIME[:PRECISION]]")
    parser.add_argument("--compare", nargs="+", metavar="MODEL", help="time these alternately in one run")
    parser.add_argument("--runtime", choices=RUNTIMES, help="default: the file's own")
    parser.add_argument(
        "--precision", help="OpenVINO's hint (f32, bf16, f16, auto) or ONNX Runtime's provider"
    )
    parser.add_argument("--scenario", choices=SCENARIOS, default="sync")
    parser.add_argument(
        "--batch", type=_numbers, help="batch sizes, such as 1,4,8,12; default: the model's own, or 1"
    )
    parser.add_argument("--shapes", type=_sizes, help="image sizes, such as 640x640,320x320")
    parser.add_argument("--dynamic", action="store_true", help="keep the shapes of the engine open")
    parser.add_argument("--streams", type=_positive, default=1, help="requests at once (async)")
    parser.add_argument(
        "--trust", action="store_true", help="lift the limits on memory and time, for models of your own"
    )
    parser.add_argument("--threads", type=_positive, help="CPU threads")
    parser.add_argument(
        "--pin", choices=PINNINGS, default="none", help="bind the process to cores or a NUMA node"
    )
    parser.add_argument("--time", type=float, default=10.0, help="seconds to time each shape")
    parser.add_argument("--warmup", type=float, default=2.0, help="seconds before")
    parser.add_argument("--graph", action="store_true", help="run TensorRT engines as CUDA graphs")
    parser.add_argument("--per-layer", action="store_true", help="times by layer as well")
    parser.add_argument("--plot", type=Path, help="draw the times by layer to this SVG file")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--table", type=Path, help="write the comparison as a Markdown table to this file")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _sizes(text: str) -> list[ImageSize]:
    return [size_argument(part) for part in text.split(",")]


if __name__ == "__main__":
    run_command(lambda: run_confined(main))
