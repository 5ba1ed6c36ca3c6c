"""Stages that leave torch: ONNX export, engines, their parity with torch, their accuracy and speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from configs.errors import ConfigError
from data import to_input
from deploy import (
    DeployError,
    ExportReport,
    ONNXRuntime,
    OpenVINORuntime,
    Runtime,
    benchmark_alternately,
    build_engine,
    compare_outputs,
    export_onnx,
    inspect_graph,
)
from models import Detector
from pipeline.job import Job, Predict
from pipeline.progress import say
from quant import Placement, placement_of

Target = Literal["openvino", "onnxruntime", "trt10", "trt11"]
INT8_MODEL = "model.onnx"
FLOAT_ONNX = "float.onnx"
PARITY_IMAGES = 8


class Deployed(nn.Module):
    """What is shipped: images [B, 3, H, W] -> output0 [B, 4 + K, A], network and float decode in one."""

    def __init__(self, network: nn.Module, decode: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.decode = decode

    def forward(self, images: Tensor) -> Tensor:
        """Decoded boxes (cx, cy, w, h in input pixels) and class scores."""
        return cast(Tensor, self.decode(self.network(images)))


def export_stage(job: Job) -> None:
    """Write the INT8 ONNX for the target of every runtime, and the float ONNX; check the graphs, compare with torch.

    ONNX Runtime executes the files as the reference: their arithmetic is checked before any engine is built.
    """
    config = job.config.deploy
    reports = {
        target: export_quantized(job, target, job.run.path(model_name(job, target)))
        for target in dict.fromkeys([cast(Target, config.target), *map(target_of, needed_runtimes(job))])
    }
    detector = job.detector.cpu()
    export_onnx(
        Deployed(detector.network, detector.decode).eval(),
        job.run.path(FLOAT_ONNX),
        (job.config.data.image_size,) * 2,
        cast(Target, config.target),
        onnx_metadata(job, detector, "float"),
        dynamic_batch=config.dynamic_batch,
        quantized=False,
    )
    job.detector.to(job.device)
    parity = {}
    for name in [FLOAT_ONNX, *(model_name(job, target) for target in reports if target != "trt11")]:
        with ONNXRuntime(job.run.path(name), optimize=False) as reference:
            parity[name] = check_parity(job, reference)
    checks = {report.path.name: inspect_graph(report.path) for report in reports.values()}
    for name, check in checks.items():
        say(f"check {name}: {len(check.findings)} findings")
        for finding in check.findings:
            say(f"  {finding.name}: {finding.hazard} {finding.remedy}")
    job.run.write_json(
        "export.json",
        {
            "exports": [describe_export(report) for report in reports.values()],
            "parity": parity,
            "checks": {name: check.as_dict() for name, check in checks.items()},
        },
    )


def needed_runtimes(job: Job) -> list[str]:
    """Runtimes of the configuration that have an ONNX target of their own."""
    return [runtime for runtime in job.config.deploy.runtimes if runtime != "tensorrt"]


def target_of(runtime: str) -> Target:
    """Target whose graph a CPU runtime runs fast."""
    return cast(Target, runtime)


def model_name(job: Job, target: str) -> str:
    """File name of the INT8 ONNX for a target: the configured one is `model.onnx`."""
    return INT8_MODEL if target == job.config.deploy.target else f"model-{target}.onnx"


def export_quantized(job: Job, target: Target, path: Path, dynamic_batch: bool | None = None) -> ExportReport:
    """Export the run's best quantized model for a target."""
    network, row = job.best_quantized()
    check_widths(placement_of(network), target)
    network.cpu()
    report = export_onnx(
        Deployed(network, job.detector.decode.cpu()).eval(),
        path,
        (job.config.data.image_size,) * 2,
        target,
        onnx_metadata(job, job.detector, row),
        dynamic_batch=job.config.deploy.dynamic_batch if dynamic_batch is None else dynamic_batch,
        quantized=True,
    )
    job.detector.to(job.device)
    say(
        f"{path.name}: target {target}, opset {report.opset}, {report.num_quantize} Q, {report.num_dequantize} DQ, "
        f"{report.num_int8_weights} INT8 weights, {report.size_bytes / 1e6:.2f} MB"
    )
    return report


def check_widths(placement: Placement, target: str) -> None:
    """Refuse a plan whose widths no engine of the target runs.

    Raises:
        ConfigError: some tensor or weight is narrower than 8 bits.
    """
    widths = {group.name: group.bits for group in placement.groups}
    widths |= {site.layer: site.bits for site in placement.weights}
    narrow = {name: bits for name, bits in widths.items() if bits != 8}
    if narrow:
        name, bits = next(iter(narrow.items()))
        raise ConfigError(
            f"target {target} runs 8-bit grids only, and {len(narrow)} tensors are narrower ({name}: {bits} bits): "
            "below 8 bits is simulation; use stages=[float,calibrate,finetune,report] for it"
        )


def onnx_metadata(job: Job, detector: Detector, source: str) -> dict[str, str]:
    """What a deployer must know to use the file."""
    stride = {"stride": str(max(detector.strides))} if detector.strides else {}
    return {
        "names": json.dumps(dict(enumerate(detector.names))),
        **stride,
        "imgsz": json.dumps([job.config.data.image_size] * 2),
        "preprocessing": "letterbox (pad 114, centred, bilinear), RGB, divided by 255, NCHW float32",
        "output0": "[B, 4 + classes, anchors]: cx, cy, w, h in input pixels, then class scores",
        "architecture": detector.architecture,
        "source": source,
    }


def describe_export(report: ExportReport) -> dict[str, Any]:
    """The export report as plain data."""
    return {
        "path": report.path.name,
        "target": report.target,
        "opset": report.opset,
        "num_quantize": report.num_quantize,
        "num_dequantize": report.num_dequantize,
        "num_int8_weights": report.num_int8_weights,
        "size_bytes": report.size_bytes,
    }


def engine_stage(job: Job) -> None:
    """Build every engine, compare it with torch, evaluate it, then time them all alternately; one row each."""
    engines = open_engines(job)
    config, size = job.config.deploy, job.config.data.image_size
    try:
        parity = {engine_row(engine): check_parity(job, engine) for engine in engines}
        job.run.write_json("engines/parity.json", parity)
        metrics = [
            job.measure(engine_predictor(job, engine), engine_row(engine), config.batch) for engine in engines
        ]
        say(f"timing {len(engines)} engines in turns, {config.benchmark_seconds:g} s each")
        shape = (config.batch, 3, size, size)
        timings = benchmark_alternately(engines, shape, config.benchmark_seconds, warmup=10)
        for engine, found, timing in zip(engines, metrics, timings, strict=True):
            job.record_row(
                engine_row(engine),
                found,
                latency_ms_median=timing.median_ms,
                latency_ms_p99=timing.p99_ms,
                images_per_second=timing.images_per_second,
                size_bytes=engine.size_bytes,
                batch=timing.batch,
                timed_calls=timing.iterations,
                parity=parity[engine_row(engine)],
            )
            say(f"{engine_row(engine)}: median {timing.median_ms:.2f} ms, p99 {timing.p99_ms:.2f} ms")
    finally:
        for engine in engines:
            engine.close()


def open_engines(job: Job) -> list[Runtime]:
    """Build and load the INT8 engine and the float engines of every runtime in the configuration.

    Raises:
        DeployError: a runtime that this machine does not have.
    """
    config = job.config.deploy
    out, threads = job.run.path("engines"), config.threads or None
    engines: list[Runtime] = []
    for runtime in config.runtimes:
        if runtime == "tensorrt":
            raise DeployError(
                "deploy.runtimes=[tensorrt]: the stage `engine` builds CPU engines; TensorRT engines are built by "
                "scripts/val_trt.sh in NVIDIA's container"
            )
        int8 = job.run.need(model_name(job, target_of(runtime)), "export")
        plain = job.run.need(FLOAT_ONNX, "export")
        if runtime == "openvino":
            quantized, floating = build_engine(runtime, int8, out), build_engine(runtime, plain, out)
            engines.append(OpenVINORuntime(quantized, "f32", threads, config.batch))
            engines += [
                OpenVINORuntime(floating, precision, threads, config.batch)
                for precision in config.float_precisions
            ]
        else:
            engines.append(ONNXRuntime(build_engine(runtime, int8, out), threads))
            engines.append(ONNXRuntime(build_engine(runtime, plain, out), threads))
    return engines


def engine_row(engine: Runtime) -> str:
    """Row name of an engine."""
    return f"engine:{engine.name}:{engine.precision}"


def engine_predictor(job: Job, engine: Runtime) -> Predict:
    """Images to detections through an engine; the last, smaller batch is filled up to the engine's own."""
    batch = job.config.deploy.batch

    def predict(images: Tensor) -> list[Tensor]:
        array = images.cpu().numpy()
        missing = batch - len(array)
        if missing > 0:
            array = np.concatenate([array, np.zeros((missing, *array.shape[1:]), np.float32)])
        return job.detections(torch.from_numpy(engine.infer(array)[: len(images)]))

    return predict


def check_parity(job: Job, engine: Runtime) -> dict[str, object]:
    """Compare an engine with torch on real validation images before it is used.

    Rounding that falls the other way in one layer moves INT8 results by whole grid steps, so the limits for INT8
    are those of a broken graph, not of arithmetic (one was seen at 75 px and a mean score difference of 0.014, sound
    ones stay below 0.0005); the accuracy rows tell the rest.

    Raises:
        DeployError: they disagree; the message has the figures.
    """
    quantized = engine.precision == "int8"
    network: nn.Module = job.best_quantized()[0] if quantized else job.detector.network
    detector = job.detector
    images, outputs = [], []
    with torch.inference_mode():
        for batch in job.letterboxed(job.val_set, job.config.deploy.batch, PARITY_IMAGES):
            if len(batch.images) == job.config.deploy.batch:
                images.append(to_input(batch.images, job.device))
                outputs.append(detector.decode(network(images[-1])))
    if not images:
        raise DeployError(f"deploy.batch={job.config.deploy.batch} is larger than the validation split")
    report = compare_outputs(
        engine,
        torch.cat(outputs).cpu().numpy(),
        torch.cat(images).cpu().numpy(),
        batch=job.config.deploy.batch,
    )
    exact = engine.precision == "fp32"
    say(
        f"parity {engine_row(engine)} {engine.path.name}: boxes within {report.box_max_px_confident:.3f} px at "
        f"{report.confident_anchors} confident anchors, scores within {report.score_max:.4f} "
        f"(mean {report.score_mean:.6f})"
    )
    if exact:
        report.require(box_px=0.05, score=0.001)
    else:
        report.require(box_px=16.0, score=1.0, mean_score=0.005)
    return report.as_dict()
