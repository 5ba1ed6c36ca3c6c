"""Images per second of several engines that serve many requests at once, timed in turns.

OpenVINO gets the hint THROUGHPUT and chooses the numbers of streams and of requests in flight. ONNX Runtime has no such
mode: as many Python threads as cores call one session, whose operators run on one thread each.

In each round every engine is kept busy for the same time. Other work on the machine takes cores from an engine, so that
images per second of wall time fall with it; the processor time for an image does so much less. Both are printed, and
ratios are taken within a round.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploy import OpenVINORuntime, Runtime

CHOSEN_BY_OPENVINO = -1  # number of streams
Images = NDArray[np.float32]


class Server:
    """An engine that keeps requests in flight.

    Args:
        engine: OpenVINO's opened with `CHOSEN_BY_OPENVINO` streams, ONNX Runtime's with one thread.
    """

    def __init__(self, engine: Runtime) -> None:
        self.engine = engine
        if isinstance(engine, OpenVINORuntime):
            from openvino import AsyncInferQueue

            self._queue = AsyncInferQueue(engine._compiled)
            self.description = f"{self._property('NUM_STREAMS')} streams, {len(self._queue)} requests"
        else:
            self._num_threads = os.cpu_count() or 1
            self.description = f"{self._num_threads} threads"

    def _property(self, name: str) -> object:
        assert isinstance(self.engine, OpenVINORuntime)
        return self.engine._compiled.get_property(name)

    def serve(self, images: Images, seconds: float) -> int:
        """Run batches for some time; returns how many, all of them finished."""
        end = time.perf_counter() + seconds
        if isinstance(self.engine, OpenVINORuntime):
            count = 0
            while time.perf_counter() < end:
                self._queue.start_async({0: images}, share_inputs=True)
                count += 1
            self._queue.wait_all()
            return count
        with ThreadPoolExecutor(self._num_threads) as pool:
            return sum(pool.map(lambda _: self._call(images, end), range(self._num_threads)))

    def _call(self, images: Images, end: float) -> int:
        count = 0
        while time.perf_counter() < end:
            self.engine.infer_outputs(images)
            count += 1
        return count


@dataclass
class Served:
    """Rounds of one engine.

    Attributes:
        description: what is in flight.
        per_second: images per second of wall time, of each round.
        processor: milliseconds of processor time for an image, of each round.
    """

    description: str
    per_second: list[float]
    processor: list[float]


def serve_in_turns(
    open_engines: Mapping[str, Callable[[], Runtime]], batch: int, size: int, seconds: float, rounds: int
) -> dict[str, Served]:
    """Throughput of every engine in each round, after one round that does not count."""
    images = np.random.default_rng(0).random((batch, 3, size, size), dtype=np.float32)
    servers = {name: Server(open_engine()) for name, open_engine in open_engines.items()}
    found = {name: Served(server.description, [], []) for name, server in servers.items()}
    for number in range(rounds + 1):
        for name, server in servers.items():
            start, spent = time.perf_counter(), time.process_time()
            count = batch * server.serve(images, seconds)
            wall, spent = time.perf_counter() - start, time.process_time() - spent
            if number > 0:
                found[name].per_second.append(count / wall)
                found[name].processor.append(spent / count * 1000)
    for server in servers.values():
        server.engine.close()
    return found


def print_throughput(title: str, found: Mapping[str, Served]) -> None:
    """Medians, and ratios to FP32 of the same runtime with the smallest and largest of a round, as Markdown."""
    print(f"\n| {title} | in flight | images/s | against FP32 | processor ms | against FP32 |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, served in found.items():
        base = found[f"{name.split()[0]} fp32"]
        faster = _ratios(served.per_second, base.per_second)
        cheaper = _ratios(base.processor, served.processor)
        print(
            f"| {name} | {served.description} | {statistics.median(served.per_second):.1f} | {faster} | "
            f"{statistics.median(served.processor):.2f} | {cheaper} |"
        )


def print_against(ours: str, theirs: str, found: Mapping[str, Served]) -> None:
    """How many times as fast one engine is as another, by both clocks."""
    faster = _ratios(found[ours].per_second, found[theirs].per_second)
    cheaper = _ratios(found[theirs].processor, found[ours].processor)
    print(f"{ours} against {theirs}: images per second {faster}, processor time {cheaper}")


def _ratios(values: list[float], units: list[float]) -> str:
    ratios = [value / unit for value, unit in zip(values, units, strict=True)]
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
