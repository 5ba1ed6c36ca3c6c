"""What should be quantized for a GPU that is not here: front, chosen plan, all-INT8 and FP16 of a run, for some GPUs.

    python train_qat.py +experiment=bccd weights=W.pt data.root=D stages=[float,calibrate,sensitivity] run_dir=R
    python benchmarks/autotune_gpus.py R [--gpus rtx4060,l4] [--kernel-microseconds 1,2,4] [--ap]

All latencies are estimates from the kernels that TensorRT for RTX builds (`deploy/autotune/roofline.py`). GPUs of one
compute capability share the builds. The fastest plan is built again, and with --ap measured on the validation images.
NVIDIA publishes no cost of a kernel, so the estimate is repeated for several.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from configs.compose import read
from core.rows import FLOAT, PTQ
from deploy.autotune.gpus import GPU, load_gpus
from deploy.autotune.search import Point, Search
from pipeline.evaluation.measuring import value_of
from pipeline.job import Job
from pipeline.run.directory import CONFIG, Run
from pipeline.stages.autotune import estimate_losses, learn_costs
from pipeline.stages.plans import FLOATING, Plans
from pipeline.stages.pricing import EstimatedPricing
from pipeline.stages.sensitivity import SENSITIVITY_FILE
from quant import placement_of

INT8 = "int8"
NO_RUN = "autotune_gpus: skipped, no run directory given (see the docstring)"


def main(arguments: list[str]) -> int:
    """Run the benchmark; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", help="run directory with the stage sensitivity done")
    parser.add_argument("--gpus", default="rtx4060,l4")
    parser.add_argument("--mixtures", type=int, default=6)
    parser.add_argument("--kernel-microseconds", default="2")
    parser.add_argument("--ap", action="store_true", help="measure AP of the fastest plans")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    if options.run is None:
        print(NO_RUN)
        return 0
    job = open_job(Path(options.run), options.mixtures)
    plans = Plans(job, {INT8: job.networks.load(PTQ)})
    assert len(placement_of(plans.models[INT8]).groups) == len(plans.units)
    losses = estimate_losses({INT8: scores_of(job)}, drop_of(job))
    builds: dict[str, Any] = {}
    results = []
    print(
        "| GPU | kernel, us | FP16 ms | all INT8 ms | plans on the front | fastest ms, built again | its units |"
    )
    print("|---|---:|---:|---:|---:|---:|---|")
    for name in options.gpus.split(","):
        for microseconds in map(float, options.kernel_microseconds.split(",")):
            gpu = dataclasses.replace(load_gpus()[name], kernel_microseconds=microseconds)
            results.append(show(job, plans, losses, gpu, builds, options.ap))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def show(
    job: Job,
    plans: Plans,
    losses: dict[str, dict[str, float]],
    gpu: GPU,
    builds: dict[str, Any],
    is_measured: bool,
) -> dict[str, Any]:
    """One GPU: a line of the table, and the front as plain data."""
    pricing = EstimatedPricing(gpu)
    pricing.builds = builds.setdefault(gpu.capability, {})
    with tempfile.TemporaryDirectory() as folder:
        table = learn_costs(job, plans, pricing, Path(folder))
        front = Search(table, losses).front()
        wanted = [plans.uniform(FLOATING), plans.uniform(INT8), front[0].plan]
        half, int8, fastest = pricing.confirm(plans, wanted, table.blocks, Path(folder))
    print(
        f"| {gpu.title} | {gpu.kernel_microseconds:g} | {half:.3f} | {int8:.3f} | {len(front)} | {fastest:.3f} | "
        f"{plans.describe(front[0].plan)} |"
    )
    for point in front[:: max(1, len(front) // 8)]:
        print(
            f"  front: {point.milliseconds:.3f} ms, estimated AP loss {point.loss:.5f}, {plans.describe(point.plan)}"
        )
    ap = None
    if is_measured and len(set(front[0].plan.values())) > 1:
        ap = value_of(job.evaluator.measure(job.predictor(plans.model(front[0].plan)), None))
        print(f"  AP of the fastest plan: {ap:.4f}")
    return {
        "gpu": dataclasses.asdict(gpu),
        "fp16_ms": half,
        "int8_ms": int8,
        "fastest_ms": fastest,
        "fastest_ap": ap,
        "front": [as_dict(point) for point in front],
    }


def as_dict(point: Point) -> dict[str, Any]:
    """A point without its plan, but with its INT8 units."""
    units = [unit for unit, precision in point.plan.items() if precision != FLOATING]
    return {"milliseconds": point.milliseconds, "estimated_ap_loss": point.loss, "quantized": units}


def open_job(directory: Path, mixtures: int) -> Job:
    """The job of a finished run."""
    run = Run.open(directory)
    config = read(run.path(CONFIG))
    config.autotune.mixtures = mixtures
    return Job(config, run)


def scores_of(job: Job) -> dict[str, float]:
    """Sensitivity scores by unit."""
    return {unit["unit"]: unit["score"] for unit in job.run.read_json(SENSITIVITY_FILE)["units"]}


def drop_of(job: Job) -> float:
    """AP of float - AP of INT8."""
    values = {row.key: row.value or 0.0 for row in job.run.rows()}
    return values[FLOAT] - values[PTQ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
