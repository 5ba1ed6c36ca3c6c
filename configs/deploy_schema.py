"""Settings of the deploy section (ONNX export, engines, timing), and those of export.py; a part of `configs.schema`."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from configs.setting import setting
from core.choices import CAPABILITIES, DEFAULT_CAPABILITIES
from core.runtimes import PRECISION_NAMES, RUNTIMES
from core.targets import HIGHEST_OPSET, LOWEST_OPSET, OUTPUTS, SCALE_TYPES, TARGETS

HINTS = ("f32", "bf16", "auto")


@dataclass
class NMSConfig:
    """Suppression that is written into the graph, for outputs=onnx_nms and efficient_nms."""

    confidence: float = setting(0.25, "Lowest class score kept", unit="0..1", minimum=0, maximum=1)
    iou: float = setting(0.7, "Class-wise NMS threshold", unit="IoU, 0..1", above=0, maximum=1)
    max_detections: int = setting(
        300, "Boxes kept per image (efficient_nms, end2end), or per class of an image (onnx_nms)", minimum=1
    )


@dataclass
class GraphConfig:
    """The ONNX graph: what `deploy` and export.py have in common."""

    target: str = setting("openvino", "Which engine the ONNX graph is written for", choices=TARGETS)
    batch: int = setting(
        1,
        "Batch of the timed engine; with dynamic_batch=false also the only batch of the graph",
        unit="images",
        minimum=1,
        maximum=4096,
    )
    dynamic_batch: bool = setting(
        True, "Leave the batch dimension open in the ONNX graph; false fixes it to batch"
    )
    dynamic_size: bool = setting(False, "Leave height and width open in the ONNX graph")
    outputs: str = setting(
        "decoded",
        "Outputs of the graph: decoded boxes, raw level maps, the best detections of a head that needs no NMS "
        "(end2end), or detections after NMS in the graph",
        choices=OUTPUTS,
    )
    nms: NMSConfig = field(default_factory=NMSConfig)
    scale_type: str = setting(
        "fp16", "For trt11 and tensorrt_rtx: type of the Q/DQ scales", choices=SCALE_TYPES
    )
    opset: int | None = setting(
        None,
        "ONNX operator set; none uses the target's default (docs/deployment.md)",
        minimum=LOWEST_OPSET,
        maximum=HIGHEST_OPSET,
    )
    range_images: int = setting(
        32,
        "For onnxruntime: training images that the ranges of convolution results are measured on; 0 assumes "
        "a normal distribution",
        unit="images",
        minimum=0,
    )

    @property
    def graph_batch(self) -> int:
        """Images in the batches on which the graph is run for measurements: one, or what it is fixed to."""
        return 1 if self.dynamic_batch else self.batch


@dataclass
class DeployConfig(GraphConfig):
    """ONNX export, engines and timing."""

    runtimes: list[str] = setting(["openvino"], "Engines to build, evaluate and time", choices=RUNTIMES)
    float_precisions: list[str] = setting(
        ["f32"],
        "Precisions of the float engines that INT8 is compared with, if the machine supports them",
        choices=PRECISION_NAMES,
    )
    compute_capabilities: list[str] = setting(
        list(DEFAULT_CAPABILITIES),
        "GPUs that plans of TensorRT for RTX are built for, by compute capability",
        choices=CAPABILITIES,
    )
    int8_hint: str = setting(
        "f32",
        "Precision of the float part of OpenVINO's INT8 engine; auto leaves it to OpenVINO",
        choices=HINTS,
    )
    threads: int = setting(
        0, "CPU threads of an engine; 0 uses all cores", unit="threads", minimum=0, maximum=4096
    )
    fixed_point_images: int = setting(
        2,
        "Validation images whose INT8 codes are compared between torch and the exported graph; 0 skips this",
        unit="images",
        minimum=0,
    )
    benchmark_seconds: float = setting(5.0, "Timed duration per engine", unit="seconds", above=0)


@dataclass
class ExportConfig(GraphConfig):
    """One run of export.py."""

    run: str = setting(MISSING, "Run directory of train_qat.py, e.g. runs/demo/latest")
    output: str | None = setting(None, "Path of the ONNX file; none writes into the run directory")
    build: bool = setting(False, "Also build the engine, if its runtime is installed")
    trust: bool = setting(
        False, "Run the Python code that a run directory or a --config-dir file names; for files of your own"
    )
    device: str = setting("cpu", "Device that exports; the file is the same")
