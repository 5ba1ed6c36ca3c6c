"""Latency of one engine, or of several alternately in one run, so that drift affects all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from core.errors import DeployError
from deploy.runtimes.base import FloatArray, Runtime


@dataclass(frozen=True)
class LatencyReport:
    """Time of one call in milliseconds, and what follows from it.

    Attributes:
        runtime, precision: which engine.
        batch: images in one call.
        iterations: timed calls.
        median_ms, mean_ms, std_ms, p90_ms, p95_ms, p99_ms: of one call.
        images_per_second: batch / mean time.
    """

    runtime: str
    precision: str
    batch: int
    iterations: int
    median_ms: float
    mean_ms: float
    std_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    images_per_second: float

    def as_dict(self) -> dict[str, object]:
        """Plain dict, ready for JSON."""
        return asdict(self)


def benchmark(
    runtime: Runtime,
    shape: tuple[int, int, int, int],
    seconds: float = 5.0,
    iterations: int | None = None,
    warmup: int = 5,
    seed: int = 0,
) -> LatencyReport:
    """Time one engine on random images of `shape` [B, 3, H, W].

    Args:
        runtime: the loaded engine.
        shape: shape of the batch.
        seconds: how long to time, at least 3 calls; ignored when `iterations` is given.
        iterations: number of timed calls.
        warmup: untimed calls before.
        seed: of the random images.
    """
    return benchmark_alternately([runtime], shape, seconds, iterations, warmup, seed)[0]


def benchmark_alternately(
    runtimes: Sequence[Runtime],
    shape: tuple[int, int, int, int],
    seconds: float = 5.0,
    iterations: int | None = None,
    warmup: int = 5,
    seed: int = 0,
    calls_per_turn: int = 5,
) -> list[LatencyReport]:
    """Time several engines alternately (A B A B ...) on the same images; one report each, in order.

    Each turn is one untimed call, which takes the cost of cold caches, and `calls_per_turn` timed ones.
    `seconds` and `iterations` count for each engine.
    """
    if not runtimes:
        raise DeployError("No engine to time; give at least one runtime.")
    if (iterations is not None and iterations < 1) or (iterations is None and seconds <= 0):
        raise DeployError(f"iterations={iterations}, seconds={seconds}: one of them has to be positive.")
    images: FloatArray = np.random.default_rng(seed).random(shape, dtype=np.float32)
    times: list[list[float]] = [[] for _ in runtimes]
    for runtime in runtimes:
        for _ in range(warmup):
            runtime.infer_outputs(images)
    alone = len(runtimes) == 1
    while any(not _enough(measured, seconds, iterations) for measured in times):
        for runtime, measured in zip(runtimes, times, strict=True):
            calls = calls_per_turn if iterations is None else min(calls_per_turn, iterations - len(measured))
            if not alone:
                runtime.infer_outputs(images)
            measured.extend(_timed_calls(runtime, images, calls))
    return [_report(runtime, shape[0], measured) for runtime, measured in zip(runtimes, times, strict=True)]


def _enough(measured: Sequence[float], seconds: float, iterations: int | None) -> bool:
    if iterations is not None:
        return len(measured) >= iterations
    return len(measured) >= 3 and sum(measured) >= seconds


def _timed_calls(runtime: Runtime, images: FloatArray, calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        runtime.infer_outputs(images)
        times.append(time.perf_counter() - start)
    return times


def _report(runtime: Runtime, batch: int, seconds: Sequence[float]) -> LatencyReport:
    return summarize(runtime.name, runtime.precision, batch, seconds)


def summarize(runtime: str, precision: str, batch: int, seconds: Sequence[float]) -> LatencyReport:
    """Statistics of measured call times given in seconds."""
    milliseconds = np.asarray(seconds, np.float64) * 1000
    p90, p95, p99 = (float(np.percentile(milliseconds, q)) for q in (90, 95, 99))
    return LatencyReport(
        runtime=runtime,
        precision=precision,
        batch=batch,
        iterations=len(milliseconds),
        median_ms=float(np.median(milliseconds)),
        mean_ms=float(milliseconds.mean()),
        std_ms=float(milliseconds.std()),
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        images_per_second=batch / float(milliseconds.mean()) * 1000,
    )
