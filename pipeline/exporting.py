"""What `export.py` does: a finished run's quantized model as ONNX for any target."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from configs.compose import read
from configs.schema import ExportConfig
from core.errors import ConfigError
from deploy import build_engine
from deploy.export import target_opset
from pipeline.job import Job
from pipeline.run.directory import CONFIG, Run
from pipeline.run.progress import say
from pipeline.stages.export import Target, export_quantized

SHARED = ("target", "dynamic_batch", "dynamic_size", "outputs", "nms", "scale_type", "opset", "range_images")


def run_export(request: ExportConfig) -> Path:
    """Export the best quantized model of a run; returns the path of the ONNX file and prints it.

    Raises:
        RunError: no run directory, or one without a quantized model.
        ConfigError: a setting that the target does not support.
        DeployError: the exporter or the runtime refuses.
    """
    run = Run.open(Path(request.run))
    config = read(run.path(CONFIG))
    config.device = request.device
    target = cast(Target, request.target)
    for name in SHARED:
        setattr(config.deploy, name, getattr(request, name))
    if request.build and target in {"trt10", "trt11"}:
        raise ConfigError(
            f"build=true: TensorRT engines are built by scripts/val_trt.sh in NVIDIA's container; export "
            f"target={target} without build=true"
        )
    if request.outputs == "efficient_nms" and target not in {"trt10", "trt11"}:
        raise ConfigError(
            f"outputs=efficient_nms is TensorRT's plugin: target={target} runs outputs=onnx_nms"
        )
    path = Path(request.output) if request.output else run.path("export") / f"model-{target}.onnx"
    job = Job(config, run)
    target_opset(target, request.scale_type, request.opset)
    report = export_quantized(job, target, path)
    if request.build:
        say(f"engine: {build_engine(target, path, path.parent)}")
    print(report.path)
    return report.path
