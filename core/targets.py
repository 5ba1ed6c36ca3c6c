"""The targets: what an ONNX graph is written for. One entry for each, read by configs, deploy and pipeline.

To add a target, add an entry here, and in `deploy/targets/` the module with its passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from core.choices import GRIDS, INTEGER
from core.errors import DeployError
from core.registry import Registry

OUTPUTS = ("decoded", "raw", "end2end", "onnx_nms", "efficient_nms")
NMS_OUTPUTS = ("onnx_nms", "efficient_nms")  # with NMS in the graph
SCALE_TYPES = ("fp16", "fp32")
LOWEST_OPSET, HIGHEST_OPSET = 13, 23
FP8_OPSET = 19  # the first with E4M3 codes


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        name: what `deploy.target` calls it.
        opset: operator set version of its files.
        lowest_opset: oldest version that its graph can be written in.
        scale_opsets: for targets that choose the type of scale tensors, the oldest version for each type.
        passes: `module:function` of the passes that only this target needs, run after the common ones; the function
            takes the model and a `deploy.targets.request.PassRequest` and yields passes. None for no passes.
        signed_only: activations have signed codes, zero point 0.
        widths: bits of the integer grids that its engines run.
        grids: kinds of grids that its engines run.
        outputs: forms of the outputs that its graph can have, of `OUTPUTS`.
        wants_images: its passes measure ranges on images, and add quantizers that the torch model does not have.
        result_quantizers: its engine runs a convolution in integers only where the result is quantized as well.
        half: the float part is FP16, which ONNX Runtime's reference kernels do not run.
        float_target: target that float models are exported for instead; None for itself.
    """

    name: str
    opset: int
    lowest_opset: int = LOWEST_OPSET
    scale_opsets: Mapping[str, int] = field(default_factory=dict)
    passes: str | None = None
    signed_only: bool = False
    widths: tuple[int, ...] = (8,)
    grids: tuple[str, ...] = (INTEGER,)
    outputs: tuple[str, ...] = ("decoded", "raw", "end2end", "onnx_nms")
    wants_images: bool = False
    result_quantizers: bool = False
    half: bool = False
    float_target: str | None = None

    @property
    def is_exact(self) -> bool:
        """Whether the graph quantizes what torch quantizes, with the same scales, and nothing else."""
        return not (self.half or self.wants_images)

    def opset_for(self, scale_type: str = "fp16", wanted: int | None = None) -> int:
        """Operator set version of this target's files: its own, or the `wanted` one.

        Raises:
            DeployError: the target's graph cannot be written in the wanted one.
        """
        own = self.scale_opsets.get(scale_type, self.opset)
        lowest = max(self.lowest_opset, self.scale_opsets.get(scale_type, 0))
        if wanted is None or lowest <= wanted <= HIGHEST_OPSET:
            return own if wanted is None else wanted
        scales = f" with {scale_type} scales" if self.scale_opsets else ""
        raise DeployError(
            f"opset={wanted}: target {self.name}{scales} is written in opset {lowest} to {HIGHEST_OPSET}; leave it "
            f"out for {own}."
        )


TARGETS: Registry[Target] = Registry(
    "target",
    (
        Target("openvino", opset=17, passes="deploy.targets.unsigned:passes"),
        Target(
            "onnxruntime",
            opset=17,
            passes="deploy.targets.integer:passes",
            wants_images=True,
            result_quantizers=True,
        ),
        # TensorRT 8.6 reads opset 17 at most
        Target("trt10", opset=17, passes="deploy.targets.resize:passes", signed_only=True, outputs=OUTPUTS),
        # FP16 scales came with opset 19, a DQ that names its output type with 23. The builder writes the FP16 graph of
        # a float model where FP16 is wanted, so float models are exported in FP32.
        Target(
            "trt11",
            opset=19,
            scale_opsets={"fp16": 19, "fp32": 23},
            passes="deploy.targets.typed:passes",
            signed_only=True,
            grids=GRIDS,
            outputs=OUTPUTS,
            half=True,
            float_target="trt10",
        ),
        # networks are always strongly typed there, as in TensorRT 11; neither kind of NMS builds without a GPU
        Target(
            "tensorrt_rtx",
            opset=19,
            scale_opsets={"fp16": 19, "fp32": 23},
            passes="deploy.targets.typed:passes",
            signed_only=True,
            grids=GRIDS,
            outputs=("decoded", "raw", "end2end"),
            half=True,
            float_target="trt10",
        ),
    ),
    error=DeployError,
)
