"""ONNX file -> engine file, for the runtime of that name."""

from __future__ import annotations

from pathlib import Path

from deploy.errors import DeployError
from deploy.graph import verify_onnx, write_atomically
from deploy.openvino_runtime import build_openvino
from deploy.tensorrt_builder import BuildOptions, build_tensorrt

RUNTIMES = ("openvino", "onnxruntime", "tensorrt")


def build_engine(runtime: str, onnx_path: Path, out_dir: Path, options: BuildOptions | None = None) -> Path:
    """Build the engine of `onnx_path` in `out_dir`; returns its path.

    openvino: IR, NAME.xml with NAME.bin. onnxruntime: reads ONNX itself, the checked file is copied.
    tensorrt: NAME.engine with NAME.engine.json, built with `options`, on the GPU it is to run on.

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
                write_atomically(destination, onnx_path.read_bytes())
            return destination
        case "tensorrt":
            return build_tensorrt(onnx_path, out_dir, options or BuildOptions())
    raise DeployError(f"Unknown runtime '{runtime}'; expected one of {', '.join(RUNTIMES)}.")
