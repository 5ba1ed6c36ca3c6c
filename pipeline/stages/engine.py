"""The stage `engine`: builds every engine, compares it with torch, evaluates it, and times all of them in turns."""

from __future__ import annotations

from core.rows import engine_key
from core.runtimes import INT8, RUNTIMES
from data import Predict
from deploy import EngineRequest, Runtime, benchmark_alternately, build_engine, open_engine
from deploy.runtimes.engines import runtime_class
from pipeline.job import Job
from pipeline.networks import QUANTIZED
from pipeline.run.files import FLOAT_ONNX
from pipeline.run.progress import say
from pipeline.splits import VAL
from pipeline.stages.export import model_name, target_of
from pipeline.stages.load import FLOAT_FILES, MEASURED_BY
from pipeline.stages.parity import check_parity, engine_row, reader_of
from pipeline.stages.stage import Stage

ENGINES = "engines"  # folder of the run


def check_runtimes(job: Job) -> None:
    """Find out before any long work whether this machine can build and run what the configuration names.

    Raises:
        DeployError: a runtime is missing, with the way to get it, or does not take the target.
    """
    for name in job.config.deploy.runtimes:
        runtime_class(name).require(target_of(job, name))


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
                outputs=config.outputs,
                **engine.details,
            )
            say(f"{engine_row(engine)}: median {timing.median_ms:.2f} ms, p99 {timing.p99_ms:.2f} ms")
    finally:
        for engine in engines:
            engine.close()


def open_engines(job: Job, runtime: str) -> list[Runtime]:
    """Build and load the INT8 engine and the float engines of a runtime.

    Raises:
        DeployError: the runtime refuses.
        RunError: the stage `export` has not run.
    """
    config, size = job.config.deploy, job.config.data.image_size
    entry = RUNTIMES[runtime]
    int8 = job.run.need(model_name(job, target_of(job, runtime)), "export")
    plain = job.run.need(FLOAT_ONNX, "export")
    floats = [(plain, precision) for precision in entry.float_engines(config.float_precisions)]
    engines: list[Runtime] = []
    for graph, precision in [(int8, INT8), *floats]:
        request = EngineRequest(
            precision=precision,
            int8_hint=config.int8_hint,
            batch=config.batch,
            image_size=(size, size),
            threads=config.threads or None,
            cache=job.run.path(ENGINES),
        )
        say(f"building the {entry.title} engine of {graph.name}, {precision}")
        path = job.run.path(ENGINES) / entry.engine_name(graph.name, precision)
        engines.append(open_engine(runtime, build_engine(runtime, graph, path.parent, request), request))
    return engines


def engine_predictor(job: Job, engine: Runtime) -> Predict:
    """Images to detections through an engine that takes the configured batch."""
    return reader_of(job).predictor(engine, job.config.deploy.batch)


ENGINE = Stage(
    "engine",
    engine_stage,
    settings=("deploy", *MEASURED_BY),
    splits=(VAL,),
    reads=(*FLOAT_FILES, *QUANTIZED.values(), "model*.onnx", FLOAT_ONNX),
    writes=(
        f"{ENGINES}/*.json",
        *(f"{ENGINES}/{pattern}" for entry in RUNTIMES.values() for pattern in entry.engine_patterns),
        "rows/engine-*.json",
    ),
)
