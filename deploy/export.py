"""torch module -> ONNX file for one target: the only file that calls torch's exporter.

The TorchScript exporter (`dynamo=False`) is used on purpose. It writes `fake_quantize_*` as Q/DQ at any opset
from 13 on, needs no extra package, and traces per-channel fake quantization with scales computed from the
weights. torch.export, under the newer exporter, refuses such modules in torch 2.15 and silently raises a
requested opset below 18 (TensorRT 8.6 reads up to 17). It works from torch 2.10 to 2.15; where a later torch
drops it, `export_onnx` fails with torch's own message.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from onnx import ModelProto, TensorProto
from torch import nn

from core.errors import DeployError
from core.image_size import ImageSize
from core.registry import resolve
from core.targets import SCALE_TYPES, TARGETS, Target
from deploy.graph import passes
from deploy.graph.model import opset_of, save_onnx
from deploy.graph.passes import GraphPass, PassCount, PassRequest, TargetPasses, count_qdq, run_pass
from deploy.graph.shape_folding import fold_shapes
from deploy.naming import rename_scopes
from deploy.parity.outputs import CompareReport, compare_arrays
from deploy.runtimes.base import FloatArray
from deploy.runtimes.onnxruntime import record_histograms, run_model
from deploy.targets.outputs import NMSOptions, output_pass

COMMON_PASSES: tuple[GraphPass, ...] = (
    passes.drop_identities,
    passes.fold_constants,
    fold_shapes,
    passes.slices_to_split,
    passes.fold_weights(lowest=-127),
    passes.merge_identical,
    passes.name_quantizers,
)


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: the ONNX file.
        target: the engine it is for.
        opset: operator set version in the file.
        num_quantize, num_dequantize: Q and DQ nodes in the file.
        num_int8_weights: INT8 initializers that a DQ reads.
        num_fp8_weights: FP8 initializers that a DQ reads.
        size_bytes: size of the file.
        passes: Q/DQ counts before and after every pass, in order.
        parity: targets that measure ranges, with `images` only: the file against the graph before the target's passes.
    """

    path: Path
    target: str
    opset: int
    num_quantize: int
    num_dequantize: int
    num_int8_weights: int
    num_fp8_weights: int
    size_bytes: int
    passes: tuple[PassCount, ...]
    parity: CompareReport | None = None


def export_onnx(
    module: nn.Module,
    path: Path,
    image_size: tuple[int, int],
    target: str,
    metadata: Mapping[str, str] | None = None,
    output_names: Sequence[str] = ("output0",),
    dynamic_batch: bool = True,
    quantized: bool = True,
    dynamic_size: bool = False,
    images: Sequence[FloatArray] = (),
    scale_type: str = "fp16",
    outputs: str = "decoded",
    nms: NMSOptions | None = None,
    opset: int | None = None,
    names: Mapping[str, str] | None = None,
    batch: int = 1,
) -> ExportReport:
    """Write `module` as an ONNX file for `target`; `path` is touched only when everything went well.

    Args:
        module: float32 images [B, 3, H, W] in [0, 1] -> one tensor or a tuple of tensors, one for each output
            name. Quantized modules call `torch.fake_quantize_per_tensor_affine` / `_per_channel_affine` with
            the range (-128, 127), or functions whose ONNX symbolic is Q/DQ (FP8).
        path: file to write.
        image_size: (height, width) in pixels.
        target: what the graph is written for, a name in `core.targets.TARGETS`.
        metadata: strings to store in the file (class names, stride, preprocessing ...); `octet.target`,
            `octet.quantized`, `octet.outputs` and `octet.image_size` are added.
        output_names: names of the graph's outputs.
        dynamic_batch: leave the batch open; otherwise it is `batch`.
        quantized: whether Q/DQ nodes have to be there (True) or must not be (False).
        dynamic_size: leave height and width open as well; the shape arithmetic then stays in the graph.
        images: batches for targets that measure ranges, float32 [B, 3, H, W] in [0, 1]: conv results get the range
            they have there (a normal distribution is assumed without images), and the first batch measures the parity.
        scale_type: for trt11, type of the scale tensors, "fp16" or "fp32"; see `deploy.targets.typed`.
        outputs: "decoded" (default), "raw", "end2end", "onnx_nms" or "efficient_nms"; see `deploy.targets.outputs`.
        nms: thresholds for the last two; the number of detections for the last three.
        opset: operator set version; None takes the target's own.
        names: paths for what runs in submodules of `module`, see `deploy.naming.rename_scopes`.
        batch: images in a batch of a graph with a fixed batch; `images` then come in batches of this size.

    Raises:
        DeployError: unknown target, wrong opset in the result, Q/DQ missing or unexpected, or a pass that
            lost some.
    """
    entry = TARGETS[target]
    if scale_type not in SCALE_TYPES:
        raise DeployError(f"Unknown scale type '{scale_type}'; expected one of {', '.join(SCALE_TYPES)}.")
    opset = entry.opset_for(scale_type, opset)
    change_outputs = output_pass(outputs, nms or NMSOptions(), entry)
    fixed = None if dynamic_batch else batch
    if fixed is not None and any(len(array) != fixed for array in images):
        raise DeployError(f"The graph takes batches of {fixed}; the images for its ranges come in others.")
    model = _trace(module, image_size, opset, tuple(output_names), fixed, dynamic_size)
    rename_scopes(model, names or {})
    counts = [run_pass(model, graph_pass) for graph_pass in (*COMMON_PASSES, change_outputs)]
    measured = images if quantized and entry.wants_images else ()
    request = PassRequest(scale_type, measured, record_histograms, outputs == "decoded")
    target_counts, parity = _run_target_passes(model, entry, request)
    counts += target_counts
    _check_result(model, target, opset, quantized)
    facts = {
        "target": target,
        # tells a graph of ours from a float one that another tool quantized
        "quantized": str(quantized).lower(),
        "outputs": outputs,
        "image_size": ImageSize(*image_size).text,
        **({} if fixed is None else {"batch": str(fixed)}),
    }
    _add_metadata(model, {**{f"octet.{key}": value for key, value in facts.items()}, **(metadata or {})})
    save_onnx(model, path)
    num_quantize, num_dequantize = count_qdq(model)
    return ExportReport(
        path=path,
        target=target,
        opset=opset_of(model),
        num_quantize=num_quantize,
        num_dequantize=num_dequantize,
        num_int8_weights=count_weights(model, TensorProto.INT8, TensorProto.UINT8),
        num_fp8_weights=count_weights(model, TensorProto.FLOAT8E4M3FN),
        size_bytes=path.stat().st_size,
        passes=tuple(counts),
        parity=parity,
    )


def _run_target_passes(
    model: ModelProto, target: Target, request: PassRequest
) -> tuple[list[PassCount], CompareReport | None]:
    """Run the passes of a target; with images, compare the result with the graph before them."""
    if target.passes is None:
        return [], None
    target_passes: TargetPasses = resolve(target.passes)
    images = request.images[0] if request.images else None
    before = None if images is None else run_model(model, images)
    counts = [run_pass(model, graph_pass) for graph_pass in target_passes(model, request)]
    if (
        images is None
        or before is None
        or len(model.graph.output) != 1
        or not request.decoded
        or before.ndim != 3
    ):
        return counts, None
    return counts, compare_arrays(run_model(model, images), before, label=f"the {target.name} graph")


def _trace(
    module: nn.Module,
    image_size: tuple[int, int],
    opset: int,
    output_names: tuple[str, ...],
    batch: int | None,
    dynamic_size: bool,
) -> ModelProto:
    parameter = next(iter(module.parameters()), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    # an open batch is traced with two images: with one the tracer would take broadcast dimensions for constants
    images = torch.rand(batch or 2, 3, *image_size, device=device)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            # tracer remarks on Python values and the exporter's deprecation notice
            warnings.simplefilter("ignore")
            file = Path(folder) / "traced.onnx"
            torch.onnx.export(
                module,
                (images,),
                str(file),
                input_names=["images"],
                output_names=list(output_names),
                opset_version=opset,
                dynamic_axes=_dynamic_axes(output_names, batch is None, dynamic_size),
                dynamo=False,
            )
            model = onnx.load(str(file))
    finally:
        module.train(was_training)
    if len(model.graph.output) != len(output_names):
        raise DeployError(
            f"The module gives {len(model.graph.output)} outputs, {len(output_names)} names were given "
            f"{output_names}; name every output."
        )
    if opset_of(model) != opset:
        raise DeployError(
            f"torch wrote opset {opset_of(model)} where {opset} was asked for; use a torch that exports it."
        )
    return model


def _dynamic_axes(
    output_names: tuple[str, ...], dynamic_batch: bool, dynamic_size: bool
) -> dict[str, dict[int, str]]:
    axes: dict[str, dict[int, str]] = {}
    if dynamic_batch:
        axes = {name: {0: "batch"} for name in ("images", *output_names)}
    if dynamic_size:
        axes.setdefault("images", {}).update({2: "height", 3: "width"})
    return axes


def _check_result(model: ModelProto, target: str, opset: int, quantized: bool) -> None:
    num_quantize, num_dequantize = count_qdq(model)
    if quantized and not (num_quantize and num_dequantize):
        raise DeployError(
            f"The graph for {target} has {num_quantize} Q and {num_dequantize} DQ nodes: its fake "
            "quantizers are off or were traced away. Switch them to 'quantize' before the export, or export with "
            "quantized=False."
        )
    if not quantized and (num_quantize or num_dequantize):
        raise DeployError(
            f"A float export has {num_quantize} Q and {num_dequantize} DQ nodes; switch the fake quantizers off, or "
            "export with quantized=True."
        )
    if opset_of(model) != opset:
        raise DeployError(f"The graph for {target} has opset {opset_of(model)}; {opset} is wanted.")
    model.producer_name, model.producer_version = "octet", f"torch {torch.__version__}"
    onnx.checker.check_model(model, full_check=True)


def count_weights(model: ModelProto, *wanted: int) -> int:
    """Number of initializers of some types that a DQ reads as data."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    readers = (node for node in model.graph.node if node.op_type == "DequantizeLinear")
    return sum(types.get(node.input[0]) in wanted for node in readers)


def _add_metadata(model: ModelProto, metadata: Mapping[str, str]) -> None:
    del model.metadata_props[:]
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
