"""The stage `engine`: builds every engine, compares it with torch, evaluates it, and times all of them in turns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from core.rows import engine_key
from data import Found, Predict
from deploy import (
    BuildOptions,
    ONNXRuntime,
    OpenVINORuntime,
    Runtime,
    TensorRTRuntime,
    benchmark_alternately,
    build_engine,
)
from deploy.runtimes.tensorrt_api import check_target
from pipeline.evaluation.parity import check_parity, engine_row, reader_of
from pipeline.job import Job
from pipeline.networks import QUANTIZED
from pipeline.run.progress import say
from pipeline.splits import VAL
from pipeline.stages.export import FLOAT_ONNX, model_name, target_of
from pipeline.stages.load import FLOAT_FILES, MEASURED_BY
from pipeline.stages.stage import Stage

RUNTIMES: dict[str, type[Runtime]] = {
    "openvino": OpenVINORuntime,
    "onnxruntime": ONNXRuntime,
    "tensorrt": TensorRTRuntime,
}
TENSORRT_PRECISIONS = {"f32": "fp32", "f16": "fp16"}


def check_runtimes(job: Job) -> None:
    """Find out before any long work whether this machine can build and run what the configuration names.

    Raises:
        DeployError: a runtime is missing, with the way to get it, or does not take the target.
    """
    for name in job.config.deploy.runtimes:
        RUNTIMES[name].require()
        if name == "tensorrt":
            check_target(job.config.deploy.target)


def engine_stage(job: Job) -> None:
    """Build every engine, compare it with torch, evaluate it, then time them all alternately; one row each."""
    config, size = job.config.deploy, job.config.data.image_size
    engines: list[Runtime] = []
    try:
        for name in config.runtimes:
            engines += open_engines(job, name)
        parity = {engine_row(engine): check_parity(job, engine) for engine in engines}
        job.run.write_json("engines/parity.json", parity)
        metrics = [
            job.evaluator.measure(engine_predictor(job, engine), engine_row(engine), config.batch)
            for engine in engines
        ]
        say(f"timing {len(engines)} engines in turns, {config.benchmark_seconds:g} s each")
        shape = (config.batch, 3, size, size)
        timings = benchmark_alternately(engines, shape, config.benchmark_seconds, warmup=10)
        for engine, found, timing in zip(engines, metrics, timings, strict=True):
            job.record(
                engine_key(engine.name, engine.precision),
                found,
                latency_ms_median=timing.median_ms,
                latency_ms_p99=timing.p99_ms,
                images_per_second=timing.images_per_second,
                size_bytes=engine.size_bytes,
                batch=timing.batch,
                timed_calls=timing.iterations,
                parity=parity[engine_row(engine)],
                **engine_extras(job, engine),
            )
            say(f"{engine_row(engine)}: median {timing.median_ms:.2f} ms, p99 {timing.p99_ms:.2f} ms")
    finally:
        for engine in engines:
            engine.close()


def engine_extras(job: Job, engine: Runtime) -> dict[str, Any]:
    """What else a reader must know of an engine's row: its outputs and, where it has one, its precision hint."""
    extras: dict[str, Any] = {"outputs": job.config.deploy.outputs}
    if isinstance(engine, OpenVINORuntime):
        extras["precision_hint"] = engine.precision_hint
    return extras


def open_engines(job: Job, runtime: str) -> list[Runtime]:
    """Build and load the INT8 engine and the float engines of a runtime.

    Raises:
        DeployError: the runtime refuses.
        RunError: the stage `export` has not run.
    """
    int8 = job.run.need(model_name(job, target_of(job, runtime)), "export")
    plain = job.run.need(FLOAT_ONNX, "export")
    out, threads = job.run.path("engines"), job.config.deploy.threads or None
    match runtime:
        case "openvino":
            return open_openvino(job, build_engine(runtime, int8, out), build_engine(runtime, plain, out))
        case "tensorrt":
            return open_tensorrt(job, int8, plain, out)
    return [ONNXRuntime(build_engine(runtime, path, out), threads) for path in (int8, plain)]


def open_openvino(job: Job, int8: Path, plain: Path) -> list[Runtime]:
    """The INT8 engine with its hint, and one float engine for each precision."""
    config, size = job.config.deploy, job.config.data.image_size
    wanted = [(int8, config.int8_hint), *((plain, precision) for precision in config.float_precisions)]
    return [
        OpenVINORuntime(path, hint, config.threads or None, config.batch, (size, size))
        for path, hint in wanted
    ]


def open_tensorrt(job: Job, int8: Path, plain: Path, out: Path) -> list[Runtime]:
    """The INT8 engine and one float engine for each precision, built for this batch and size with one timing cache."""
    config, size = job.config.deploy, (job.config.data.image_size,) * 2
    precisions = [(int8, "int8"), *((plain, TENSORRT_PRECISIONS[p]) for p in config.float_precisions)]
    engines: list[Runtime] = []
    for path, precision in precisions:
        options = BuildOptions(
            precision=precision,
            best_batch=config.batch,
            max_batch=config.batch,
            min_size=size,
            best_size=size,
            max_size=size,
            timing_cache=out / "timing.cache",
        )
        say(f"building the TensorRT {precision} engine")
        built = build_engine("tensorrt", path, out / f"tensorrt-{precision}", options)
        engines.append(TensorRTRuntime(built))
    return engines


def engine_predictor(job: Job, engine: Runtime) -> Predict:
    """Images to detections through an engine; the last, smaller batch is filled up to the engine's own."""
    batch, reader = job.config.deploy.batch, reader_of(job)

    def predict(images: Tensor) -> Sequence[Found]:
        array = images.cpu().numpy()
        missing = batch - len(array)
        if missing > 0:
            array = np.concatenate([array, np.zeros((missing, *array.shape[1:]), np.float32)])
        return reader.detections(engine.infer_outputs(array), len(images))

    return predict


ENGINE = Stage(
    "engine",
    engine_stage,
    settings=("deploy", *MEASURED_BY),
    splits=(VAL,),
    reads=(*FLOAT_FILES, *QUANTIZED.values(), "model*.onnx", FLOAT_ONNX),
    writes=(
        "engines/*.json",
        "engines/*.xml",
        "engines/*.bin",
        "engines/*.onnx",
        "engines/*/*.engine",
        "rows/engine-*.json",
    ),
)
