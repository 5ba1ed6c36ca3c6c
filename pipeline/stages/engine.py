"""The stage `engine`: builds every engine, compares it with torch, evaluates it, and times all of them alternately.

Engines that this machine can build but not run get rows without accuracy and latency. A stage that was stopped does not
build again what it has built: `engines/built.json` has the hashes until the stage is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from configs.schema import Config
from core.choices import INT8
from core.errors import StateError
from core.machine import describe_machine, describe_versions
from core.rows import ResultRow, engine_key
from core.runtimes import PRECISION_NAMES, RUNTIMES
from data import Predict
from deploy import EngineRequest, Runtime, benchmark_alternately, build_engine, open_engine
from deploy.graph.model import load_onnx
from deploy.graph.quantizers import quantized_precision
from deploy.runtimes.engines import runtime_class
from pipeline.job import Job
from pipeline.networks import QUANTIZED
from pipeline.run.files import ENGINES, FLOAT_ONNX, model_name, target_of
from pipeline.run.ledger import hash_files
from pipeline.run.progress import say
from pipeline.splits import VAL
from pipeline.stages.load import FLOAT_FILES, MEASURED_BY
from pipeline.stages.parity import check_parity, engine_row, reader_of
from pipeline.stages.stage import Stage

BUILT = f"{ENGINES}/built.json"
ENGINE_FILES = tuple(
    f"{ENGINES}/{pattern}" for entry in RUNTIMES.values() for pattern in entry.engine_patterns
)


def check_runtimes(job: Job) -> None:
    """Find out before any long work whether this machine can build and run what the configuration names.

    Raises:
        DeployError: a runtime is missing, with the way to get it, or does not take the target.
    """
    for name in job.config.deploy.runtimes:
        runtime_class(name).require(target_of(job.config, name))


def engine_stage(job: Job) -> None:
    """Build every engine, compare it with torch, evaluate it, then time them all alternately; one row each."""
    engines: list[Runtime] = []
    try:
        for name in job.config.deploy.runtimes:
            if runtime_class(name).can_run():
                engines += open_engines(job, name)
            else:
                record_builds(job, name)
        if engines:
            measure_engines(job, engines)
    finally:
        for engine in engines:
            engine.close()


def measure_engines(job: Job, engines: list[Runtime]) -> None:
    """Compare engines with torch, evaluate them, then time them all alternately; one row each."""
    config = job.config.deploy
    parity = {engine_row(engine): check_parity(job, engine) for engine in engines}
    job.run.write_json("engines/parity.json", parity)
    keys = [engine_key(engine.name, engine.precision) for engine in engines]
    measured = [
        job.measure(key, engine_predictor(job, engine), config.batch)
        for key, engine in zip(keys, engines, strict=True)
    ]
    say(f"timing {len(engines)} engines alternately, {config.benchmark_seconds:g} s each")
    shape = (config.batch, 3, *job.config.data.input_size)
    timings = benchmark_alternately(engines, shape, config.benchmark_seconds, warmup=10)
    for key, engine, found, timing in zip(keys, engines, measured, timings, strict=True):
        job.record(
            key,
            found,
            latency_ms_median=timing.median_ms,
            latency_ms_p99=timing.p99_ms,
            images_per_second=timing.images_per_second,
            size_bytes=engine.size_bytes,
            batch=timing.batch,
            timed_calls=timing.iterations,
            parity=parity[engine_row(engine)],
            outputs=config.outputs,
            **engine.details,
        )
        say(f"{engine_row(engine)}: median {timing.median_ms:.2f} ms, p99 {timing.p99_ms:.2f} ms")


def record_builds(job: Job, runtime: str) -> None:
    """Build engines that this machine cannot run; one row each, without accuracy and latency."""
    for path, request in build_engines(job, runtime):
        precision = request.precision or ""
        figures = {"size_bytes": path.stat().st_size, "outputs": job.config.deploy.outputs}
        details = runtime_class(runtime).stored_details(path)
        key = engine_key(runtime, PRECISION_NAMES.get(precision, precision))
        row = ResultRow.of(key, {**figures, **details})
        job.run.write_row(row)
        say(f"{key.name}: {row.not_run or 'not run here'}")
        for name, build in details.get("compiled", {}).items():
            counts = ", ".join(f"{count} {kind}" for kind, count in build["convolutions"].items())
            say(
                f"  {name}: convolutions {counts}; {build['kernels']} kernels move {build['moved_megabytes']:.1f} MB "
                f"(FP16: {build['fp16_moved_megabytes']:.1f} MB); {build['findings']} findings"
            )


def open_engines(job: Job, runtime: str) -> list[Runtime]:
    """Build and load the quantized engine and the float engines of a runtime; see `build_engines`."""
    return [open_engine(runtime, path, request) for path, request in build_engines(job, runtime)]


def build_engines(job: Job, runtime: str) -> Iterator[tuple[Path, EngineRequest]]:
    """Build the quantized engine and the float engines of a runtime, one after the other.

    Raises:
        DeployError: the runtime refuses.
        RunError: the stage `export` has not run.
    """
    config = job.config.deploy
    entry = RUNTIMES[runtime]
    quantized = job.run.need(model_name(job.config, target_of(job.config, runtime)), "export")
    plain = job.run.need(FLOAT_ONNX, "export")
    floats = [(plain, precision) for precision in entry.float_engines(config.float_precisions)]
    for graph, precision in [(quantized, quantized_precision(load_onnx(quantized)) or INT8), *floats]:
        request = EngineRequest(
            precision=precision,
            int8_hint=config.int8_hint,
            batch=config.batch,
            image_size=job.config.data.input_size,
            threads=config.threads or None,
            compute_capabilities=tuple(config.compute_capabilities),
            cache=job.run.path(ENGINES),
        )
        say(f"building the {entry.title} engine of {graph.name}, {precision}")
        path = job.run.path(ENGINES) / entry.engine_name(graph.name, precision)
        yield _built(job, runtime, graph, path, request), request


def _built(job: Job, runtime: str, graph: Path, path: Path, request: EngineRequest) -> Path:
    """Build an engine, unless this stage has built it on this machine before it was stopped."""
    run, name = job.run, path.relative_to(job.run.directory).as_posix()
    try:
        earlier = run.read_json(BUILT) if run.path(BUILT).exists() else {}
    except StateError:  # of a stop in the middle; then it is built again
        earlier = {}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    machine = {**describe_machine(), **describe_versions(), "gpu": gpu}
    record = earlier.get(name, {"machine": None, "files": {}})
    if record["machine"] == machine and hash_files(run.directory, record["files"]) == record["files"]:
        say(f"{name}: built before")
        return path
    path = build_engine(runtime, graph, path.parent, request)
    endings = (path.suffix, *RUNTIMES[runtime].companions)
    files = [f"{name.removesuffix(path.suffix)}{ending}" for ending in endings]
    entry = {"machine": machine, "files": hash_files(run.directory, files)}
    run.write_json(BUILT, {**earlier, name: entry})
    return path


def engine_predictor(job: Job, engine: Runtime) -> Predict:
    """Images to detections through an engine that takes the configured batch."""
    return reader_of(job).predictor(engine, job.config.deploy.batch)


def runs_here(config: Config) -> dict[str, str]:
    """Which engines can run on this machine: one that could only be built is built and timed again where it can."""
    runtimes = config.deploy.runtimes
    return {f"this machine for {name}": str(runtime_class(name).can_run()) for name in runtimes}


ENGINE = Stage(
    "engine",
    engine_stage,
    needs=("export",),
    machine=runs_here,
    settings=("deploy", *MEASURED_BY),
    splits=(VAL,),
    reads=(*FLOAT_FILES, *QUANTIZED.values(), "model*.onnx", FLOAT_ONNX),
    writes=(
        f"{ENGINES}/parity.json",
        *ENGINE_FILES,
        "rows/engine-*.json",
    ),
    partial=(BUILT, *ENGINE_FILES),
)
