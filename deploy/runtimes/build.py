"""ONNX file -> engine file, for the runtime of that name."""

from __future__ import annotations

from pathlib import Path

from core.errors import DeployError
from core.files import write_bytes
from deploy.graph.model import load_onnx, save_onnx, verify_onnx
from deploy.graph.passes import count_qdq, run_pass
from deploy.runtimes.openvino import build_openvino
from deploy.runtimes.tensorrt_api import import_tensorrt, rules_of
from deploy.runtimes.tensorrt_builder import BuildOptions, build_tensorrt
from deploy.targets.typed import strongly_typed

RUNTIMES = ("openvino", "onnxruntime", "tensorrt")


def build_engine(runtime: str, onnx_path: Path, out_dir: Path, options: BuildOptions | None = None) -> Path:
    """Build the engine of `onnx_path` in `out_dir`; returns its path.

    openvino: IR, NAME.xml with NAME.bin. onnxruntime: reads ONNX itself, the checked file is copied.
    tensorrt: NAME.engine with NAME.engine.json, built with `options`, on the GPU it is to run on;
    a version without an FP16 flag gets an FP16 graph for precision "fp16".

    Raises:
        DeployError: unknown runtime, or the runtime's own refusal.
    """
    match runtime:
        case "openvino":
            return build_openvino(onnx_path, out_dir)
        case "onnxruntime":
            verify_onnx(onnx_path)
            destination = out_dir / onnx_path.name
            if destination.resolve() != onnx_path.resolve():
                write_bytes(destination, onnx_path.read_bytes())
            return destination
        case "tensorrt":
            options = options or BuildOptions()
            if (
                options.precision == "fp16"
                and rules_of(str(import_tensorrt().__version__)).always_strongly_typed
            ):
                onnx_path = write_half(onnx_path, out_dir / "fp16" / onnx_path.name)
            return build_tensorrt(onnx_path, out_dir, options)
    raise DeployError(f"Unknown runtime '{runtime}'; expected one of {', '.join(RUNTIMES)}.")


def write_half(source: Path, destination: Path) -> Path:
    """Write a float graph in FP16 with an FP32 decode, for TensorRT versions without an FP16 flag.

    Raises:
        DeployError: the graph is quantized; such graphs are exported for trt11.
    """
    model = load_onnx(source)
    if any(count_qdq(model)):
        raise DeployError(f"{source} is quantized; export it with target=trt11 in place of --precision fp16.")
    run_pass(model, strongly_typed("fp16"))
    for entry in model.metadata_props:
        if entry.key == "octet.target":
            entry.value = "trt11"
    save_onnx(model, destination)
    return destination
