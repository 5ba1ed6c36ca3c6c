"""TensorRT for RTX: plans that are built on any machine for named GPUs, and run where there is such a GPU.

Next to the plan NAME.plan is NAME.plan.json: version, compute capabilities, hashes, kernels, and for a quantized
graph what the compiler made of its convolutions on each of the capabilities. Kernels are compiled when the plan is
loaded on the GPU, so a build proves types, fusions and bytes moved, not times.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto

from core.choices import DEFAULT_CAPABILITIES
from core.errors import DeployError
from core.files import write_bytes, write_json
from deploy.compile.compiler import (
    SMALLEST_SIZE,
    WITHOUT_INT8_CONVOLUTIONS,
    Shapes,
    check_capabilities,
    compile_graph,
    import_tensorrt_rtx,
)
from deploy.compile.report import inspect_build
from deploy.graph.model import load_onnx
from deploy.runtimes.base import EngineRequest
from deploy.runtimes.sidecars import read_sidecar
from deploy.runtimes.tensorrt import TensorRTRuntime, read_engine
from deploy.runtimes.tensorrt_builder import (
    BuildOptions,
    check_codes,
    gpu_name,
    profile_range,
    read_facts,
    sidecar_path,
    write_half,
)

LOGGER = logging.getLogger(__name__)
SUPPRESSIONS = frozenset({"NonMaxSuppression", "EfficientNMS_TRT"})


class TensorRTRTXRuntime(TensorRTRuntime):
    """A plan built by `build_tensorrt_rtx`; see `TensorRTRuntime`, whose calls it shares."""

    name = "tensorrt_rtx"
    title = "TensorRT for RTX"

    @classmethod
    def import_library(cls) -> Any:
        """See `TensorRTRuntime.import_library`."""
        return import_tensorrt_rtx()

    @classmethod
    def read(cls, path: Path, version: str) -> tuple[dict[str, Any], bytes]:
        """Sidecar and plan for this `version`; raises DeployError where it is for another version or other GPUs."""
        sidecar, plan = read_engine(path, {"tensorrt_rtx": version})
        here = gpu_capability()
        if here is not None and here not in sidecar["capabilities"]:
            raise DeployError(
                f"{path} was built for {', '.join(sidecar['capabilities'])}, this GPU is {here}; build it with "
                f"deploy.compute_capabilities=[{here}]."
            )
        return sidecar, plan

    @classmethod
    def require(cls, target: str | None = None) -> None:
        """See `Runtime.require`: plans are built without a GPU."""
        import_tensorrt_rtx()

    @classmethod
    def can_run(cls) -> bool:
        """See `Runtime.can_run`."""
        return gpu_capability() is not None

    @classmethod
    def build(cls, onnx_path: Path, out_dir: Path, request: EngineRequest) -> Path:
        """NAME.plan with NAME.plan.json, for the compute capabilities of the request."""
        return build_tensorrt_rtx(onnx_path, out_dir, request)

    @classmethod
    def stored_details(cls, path: Path) -> dict[str, Any]:
        """The GPUs it was built for, and the engine in numbers for each of them; megabytes are 10^6 bytes."""
        sidecar = read_sidecar(path)
        try:
            compiled = {
                build["capability"]: {
                    "kernels": build["engine"]["num_kernels"],
                    "convolutions": build["engine"]["convolutions"],
                    "moved_megabytes": build["engine"]["moved_bytes"] / 1e6,
                    "fp16_moved_megabytes": build["fp16"]["moved_bytes"] / 1e6,
                    "findings": len(build["findings"]),
                }
                for build in sidecar["compiled"]
            }
            return {"built_for": sidecar["capabilities"], **({"compiled": compiled} if compiled else {})}
        except (KeyError, TypeError, OverflowError) as error:
            raise DeployError(
                f"{sidecar_path(path)} is not an engine's description ({error!r}); build the engine again."
            ) from error

    @property
    def versions(self) -> dict[str, str]:
        """The library's version and the GPU."""
        return {"tensorrt_rtx": str(self._trt.__version__), "gpu": gpu_name()}


def gpu_capability() -> str | None:
    """Compute capability of the current GPU, such as "SM89"; None without one."""
    return "SM{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def build_tensorrt_rtx(onnx_path: Path, out_dir: Path, request: EngineRequest) -> Path:
    """Build OUT_DIR/NAME.plan and its sidecar; returns the plan's path.

    Args:
        onnx_path: file exported for tensorrt_rtx or trt11, or any other that TensorRT reads. The types in it are those
            of the engine; for precision "f16" a float file is written in FP16 first.
        out_dir: folder for the plan.
        request: precision, batch, image size (or `options`, a `BuildOptions`) and compute capabilities.

    Raises:
        DeployError: the library is missing; unsigned codes, or NMS in the graph; a profile that starts below 160 px;
            or the library's own refusal with its messages.
    """
    options = request.options or BuildOptions.of(request)
    here = gpu_capability()
    capabilities = request.compute_capabilities or ((here,) if here is not None else DEFAULT_CAPABILITIES)
    check_capabilities(capabilities)
    if options.precision == "fp16":
        onnx_path = write_half(onnx_path, out_dir / "fp16" / onnx_path.name)
    facts, model = read_facts(onnx_path), load_onnx(onnx_path)
    check_codes(facts, options.precision, "tensorrt_rtx")
    check_suppression(model)
    shapes = image_shapes(model, options)
    if facts.is_quantized:
        for name in WITHOUT_INT8_CONVOLUTIONS.intersection(capabilities):
            LOGGER.warning(
                "%s: no INT8 convolutions there; they will run in FP16, on all GPUs of this plan (%s). Build an FP16 "
                "engine for %s, in a separate plan.",
                name,
                ", ".join(capabilities),
                name,
            )
    start = time.perf_counter()
    built = compile_graph(model, capabilities, shapes)
    reports = []
    if facts.is_quantized:
        report = inspect_build(model, ",".join(capabilities), options.best_size)
        reports = [replace(report, capability=name) for name in capabilities]
        for finding in report.findings:
            LOGGER.warning("%s: %s. %s.", finding.name, finding.hazard, finding.remedy)
    path = out_dir / f"{onnx_path.stem}.plan"
    write_bytes(path, built.plan)
    sidecar = {
        "tensorrt_rtx": built.version,
        "capabilities": list(capabilities),
        "engine_sha256": hashlib.sha256(built.plan).hexdigest(),
        "onnx": onnx_path.name,
        "onnx_sha256": facts.sha256,
        "precision": facts.codes or options.precision,
        "shapes": asdict(shapes),
        "metadata": facts.metadata,
        "kernels": [
            {"name": kernel.name, "kind": kernel.kind, "nodes": kernel.nodes} for kernel in built.kernels
        ],
        "compiled": [report.as_dict() for report in reports],
        "build_seconds": time.perf_counter() - start,
    }
    write_json(sidecar_path(path), sidecar)
    return path


def check_suppression(model: ModelProto) -> None:
    """Raise DeployError for a graph with NMS, which builds on no machine: its kernels are chosen on a GPU."""
    found = next((node.op_type for node in model.graph.node if node.op_type in SUPPRESSIONS), None)
    if found is not None:
        raise DeployError(
            f"The graph has NMS in it ({found}), which TensorRT for RTX does not build; export with outputs=decoded or "
            "outputs=raw."
        )


def image_shapes(model: ModelProto, options: BuildOptions) -> Shapes:
    """Shapes of the images that the plan takes; raises DeployError for a profile that starts too small."""
    images = model.graph.input[0]
    dims = [dim.dim_value or -1 for dim in images.type.tensor_type.shape.dim]
    shapes = Shapes(*profile_range(images.name, dims, options))
    if -1 in dims[2:] and min(shapes.smallest[2:]) < SMALLEST_SIZE:
        raise DeployError(
            f"The smallest images of the plan are {shapes.smallest[2]}x{shapes.smallest[3]}; TensorRT for RTX builds "
            f"graphs with an open size from {SMALLEST_SIZE}x{SMALLEST_SIZE} on. Export with dynamic_size=false, or "
            "build for larger images."
        )
    return shapes
