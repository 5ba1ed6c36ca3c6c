"""Measured time of an engine's blocks, if a runtime reports times by layer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from deploy.autotune.blocks import Blocks
from deploy.runtimes.base import Runtime


def measure_blocks(
    engines: Sequence[Runtime], shape: tuple[int, int, int, int], seconds: float, blocks: Blocks
) -> list[dict[str, float]]:
    """Milliseconds of every block of some engines, which run alternately so that drift affects all of them.

    Args:
        engines: loaded with profiling.
        shape: of the images [B, 3, H, W].
        seconds: how long each engine runs, at least 3 calls.
        blocks: blocks of the network, by the names of its nodes.

    Raises:
        DeployError: an engine reports no times.
    """
    images = np.random.default_rng(0).random(shape, dtype=np.float32)
    spent = [0.0] * len(engines)
    calls = 0
    while calls < 3 or min(spent) < seconds:
        for index, engine in enumerate(engines):
            start = time.perf_counter()
            engine.infer_outputs(images)
            spent[index] += time.perf_counter() - start
        calls += 1
    return [_by_block(engine, blocks) for engine in engines]


def _by_block(engine: Runtime, blocks: Blocks) -> dict[str, float]:
    """The least time of each layer, by block: whatever else the machine does only adds to a layer's time."""
    samples = engine.layer_samples()
    found: dict[str, float] = defaultdict(float)
    for times, block in zip(samples.values(), blocks.of_layers(samples), strict=True):
        found[block] += min(times)
    return dict(found)
