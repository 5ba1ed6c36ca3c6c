"""Does autotune's latency agree with the clock? Plans between all-float and all-INT8 on OpenVINO, cost against time.

    python train_qat.py +experiment=bccd weights=W.pt data.root=D stages=[float,calibrate,sensitivity] run_dir=R
    python benchmarks/autotune_clock.py R [--threads 1] [--hint f32] [--seconds 4] [--clock-seconds 4]

Costs are learned as the stage `autotune` does it: layer times of engines with one precision throughout and of mixtures.
Then other plans are built: both uniform ones, plans of the front, and plans in which runs of neighbouring units have
one precision. All engines are timed alternately, in one process, without counters. Wall time is what counts; processor
time of the same calls is printed as well, since other processes on a shared machine do not add to it. Prints both, and
Spearman's rank correlation with the summed costs.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from autotune_gpus import drop_of, open_job, scores_of
from sensitivity_agreement import spearman

from core.rows import PTQ
from deploy import Runtime
from deploy.autotune.search import Search
from pipeline.stages.autotune import estimate_losses, learn_costs, spread
from pipeline.stages.plans import FLOATING, Plans
from pipeline.stages.pricing import MeasuredPricing

INT8 = "int8"
CALLS = 3  # of an engine in one turn, after one that is not timed
NO_RUN = "autotune_clock: skipped, no run directory given (see the docstring)"


def main(arguments: list[str]) -> int:
    """Run the benchmark; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", help="run directory with the stage sensitivity done")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hint", default="f32", help="precision of the float units: f32 or bf16")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="of every engine that costs are taken from"
    )
    parser.add_argument("--clock-seconds", type=float, default=4.0, help="of every engine that is timed")
    parser.add_argument("--mixtures", type=int, default=8)
    options = parser.parse_args(arguments)
    if options.run is None:
        print(NO_RUN)
        return 0
    job = open_job(Path(options.run), options.mixtures)
    job.config.deploy.threads, job.config.deploy.int8_hint = options.threads, options.hint
    job.config.autotune.seconds = options.seconds
    plans = Plans(job, {INT8: job.networks.load(PTQ)})
    pricing = MeasuredPricing(job, "openvino")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        table = learn_costs(job, plans, pricing, folder)
        front = Search(table, estimate_losses({INT8: scores_of(job)}, drop_of(job))).front()
        wanted = [plans.uniform(INT8), plans.uniform(FLOATING), *(p.plan for p in spread(front, 6, np.inf))]
        wanted += [neighbours(plans.units, seed) for seed in range(8)]
        wanted = list({tuple(plan.values()): plan for plan in wanted}.values())  # the front ends all-float
        engines = pricing.engines(plans, wanted, folder, stack)
        clocked = clock(engines, pricing.shape, options.clock_seconds)
    expected = [table.latency(plan) for plan in wanted]
    print("| expected ms | wall ms, median | processor ms, median | plan |\n|---:|---:|---:|---|")
    for plan, milliseconds, (wall, processor) in zip(wanted, expected, clocked, strict=True):
        print(f"| {milliseconds:.2f} | {wall:.2f} | {processor:.2f} | {plans.describe(plan)} |")
    for index, label in enumerate(("wall", "processor")):
        times = [times[index] for times in clocked]
        best = int(np.argmin(times))
        print(
            f"{label} time: Spearman {spearman(expected, times):.3f} over {len(wanted)} plans; fastest: "
            f"{plans.describe(wanted[best])} {times[best]:.2f} ms, all INT8 {times[0]:.2f} ms"
        )
    return 0


def neighbours(units: Sequence[str], seed: int) -> dict[str, str]:
    """A random plan in which the precision changes rarely along the graph."""
    generator = random.Random(seed)
    precision, plan = generator.choice([FLOATING, INT8]), {}
    for unit in units:
        if generator.random() < 0.03:
            precision = INT8 if precision == FLOATING else FLOATING
        plan[unit] = precision
    return plan


def clock(
    engines: Sequence[Runtime], shape: tuple[int, int, int, int], seconds: float
) -> list[tuple[float, float]]:
    """Median wall and processor milliseconds of a call of each engine; they run alternately."""
    images = np.random.default_rng(0).random(shape, dtype=np.float32)
    times: list[list[tuple[float, float]]] = [[] for _ in engines]
    started = time.perf_counter()
    while time.perf_counter() - started < seconds * len(engines):
        for engine, taken in zip(engines, times, strict=True):
            engine.infer_outputs(images)
            for _ in range(CALLS):
                wall, processor = time.perf_counter(), time.process_time()
                engine.infer_outputs(images)
                taken.append((time.perf_counter() - wall, time.process_time() - processor))
    medians = [np.median(taken, axis=0) * 1000 for taken in times]
    return [(float(wall), float(processor)) for wall, processor in medians]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
