"""Ways of putting load on an engine: one call after the other, several at once, or batches that change in size."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from core.errors import DeployError
from deploy.benchmark.timing import LatencyReport, benchmark, summarize
from deploy.runtimes.base import FloatArray, Runtime, Worker

SCENARIOS = ("sync", "async", "elastic")


def run_scenario(
    runtime: Runtime,
    scenario: str,
    shapes: Sequence[tuple[int, int, int, int]],
    seconds: float,
    warmup_seconds: float,
    streams: int,
    seed: int = 0,
) -> list[LatencyReport]:
    """Measure an engine; one report for each shape, for `elastic` one for each batch size out of the mixture.

    - sync: one request, the next starts when the last has ended.
    - async: `streams` requests at once; times are of single requests, throughput is of all.
    - elastic: one request at a time whose shape is drawn at random from `shapes`, as a server with a queue sees it.
    """
    match scenario:
        case "sync":
            return [_sync(runtime, shape, seconds, warmup_seconds, seed) for shape in shapes]
        case "async":
            return [_async(runtime, shape, seconds, warmup_seconds, streams, seed) for shape in shapes]
        case "elastic":
            return _elastic(runtime, shapes, seconds, warmup_seconds, seed)
    raise DeployError(f"Unknown scenario '{scenario}'; expected one of {', '.join(SCENARIOS)}.")


def _images(shape: tuple[int, int, int, int], seed: int) -> FloatArray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def _warm(worker: Worker, images: FloatArray, seconds: float) -> None:
    end = time.perf_counter() + seconds
    worker(images)
    while time.perf_counter() < end:
        worker(images)


def _sync(
    runtime: Runtime, shape: tuple[int, int, int, int], seconds: float, warmup_seconds: float, seed: int
) -> LatencyReport:
    _warm(runtime.infer_outputs, _images(shape, seed), warmup_seconds)
    return benchmark(runtime, shape, seconds, warmup=0, seed=seed)


def _async(
    runtime: Runtime,
    shape: tuple[int, int, int, int],
    seconds: float,
    warmup_seconds: float,
    streams: int,
    seed: int,
) -> LatencyReport:
    images = _images(shape, seed)
    ready = threading.Barrier(streams + 1)

    def work(worker: Worker) -> list[float]:
        _warm(worker, images, warmup_seconds)
        ready.wait()
        times: list[float] = []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            worker(images)
            times.append(time.perf_counter() - start)
        return times

    with ThreadPoolExecutor(streams) as pool:
        futures = [pool.submit(work, runtime.worker()) for _ in range(streams)]
        ready.wait()
        start = time.perf_counter()
        times = [value for future in futures for value in future.result()]
        elapsed = time.perf_counter() - start
    report = summarize(runtime.name, runtime.precision, shape[0], times)
    return replace(report, images_per_second=len(times) * shape[0] / elapsed)


def _elastic(
    runtime: Runtime,
    shapes: Sequence[tuple[int, int, int, int]],
    seconds: float,
    warmup_seconds: float,
    seed: int,
) -> list[LatencyReport]:
    generator = np.random.default_rng(seed)
    batches = {shape: _images(shape, seed) for shape in shapes}
    for images in batches.values():
        _warm(runtime.infer_outputs, images, warmup_seconds / len(batches))
    times: dict[tuple[int, int, int, int], list[float]] = {shape: [] for shape in shapes}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not all(times.values()):
        shape = shapes[int(generator.integers(len(shapes)))]
        start = time.perf_counter()
        runtime.infer_outputs(batches[shape])
        times[shape].append(time.perf_counter() - start)
    return [summarize(runtime.name, runtime.precision, shape[0], values) for shape, values in times.items()]
