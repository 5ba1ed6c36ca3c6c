"""The runtimes: what builds and runs engines. One entry for each, read by configs, deploy, report and pipeline.

To add a runtime, add an entry here, and in `deploy/runtimes/` the module with its class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from core.errors import DeployError
from core.registry import Registry

PRECISION_NAMES = {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}
"""What settings call a float precision -> what rows and engines call it."""


@dataclass(frozen=True)
class RuntimeEntry:
    """One runtime.

    Attributes:
        name: what `deploy.runtimes` calls it.
        title: what messages call it.
        factory: `module:class` of its `deploy.runtimes.base.Runtime`.
        library: the Python package that it uses, which only its own modules import.
        targets: targets whose graphs it runs in INT8, the preferred one first.
        suffixes: endings of the files that it opens; the first is that of the engines it builds.
        companions: endings of the files next to an engine that belong to it.
        float_precisions: precisions its float engines can have; with a single one there is one float engine,
            whatever `deploy.float_precisions` names.
        outputs: forms of the outputs that it takes, of `core.targets.OUTPUTS`.
        fixes_precision: an engine is built for one precision; otherwise the precision is chosen when it is loaded.
        automatic_precision: float precision that the runtime takes by itself where the processor has it, which
            INT8 is to be compared with as well; None for none.
        built_by: what builds its engines where `export.py build=true` cannot; None where it can.
    """

    name: str
    title: str
    factory: str
    library: str
    targets: tuple[str, ...]
    suffixes: tuple[str, ...]
    companions: tuple[str, ...] = ()
    float_precisions: tuple[str, ...] = ("f32",)
    outputs: tuple[str, ...] = ("decoded", "raw", "end2end", "onnx_nms")
    fixes_precision: bool = False
    automatic_precision: str | None = None
    built_by: str | None = None

    @property
    def reads_onnx(self) -> bool:
        """Whether it opens ONNX files without a build."""
        return ".onnx" in self.suffixes

    def target_for(self, configured: str) -> str:
        """Target whose graph it runs: the configured one where it takes it, else its preferred one."""
        return configured if configured in self.targets else self.targets[0]

    def float_engines(self, wanted: Sequence[str]) -> tuple[str, ...]:
        """Precisions of the float engines to build if the settings ask for these."""
        return tuple(wanted) if len(self.float_precisions) > 1 else self.float_precisions

    def engine_name(self, graph: str, precision: str) -> str:
        """Name of the engine of an ONNX file below a folder of engines.

        Example: TensorRT's for ("model.onnx", "f16") is "tensorrt-fp16/model.engine".
        """
        folder = f"{self.name}-{PRECISION_NAMES.get(precision, precision)}/" if self.fixes_precision else ""
        return f"{folder}{PurePath(graph).stem}{self.suffixes[0]}"

    @property
    def engine_patterns(self) -> tuple[str, ...]:
        """Patterns of everything that builds leave below a folder of engines."""
        folder = f"{self.name}-*/" if self.fixes_precision else ""
        return tuple(f"{folder}*{ending}" for ending in (self.suffixes[0], *self.companions))


RUNTIMES: Registry[RuntimeEntry] = Registry(
    "runtime",
    (
        RuntimeEntry(
            "openvino",
            title="OpenVINO",
            factory="deploy.runtimes.openvino:OpenVINORuntime",
            library="openvino",
            targets=("openvino",),
            suffixes=(".xml", ".onnx"),
            companions=(".bin",),
            float_precisions=("f32", "f16", "bf16"),
            automatic_precision="bf16",
        ),
        RuntimeEntry(
            "onnxruntime",
            title="ONNX Runtime",
            factory="deploy.runtimes.onnxruntime:ONNXRuntime",
            library="onnxruntime",
            targets=("onnxruntime",),
            suffixes=(".onnx",),
        ),
        RuntimeEntry(
            "tensorrt",
            title="TensorRT",
            factory="deploy.runtimes.tensorrt:TensorRTRuntime",
            library="tensorrt",
            targets=("trt10", "trt11"),
            suffixes=(".engine",),
            companions=(".engine.json",),
            float_precisions=("f32", "f16"),
            outputs=("decoded", "raw", "end2end", "efficient_nms"),
            fixes_precision=True,
            built_by="scripts/val_trt.sh in NVIDIA's container",
        ),
        RuntimeEntry(
            "tensorrt_rtx",
            title="TensorRT for RTX",
            factory="deploy.runtimes.tensorrt_rtx:TensorRTRTXRuntime",
            library="tensorrt_rtx",
            targets=("tensorrt_rtx", "trt11"),
            suffixes=(".plan",),
            companions=(".plan.json",),
            float_precisions=("f32", "f16"),
            outputs=("decoded", "raw", "end2end"),
            fixes_precision=True,
        ),
    ),
    error=DeployError,
)


def runtime_for(target: str) -> RuntimeEntry:
    """The runtime that runs a target's graphs.

    Raises:
        DeployError: no runtime does.
    """
    found = next((entry for entry in RUNTIMES.values() if target in entry.targets), None)
    if found is None:
        raise DeployError(
            f"No runtime runs graphs of target '{target}'; name it in an entry of core/runtimes.py."
        )
    return found
