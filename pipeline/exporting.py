"""What `export.py` does: a finished run's quantized model as ONNX for any target."""

from __future__ import annotations

from pathlib import Path

from configs.compose import read
from configs.deploy_schema import ExportConfig
from core.errors import ConfigError
from core.runtimes import runtime_for
from core.targets import TARGETS
from deploy import build_engine
from pipeline.job import Job
from pipeline.run.directory import CONFIG, Run
from pipeline.run.files import export_path
from pipeline.run.progress import say
from pipeline.stages.export import export_quantized

SHARED = (
    "target",
    "batch",
    "dynamic_batch",
    "dynamic_size",
    "outputs",
    "nms",
    "scale_type",
    "opset",
    "range_images",
)


def run_export(request: ExportConfig) -> Path:
    """Export the best quantized model of a run; returns the path of the ONNX file and prints it.

    Raises:
        RunError: no run directory, or one without a quantized model.
        ConfigError: a setting that the target does not support.
        DeployError: the exporter or the runtime refuses.
    """
    run = Run.open(Path(request.run))
    config = read(run.path(CONFIG), trust=request.trust)
    config.device = request.device
    target = request.target
    for name in SHARED:
        setattr(config.deploy, name, getattr(request, name))
    runtime = runtime_for(target) if request.build else None
    if runtime is not None and runtime.built_by is not None:
        raise ConfigError(
            f"build=true: {runtime.title} engines are built by {runtime.built_by}; export target={target} without "
            "build=true"
        )
    if request.outputs not in TARGETS[target].outputs:
        raise ConfigError(
            f"outputs={request.outputs}: target={target} runs outputs={', '.join(TARGETS[target].outputs)}"
        )
    path = Path(request.output) if request.output else export_path(run, target)
    job = Job(config, run)
    TARGETS[target].opset_for(request.scale_type, request.opset)
    report = export_quantized(job, target, path)
    if runtime is not None:
        say(f"engine: {build_engine(runtime.name, path, path.parent)}")
    print(report.path)
    return report.path
