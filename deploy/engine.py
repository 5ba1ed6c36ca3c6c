"""Engines from the command line: build one, or look into a TensorRT engine.

    python -m deploy.engine build MODEL.onnx FOLDER --runtime tensorrt --max-batch 12 --timing-cache timing.cache
    python -m deploy.engine layers MODEL.engine --json layers.json --svg layers.svg
    python -m deploy.engine precision MODEL.onnx
    python -m deploy.engine version

The last line of `build` is the engine's path, that of `precision` what the codes of a graph are (int8, fp8, int8-fp8;
fp32 where there are none), that of `version` TensorRT's version. Exit code 3 when something is missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from core.choices import CAPABILITIES, DEFAULT_CAPABILITIES
from core.command import command_parser, path_argument, reports_errors, run_command
from core.errors import DeployError
from core.files import write_text
from core.runtimes import RUNTIMES, runtime_for
from deploy.graph.drawing import Box, draw_boxes
from deploy.graph.model import load_onnx, stored_metadata
from deploy.graph.quantizers import quantized_precision
from deploy.runtimes.base import EngineRequest
from deploy.runtimes.engines import build_engine, runtime_class, runtime_of
from deploy.runtimes.tensorrt_builder import PRECISIONS, BuildOptions

if TYPE_CHECKING:
    from deploy.runtimes.tensorrt import TensorRTRuntime  # imports torch

BUILD_EXAMPLES = (
    "%(prog)s runs/bccd/latest/model.onnx engines",
    "%(prog)s model-trt10.onnx engines --max-batch 12 --timing-cache timing.cache",
    "%(prog)s model-trt11.onnx engines --runtime tensorrt_rtx --capabilities SM86,SM89",
)
TYPE_WORDS = {
    "Int8": "int8",
    "FP8": "fp8",
    "Half": "fp16",
    "FP16": "fp16",
    "BFloat16": "bf16",
    "Float": "fp32",
    "FP32": "fp32",
}


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parser().parse_args(arguments)
    match options.command:
        case "build":
            print(_build(options))
        case "layers":
            _layers(options)
        case "precision":
            print(quantized_precision(load_onnx(options.model)) or "fp32")
        case "version":
            print(_tensorrt_class(options.runtime).import_library().__version__)
    return 0


@reports_errors
def build_main(arguments: Sequence[str] | None = None, program: str = "octet compile") -> int:
    """Run `build` alone, with the runtime of the graph as default; returns the exit code."""
    parser = command_parser(program, "Build an engine of an ONNX file; prints its path.", BUILD_EXAMPLES)
    _add_build(parser, None)
    options = parser.parse_args(arguments)
    if options.runtime is None:
        target = stored_metadata(load_onnx(options.model)).get("octet.target", "openvino")
        options.runtime = runtime_for(target).name
    print(_build(options))
    return 0


def _build(options: argparse.Namespace) -> Path:
    from deploy.runtimes.tensorrt import TensorRTRuntime

    build = BuildOptions(
        precision=options.precision,
        best_batch=options.best_batch,
        max_batch=options.max_batch,
        workspace_bytes=options.workspace << 20,
        timing_cache=options.timing_cache,
        optimization_level=options.level,
    )
    request = EngineRequest(
        options=build if issubclass(runtime_class(options.runtime), TensorRTRuntime) else None,
        compute_capabilities=tuple(options.capabilities.split(",") if options.capabilities else ()),
    )
    return build_engine(options.runtime, options.model, options.folder, request)


def _layers(options: argparse.Namespace) -> None:
    with _tensorrt_class(runtime_of(options.engine))(options.engine, profile=options.runs > 0) as runtime:
        images = np.zeros(runtime.profile_shapes()[1], np.float32)
        for _ in range(options.runs):
            runtime.infer(images)
        runtime.write_layers(options.json)
        if options.svg is not None:
            write_text(options.svg, draw_engine(runtime.layer_information()))
    print(options.json)


def _tensorrt_class(runtime: str) -> type[TensorRTRuntime]:
    from deploy.runtimes.tensorrt import TensorRTRuntime

    found = runtime_class(runtime)
    if not issubclass(found, TensorRTRuntime):
        raise DeployError(
            f"Layers and versions are those of TensorRT; {RUNTIMES[runtime].title} is another runtime."
        )
    return found


def draw_engine(information: Mapping[str, Any]) -> str:
    """SVG of an engine's layers from TensorRT's layer information, which has to be detailed.

    Raises:
        DeployError: the engine was built without detailed profiling verbosity.
    """
    layers = information.get("Layers", [])
    if not layers or not all(isinstance(layer, dict) for layer in layers):
        raise DeployError(
            "The engine has the names of its layers only; build it with detailed profiling verbosity."
        )
    makers: dict[str, int] = {}
    boxes = []
    for index, layer in enumerate(layers):
        sources = tuple(makers[t["Name"]] for t in layer.get("Inputs", []) if t["Name"] in makers)
        label = str(layer.get("LayerType", "layer"))
        boxes.append(Box(str(layer.get("Name", "")), label, _precision(layer), sources))
        makers.update({tensor["Name"]: index for tensor in layer.get("Outputs", [])})
    return draw_boxes(boxes)


def _precision(layer: Mapping[str, Any]) -> str:
    """Precision of a layer from the formats of its inputs, "Int8 NC/32HW32" or "Half"."""
    formats = " ".join(str(tensor.get("Format/Datatype", "")) for tensor in layer.get("Inputs", []))
    return next((name for word, name in TYPE_WORDS.items() if word in formats), "other")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy.engine", description="Build and inspect engines.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_build(commands.add_parser("build", help="ONNX file to engine; prints the engine's path"), "tensorrt")
    layers = commands.add_parser("layers", help="write a TensorRT engine's layers")
    layers.add_argument("engine", type=path_argument)
    layers.add_argument("--json", type=Path, required=True)
    layers.add_argument("--svg", type=Path)
    layers.add_argument("--runs", type=int, default=20, help="timed runs; 0 for no times")
    precision = commands.add_parser("precision", help="print the precision of a graph's codes")
    precision.add_argument("model", type=path_argument)
    version = commands.add_parser("version", help="print TensorRT's version")
    version.add_argument("--runtime", choices=("tensorrt", "tensorrt_rtx"), default="tensorrt")
    return parser


def _add_build(build: argparse.ArgumentParser, default: str | None) -> None:
    """Add the arguments of a build; without a default runtime the graph's own is taken."""
    build.add_argument("model", type=path_argument, help="ONNX file")
    build.add_argument("folder", type=Path, help="where the engine goes")
    build.add_argument(
        "--runtime",
        choices=RUNTIMES,
        default=default,
        help=f"default: {default or 'the one that the graph was exported for'}",
    )
    build.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="default: that of the file's codes; this and the following options are for TensorRT",
    )
    build.add_argument("--best-batch", type=int, default=1, help="batch that the kernels are chosen for")
    build.add_argument("--max-batch", type=int, default=16)
    build.add_argument("--workspace", type=int, default=4096, help="MiB")
    build.add_argument("--timing-cache", type=Path)
    build.add_argument(
        "--capabilities",
        help=f"GPUs that TensorRT for RTX builds for, of {','.join(CAPABILITIES)}; left out, this machine's GPU, or "
        f"{','.join(DEFAULT_CAPABILITIES)} without one",
    )
    build.add_argument("--level", type=int, choices=range(6), help="optimization level")


if __name__ == "__main__":
    run_command(main)
