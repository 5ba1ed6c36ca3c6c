"""What should be quantized for a GPU that is not here: front, fastest plan, and the plans of one precision.

    python train_qat.py +experiment=bccd weights=W.pt data.root=D stages=[float,calibrate,sensitivity] run_dir=R
    python benchmarks/autotune_gpus.py R [--gpus rtx4060,l4] [--kernel-microseconds 0.5,1,2] [--ap]
    python benchmarks/autotune_gpus.py --architecture yolov9c [--gpus ...]

All latencies are estimates from the kernels that TensorRT for RTX builds (`deploy/autotune/roofline.py`). GPUs of one
compute capability share the builds. The fastest plan is built again, its layers are compared with what was planned,
and with --ap its AP is measured on the validation images. The cost of a kernel is an assumption, so the estimate is
repeated for several. `--architecture` takes random weights, of which only the fastest plan means anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs.compose import compose, dump, read
from core.choices import FP8, INT8
from core.rows import FLOAT, PTQ
from deploy.autotune.gpus import GPU, load_gpus
from deploy.autotune.search import Point, Search
from models import build_detector
from pipeline.evaluation.measuring import value_of
from pipeline.job import Job
from pipeline.run.directory import CONFIG, Run
from pipeline.stages.autotune import Losses, compare_precisions, learn_costs, make_plans
from pipeline.stages.plans import FLOATING, Plans
from pipeline.stages.pricing import Build, EstimatedPricing
from pipeline.stages.sensitivity import SENSITIVITY_FILE
from pipeline.stages.variants import converted, options_of
from quant import calibrate, insert, place

NO_RUN = "autotune_gpus: skipped, neither a run directory nor --architecture given (see the docstring)"
HEADINGS = (
    "GPU", "kernel, us", "FP16 ms", "all INT8 ms", "all FP8 ms", "plans on the front", "fastest, expected ms",
    "fastest, built again ms", "its units", "layers not as planned",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run the benchmark; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", help="run directory with the stage sensitivity done")
    parser.add_argument("--architecture", help="random weights instead of a run")
    parser.add_argument("--size", type=int, default=320, help="side of the images of --architecture, pixels")
    parser.add_argument("--gpus", default="rtx4060,l4")
    parser.add_argument("--mixtures", type=int, default=6, help="for each quantized precision")
    parser.add_argument("--kernel-microseconds", default="1")
    parser.add_argument("--ap", action="store_true", help="measure AP of the fastest plans")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    if options.run is None and options.architecture is None:
        print(NO_RUN)
        return 0
    results = []
    print(f"| {' | '.join(HEADINGS)} |\n| --- |{' ---: |' * 7} --- | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        source = (
            Trained(Path(options.run), options.mixtures)
            if options.run is not None
            else Untrained(options.architecture, options.size, Path(folder), options.mixtures)
        )
        builds: dict[str, Any] = {}
        for name in options.gpus.split(","):
            for microseconds in map(float, options.kernel_microseconds.split(",")):
                gpu = dataclasses.replace(load_gpus()[name], kernel_microseconds=microseconds)
                results.append(show(source, gpu, builds.setdefault(gpu.capability, {}), options.ap))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


class Trained:
    """The plans of a finished run.

    Args:
        directory: of the run.
        mixtures: `autotune.mixtures`.
    """

    def __init__(self, directory: Path, mixtures: int) -> None:
        self.job = open_job(directory, mixtures)
        self.known: dict[tuple[str, ...], tuple[Plans, Losses]] = {}

    def plans(self, precisions: tuple[str, ...]) -> tuple[Plans, Losses]:
        """Plans of some precisions, and their losses."""
        if precisions not in self.known:
            self.known[precisions] = make_plans(self.job, precisions, drop_of(self.job))
        return self.known[precisions]


class Untrained:
    """The plans of a network with random weights and scales, none of which loses anything.

    Args:
        architecture: its name.
        size: side of the images, pixels.
        folder: for a run directory.
        mixtures: `autotune.mixtures`.
    """

    def __init__(self, architecture: str, size: int, folder: Path, mixtures: int) -> None:
        overrides = [f"data.image_size={size}", f"autotune.mixtures={mixtures}", "deploy.target=tensorrt_rtx"]
        config = compose(["+experiment=demo", "deploy.runtimes=[tensorrt_rtx]", *overrides])
        run = Run.plan(folder / "run", config.experiment)
        run.make(dump(config))
        self.job = Job(config, run)
        torch.manual_seed(0)
        self.job.networks.keep(build_detector(architecture, 80))
        network = self.job.networks.detector.network
        self.placement = place(network)
        placements = {INT8: self.placement, FP8: converted(self.placement, FP8)}
        self.models = {name: insert(network, placement).eval() for name, placement in placements.items()}
        for model in self.models.values():
            calibrate(model, [torch.rand(1, 3, size, size)], "minmax", "minmax")

    def plans(self, precisions: tuple[str, ...]) -> tuple[Plans, Losses]:
        """Plans of some precisions, without losses."""
        options = options_of(self.job.networks, self.placement, precisions)
        models = {name: self.models[name] for name in precisions}
        return Plans(self.job, models, options), {
            u: dict.fromkeys(names, 0.0) for u, names in options.items()
        }


def show(
    source: Trained | Untrained, gpu: GPU, builds: dict[tuple[str, ...], Build], is_measured: bool
) -> dict[str, Any]:
    """One GPU: a line of the table, and the front as plain data."""
    pricing = EstimatedPricing(gpu)
    pricing.builds = builds
    plans, losses = source.plans(pricing.precisions)
    with tempfile.TemporaryDirectory() as folder:
        table = learn_costs(source.job, plans, pricing, Path(folder))
        front = Search(table, losses).front()
        wanted = [*plans.all_uniform, front[0].plan]
        *uniform, fastest = pricing.confirm(plans, wanted, table.blocks, Path(folder))
    differing = compare_precisions(plans.planned(front[0].plan), fastest.layers) or []
    times = dict(zip(plans.precisions, (built.milliseconds for built in uniform), strict=True))
    cells = [
        gpu.title, f"{gpu.kernel_microseconds:g}",
        *(f"{times[name]:.3f}" if name in times else "-" for name in (FLOATING, INT8, FP8)),
        len(front), f"{front[0].milliseconds:.3f}", f"{fastest.milliseconds:.3f}", plans.describe(front[0].plan),
        f"{len(differing)} of {len(fastest.layers or ())}",
    ]  # fmt: skip
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
    ap = show_front(source, plans, front, is_measured)
    return {
        "gpu": dataclasses.asdict(gpu),
        "uniform_ms": times,
        "fastest_ms": fastest.milliseconds,
        "fastest_ap": ap,
        "not_as_planned": differing,
        "front": [as_dict(point) for point in front],
    }


def show_front(
    source: Trained | Untrained, plans: Plans, front: Sequence[Point], is_measured: bool
) -> float | None:
    """Some points of the front of a trained network, and the AP of the fastest where that is asked for."""
    if isinstance(source, Untrained):
        return None
    for point in front[:: max(1, len(front) // 8)]:
        print(
            f"  front: {point.milliseconds:.3f} ms, estimated AP loss {point.loss:.5f}, {plans.describe(point.plan)}"
        )
    if not is_measured or set(front[0].plan.values()) == {FLOATING}:
        return None
    job = source.job
    ap = value_of(job.evaluator.measure(job.predictor(plans.model(front[0].plan)), None))
    print(f"  AP of the fastest plan: {ap:.4f}, estimated loss {front[0].loss:.4f}")
    return ap


def as_dict(point: Point) -> dict[str, Any]:
    """A point, its quantized units by precision."""
    units: dict[str, list[str]] = {}
    for unit, precision in point.plan.items():
        if precision != FLOATING:
            units.setdefault(precision, []).append(unit)
    return {"milliseconds": point.milliseconds, "estimated_ap_loss": point.loss, "quantized": units}


def open_job(directory: Path, mixtures: int) -> Job:
    """The job of a finished run."""
    run = Run.open(directory)
    config = read(run.path(CONFIG))
    config.autotune.mixtures = mixtures
    return Job(config, run)


def scores_of(job: Job) -> Mapping[str, float]:
    """Sensitivity scores by unit."""
    return {unit["unit"]: unit["score"] for unit in job.run.read_json(SENSITIVITY_FILE)["units"]}


def drop_of(job: Job) -> float:
    """AP of float - AP of INT8."""
    values = {row.key: row.value or 0.0 for row in job.run.rows()}
    return values[FLOAT] - values[PTQ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
