"""The stage `export`: ONNX files for every target of the run, checked and compared with torch."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from configs.deploy_schema import NMSConfig
from core.choices import ONE2ONE
from core.errors import ConfigError, DataError
from core.targets import FP8_OPSET, NMS_OUTPUTS, TARGETS
from data import to_input
from deploy import (
    ExportReport,
    NMSOptions,
    ONNXRuntime,
    export_onnx,
    inspect_graph,
)
from deploy.runtimes.base import FloatArray
from models import Detector
from pipeline.job import Job
from pipeline.networks import QUANTIZED, head_of
from pipeline.run.files import EXPORT_REPORT, FLOAT_ONNX, model_name, target_of
from pipeline.run.progress import say
from pipeline.splits import TRAIN, VAL
from pipeline.stages.fixed_point import FIXED_POINT, compare_fixed_point
from pipeline.stages.load import FLOAT_FILES
from pipeline.stages.parity import check_parity, describe
from pipeline.stages.stage import Stage
from quant import Placement, placement_of, with_named_nodes

MASK_TEXTS = {
    "task": "segment",
    "output0": "[B, 4 + classes + prototypes, anchors]: cx, cy, w, h in input pixels, class scores, mask coefficients",
    "output1": "[B, prototypes, H / 4, W / 4]: a box's mask is sigmoid(coefficients @ prototypes), cut to the box",
}
OUTPUT_TEXTS = {
    "decoded": {"output0": "[B, 4 + classes, anchors]: cx, cy, w, h in input pixels, then class scores"},
    "raw": {
        "box_S": "[B, 4 * bins, h, w] of stride S: logits of distances in cells; with one bin the distances",
        "class_S": "[B, classes, h, w]: logits",
    },
    "end2end": {
        "output0": "[B, N, 6]: x1, y1, x2, y2 in input pixels, score, class: the best (anchor, class) pairs, by score"
    },
    "onnx_nms": {"detections": "[N, 7]: image, x1, y1, x2, y2 in input pixels, score, class"},
    "efficient_nms": {
        "num_dets": "[B, 1]",
        "det_boxes": "[B, M, 4]: x1, y1, x2, y2 in input pixels",
        "det_scores": "[B, M]",
        "det_classes": "[B, M]",
    },
}


class Deployed(nn.Module):
    """What is shipped: images [B, 3, H, W] -> output0 [B, 4 + K, A], network and float decode in one.

    A segmentation network has P coefficients below the scores, and output1: prototypes [B, P, H / 4, W / 4].
    """

    def __init__(self, network: nn.Module, decode: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.decode = decode

    def forward(self, images: Tensor) -> Any:
        """Decoded boxes (cx, cy, w, h in input pixels) and class scores; with masks a tuple of both outputs."""
        return self.decode(self.network(images))


def export_stage(job: Job) -> None:
    """Write the INT8 ONNX for the target of every runtime, and the float ONNX; check the graphs, compare with torch.

    ONNX Runtime executes the files as the reference: their arithmetic is checked before any engine is built.
    """
    reports = {
        target: export_quantized(job, target, job.run.path(model_name(job.config, target)))
        for target in targets(job)
    }
    export_float(job, job.run.path(FLOAT_ONNX))
    parity = {}
    # ONNX Runtime has neither FP16 kernels for the typed graph nor TensorRT's plugin
    readable = [] if job.config.deploy.outputs == "efficient_nms" else [FLOAT_ONNX]
    readable += [
        model_name(job.config, target) for target in reports if readable and not TARGETS[target].half
    ]
    for name in readable:
        with ONNXRuntime(job.run.path(name), optimize=False) as reference:
            parity[name] = check_parity(job, reference)
    checks = {report.path.name: inspect_graph(report.path) for report in reports.values()}
    for name, check in checks.items():
        say(f"check {name}: {len(check.findings)} findings")
        for finding in check.findings:
            say(f"  {finding.name}: {finding.hazard} {finding.remedy}")
    job.run.write_json(
        EXPORT_REPORT,
        {
            "exports": [describe_export(report) for report in reports.values()],
            "parity": parity,
            "checks": {name: check.as_dict() for name, check in checks.items()},
        },
    )
    if job.config.deploy.fixed_point_images:
        compare_with_torch(job)


def compare_with_torch(job: Job) -> None:
    """Compare the codes of a graph that quantizes just what torch does with torch's; export one if there is none."""
    target = next((name for name in targets(job) if TARGETS[name].is_exact), None)
    if target is not None:
        compare_fixed_point(job, job.run.path(model_name(job.config, target)))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare_fixed_point(job, export_exact(job, Path(folder) / "exact.onnx"))


def export_exact(job: Job, path: Path) -> Path:
    """Export the best quantized model with the float part in FP32, as ONNX Runtime executes it; returns the path."""
    network, row = job.networks.best()
    fp8 = has_fp8(network)
    # no engine of an exact target runs FP8, but ONNX Runtime executes its graph
    exact = next(name for name, entry in TARGETS.items() if entry.is_exact and (entry.signed_only or not fp8))
    write_onnx(job, network.cpu(), exact, row.name, path, opset=FP8_OPSET if fp8 else None)
    return path


def has_fp8(network: fx.GraphModule) -> bool:
    """Whether any group of a quantized model has FP8 codes."""
    return any(group.grid.is_fp8 for group in placement_of(network).groups)


def targets(job: Job) -> list[str]:
    """Targets that the run exports for: the configured one, and that of every runtime."""
    config = job.config.deploy
    return list(
        dict.fromkeys([config.target, *(target_of(job.config, runtime) for runtime in config.runtimes)])
    )


def check_export(job: Job) -> None:
    """Find settings of the export that cannot work before any long work.

    Raises:
        DeployError: an operator set that a target's graph cannot be written in.
        ConfigError: a placement with unsigned or FP8 codes for a target that does not take them, or outputs that the
            head does not go with, see `check_outputs`.
    """
    check_outputs(job.config.deploy.outputs, head_of(job.config, job.run))
    quant = job.config.quant
    kinds = {quant.grid: "quant.grid"} | {
        rule.grid: f"quant.policy, {rule.match}" for rule in quant.policy if rule.grid
    }
    for target in targets(job):
        for grid, setting in kinds.items():
            check_kind(target, grid, f"{setting}: grid={grid}")
        if job.config.quant.activations.unsigned:
            check_signs(target, "quant.activations.unsigned=true")
        TARGETS[target].opset_for(job.config.deploy.scale_type, job.config.deploy.opset)


def check_outputs(outputs: str, head: str) -> None:
    """Refuse detections without NMS for a head that gives an object several boxes, and NMS for one that gives one.

    Raises:
        ConfigError: the outputs are such.
    """
    if outputs == "end2end" and head != ONE2ONE:
        raise ConfigError(
            f"outputs=end2end with the head {head}: it predicts several boxes for an object and needs NMS; use "
            "outputs=onnx_nms or decoded, or model.head=one2one if the network has it"
        )
    if outputs in NMS_OUTPUTS and head == ONE2ONE:
        raise ConfigError(
            f"outputs={outputs} with the head {head}: it gives an object one box, so NMS costs time and can "
            "only remove objects that overlap; use outputs=end2end or decoded, or model.head=one2many where the "
            "network has it"
        )


def export_quantized(job: Job, target: str, path: Path) -> ExportReport:
    """Export the run's best quantized model for a target."""
    network, row = job.networks.best()
    check_widths(placement_of(network), target)
    network.cpu()
    images = range_images(job) if TARGETS[target].wants_images else []
    report = write_onnx(job, network, target, row.name, path, images)
    say(
        f"{path.name}: target {target}, opset {report.opset}, {report.num_quantize} Q, {report.num_dequantize} DQ, "
        f"{report.num_int8_weights} INT8 and {report.num_fp8_weights} FP8 weights, {report.size_bytes / 1e6:.2f} MB"
    )
    if report.parity is not None:
        say(f"{path.name} against the graph with float activations: {describe(report.parity)}")
    return report


def export_float(job: Job, path: Path) -> ExportReport:
    """Export the run's float model in FP32: what every float engine is built from."""
    target = job.config.deploy.target
    target = TARGETS[target].float_target or target
    return write_onnx(job, job.networks.detector.network.cpu(), target, "float", path)


def write_onnx(
    job: Job,
    network: nn.Module,
    target: str,
    source: str,
    path: Path,
    images: list[FloatArray] | None = None,
    opset: int | None = None,
) -> ExportReport:
    """Export one network of the run with the settings of `deploy`; `source` is its row."""
    config = job.config.deploy
    check_outputs(config.outputs, job.networks.detector.deployed_head)
    named, names = with_named_nodes(network)
    try:
        return export_onnx(
            Deployed(named, job.networks.detector.decode.cpu()).eval(),
            path,
            job.config.data.input_size,
            target,
            onnx_metadata(job, job.networks.detector, source),
            ("output0", "output1") if job.splits.task == "segment" else ("output0",),
            dynamic_batch=config.dynamic_batch,
            batch=config.batch,
            quantized=source != "float",
            dynamic_size=config.dynamic_size,
            images=images or [],
            scale_type=config.scale_type,
            outputs=config.outputs,
            nms=nms_options(config.nms),
            opset=opset or config.opset,
            names=names,
        )
    finally:
        job.networks.detector.to(job.device)


def nms_options(config: NMSConfig) -> NMSOptions:
    """The settings as `deploy` takes them."""
    return NMSOptions(config.confidence, config.iou, config.max_detections)


def range_images(job: Job) -> list[FloatArray]:
    """Letterboxed training images, one to a batch, on which the onnxruntime graph's own ranges are measured.

    Raises:
        DataError: the training split cannot be read.
    """
    number = job.config.deploy.range_images
    if not number:
        return []
    try:
        batch = job.config.deploy.graph_batch
        loader = job.splits.letterboxed(job.splits.train, batch, max(number, batch))
    except DataError as error:
        raise DataError(
            f"{error} The onnxruntime graph measures ranges on training images; range_images=0 assumes a "
            "normal distribution instead."
        ) from error
    batches = (loaded.images for loaded in loader if len(loaded.images) == batch)
    return [np.asarray(to_input(images, "cpu").numpy(), np.float32) for images in batches]


def check_signs(target: str, what: str) -> None:
    """Refuse unsigned codes where the target takes signed ones only.

    Raises:
        ConfigError: it does.
    """
    if TARGETS[target].signed_only:
        able = [name for name, entry in TARGETS.items() if not entry.signed_only]
        raise ConfigError(
            f"{what}, but target {target} takes signed codes only: make the run with "
            f"quant.activations.unsigned=false, or export for {' or '.join(able)}"
        )


def check_kind(target: str, grid: str, what: str) -> None:
    """Refuse FP8 codes where the target's engines do not run them.

    Raises:
        ConfigError: they do not.
    """
    if grid not in TARGETS[target].grids:
        able = [name for name, entry in TARGETS.items() if grid in entry.grids]
        raise ConfigError(
            f"{what}, but no engine of target {target} runs {grid} codes: export for {' or '.join(able)}, or make the "
            "run with quant=int8"
        )


def check_widths(placement: Placement, target: str) -> None:
    """Refuse a placement whose widths or signs no engine of the target runs.

    Raises:
        ConfigError: some tensor or weight is narrower than 8 bits, unsigned where the target takes signed codes, or FP8
            where it takes integers.
    """
    for group in placement.groups:
        check_kind(target, group.grid.kind, f"group {group.name} is {group.grid.name}")
    unsigned = [group.name for group in placement.groups if not group.grid.signed]
    if unsigned:
        check_signs(target, f"the placement has {len(unsigned)} unsigned groups ({unsigned[0]}, ...)")
    widths = {group.name: group.grid.bits for group in placement.groups}
    widths |= {site.layer: site.grid.bits for site in placement.weights}
    able = TARGETS[target].widths
    narrow = {name: bits for name, bits in widths.items() if bits not in able}
    if narrow:
        name, bits = next(iter(narrow.items()))
        raise ConfigError(
            f"target {target} runs {', '.join(map(str, able))}-bit grids only, and {len(narrow)} tensors are narrower "
            f"({name}: {bits} bits): below 8 bits is simulation; use stages=[float,calibrate,finetune,report] for it"
        )


def onnx_metadata(job: Job, detector: Detector, source: str) -> dict[str, str]:
    """What a deployer must know to use the file."""
    stride = {"stride": str(max(detector.strides))} if detector.strides else {}
    return {
        "names": json.dumps(dict(enumerate(detector.names))),
        **stride,
        "imgsz": json.dumps(list(job.config.data.input_size)),
        "preprocessing": "letterbox (pad 114, centred, bilinear), RGB, divided by 255, NCHW float32",
        **_output_texts(job),
        "octet.head": detector.deployed_head,
        "architecture": detector.architecture,
        "source": source,
    }


def _output_texts(job: Job) -> dict[str, str]:
    outputs = job.config.deploy.outputs
    if job.splits.task != "segment":
        return OUTPUT_TEXTS[outputs]
    if outputs != "end2end":
        return MASK_TEXTS
    return {**MASK_TEXTS, "output0": f"{OUTPUT_TEXTS[outputs]['output0']}; mask coefficients after them"}


def describe_export(report: ExportReport) -> dict[str, Any]:
    """The export report as plain data."""
    return {
        "path": report.path.name,
        "target": report.target,
        "opset": report.opset,
        "num_quantize": report.num_quantize,
        "num_dequantize": report.num_dequantize,
        "num_int8_weights": report.num_int8_weights,
        "num_fp8_weights": report.num_fp8_weights,
        "size_bytes": report.size_bytes,
    }


EXPORT = Stage(
    "export",
    export_stage,
    needs=("calibrate",),
    settings=("deploy", "data.image_size", "evaluate"),
    ignored=(
        "deploy.float_precisions", "deploy.int8_hint", "deploy.threads", "deploy.benchmark_seconds",
        "deploy.compute_capabilities",
    ),
    splits=(TRAIN, VAL),
    reads=(*FLOAT_FILES, *QUANTIZED.values()),
    writes=("model*.onnx", FLOAT_ONNX, EXPORT_REPORT, FIXED_POINT),
)  # fmt: skip
