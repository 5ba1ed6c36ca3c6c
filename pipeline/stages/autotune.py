"""The stage `autotune`: which units to quantize so that the engine is fast and accurate.

It writes `autotune.json`, and the placement of the chosen plan to `autotune-placement.yaml`, which another run takes
with `quant.placement=FILE`.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.choices import FP8, INT8
from core.errors import ConfigError
from core.rows import FLOAT, PTQ, find_row
from core.targets import TARGETS
from deploy.autotune.costs import CostTable, plans_to_build
from deploy.autotune.search import Point, Search
from pipeline.evaluation.measuring import value_of
from pipeline.job import Job
from pipeline.networks import QUANTIZED
from pipeline.run.progress import say
from pipeline.splits import VAL
from pipeline.stages.load import FLOAT_FILES, MEASURED_BY
from pipeline.stages.plans import FLOATING, REASON, Plans
from pipeline.stages.pricing import EstimatedPricing, Pricing, choose_pricing
from pipeline.stages.sensitivity import SENSITIVITY_FILE
from pipeline.stages.stage import Stage
from quant import dump_placement

AUTOTUNE, TUNED_PLACEMENT = "autotune.json", "autotune-placement.yaml"
SMALLEST_DROP = 0.001  # AP; less cannot be told from chance on a few hundred images

Losses = dict[str, dict[str, float]]  # unit -> precision -> AP


@dataclass(frozen=True)
class Confirmed:
    """A plan that was built again.

    Attributes:
        name: `all float`, `all int8`, or `front`.
        point: the plan with what the search expected.
        milliseconds: of the engine built with this plan, estimated or measured.
        ap: measured accuracy, or the user's own metric.
    """

    name: str
    point: Point
    milliseconds: float
    ap: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {
            "name": self.name,
            "units": Counter(self.point.plan.values()),
            "expected_milliseconds": self.point.milliseconds,
            "milliseconds": self.milliseconds,
            "estimated_ap_loss": self.point.loss,
            "ap": self.ap,
        }


def check_autotune(job: Job) -> None:
    """Find settings that cannot work before any long work.

    Raises:
        ConfigError, DeployError: see `choose_pricing`; or codes or outputs that the GPU's graph cannot have.
    """
    config, pricing = job.config, choose_pricing(job)
    if isinstance(pricing, EstimatedPricing):
        target = TARGETS[pricing.target]
        if config.quant.activations.unsigned:
            raise ConfigError(
                f"autotune.gpu={config.autotune.gpu} with quant.activations.unsigned=true: TensorRT takes signed codes "
                "only; leave one of them out"
            )
        if config.deploy.outputs not in target.outputs:
            raise ConfigError(
                f"autotune.gpu={config.autotune.gpu} with deploy.outputs={config.deploy.outputs}: expected one of "
                f"{', '.join(target.outputs)}"
            )
        if config.quant.grid == FP8 and FP8 not in pricing.gpu.teraops:
            raise ConfigError(
                f"quant.grid=fp8, but {pricing.subject} has no FP8: choose a GPU that has it with autotune.gpu, or use "
                "quant=int8"
            )
    elif config.quant.grid == FP8:
        raise ConfigError(
            f"quant.grid=fp8, but {pricing.subject} has no costs for FP8: name a GPU with autotune.gpu, or "
            "use quant=int8"
        )


def autotune_stage(job: Job) -> None:
    """Learn what units cost, search the front, build some of its plans again, and choose one."""
    config, pricing = job.config.autotune, choose_pricing(job)
    ap = {key: _value(job, key) for key in (FLOAT, PTQ)}
    precision = FP8 if job.config.quant.grid == FP8 else INT8
    plans = Plans(job, {precision: job.networks.load(PTQ)})
    losses = estimate_losses(_scores(job, precision), ap[FLOAT] - ap[PTQ])
    with tempfile.TemporaryDirectory() as folder:
        table = learn_costs(job, plans, pricing, Path(folder))
        search = Search(table, losses)
        front = search.front()
        say(
            f"autotune: {len(front)} plans on the front of {pricing.kind} latency ({pricing.subject}) and estimated "
            "AP loss"
        )
        points = spread(front, config.confirmed, config.max_ap_loss)
        if config.quantize_slower:
            points = [quantize_more(search, point, config.max_ap_loss) for point in points]
        known = {FLOATING: ap[FLOAT], precision: ap[PTQ]}
        confirmed = _confirm(job, plans, pricing, search, points, known, Path(folder))
    allowed = [one for one in confirmed if ap[FLOAT] - one.ap <= config.max_ap_loss]
    if config.quantize_slower:
        allowed = [one for one in allowed if one.name != f"all {FLOATING}"] or allowed
        chosen = min(allowed, key=lambda one: list(one.point.plan.values()).count(FLOATING))
    else:
        chosen = min(allowed, key=lambda one: one.milliseconds)
    _write(job, plans, pricing, search, front, confirmed, chosen)


def learn_costs(job: Job, plans: Plans, pricing: Pricing, folder: Path) -> CostTable:
    """Build engines with several plans and take the costs of all blocks from them."""
    blocks = pricing.blocks(plans, folder)
    config = job.config
    wanted = plans_to_build(blocks, plans.units, plans.precisions, config.autotune.mixtures, config.seed)
    table = CostTable(blocks)
    for plan, costs in zip(wanted, pricing.price(plans, wanted, blocks, folder), strict=True):
        table.add(plan, costs)
    return table


def estimate_losses(scores: Mapping[str, Mapping[str, float]], drop: float) -> Losses:
    """Estimated AP loss of every unit in each precision.

    Sensitivity scores are no accuracies. Those of the first precision are taken for shares of what its calibrated model
    lost against float, at least `SMALLEST_DROP`; the others' are on the same scale.

    Args:
        scores: precision -> unit -> score.
        drop: AP of the float model - AP of the model with all units in the first precision.
    """
    first = next(iter(scores.values()))
    total = sum(first.values()) or 1.0
    share = max(drop, SMALLEST_DROP) / total
    return {
        unit: {FLOATING: 0.0, **{name: found[unit] * share for name, found in scores.items()}}
        for unit in first
    }


def spread(front: Sequence[Point], count: int, max_loss: float) -> list[Point]:
    """At most `count` points of a front: the fastest within the loss, then evenly over those that are slower."""
    start = next((index for index, point in enumerate(front) if point.loss <= max_loss), len(front) - 1)
    rest = front[start:]
    step = (len(rest) - 1) / max(count - 1, 1)
    return [rest[index] for index in sorted({round(number * step) for number in range(count)})]


def quantize_more(search: Search, point: Point, max_loss: float) -> Point:
    """The point with as many more units quantized as the loss allows, those that lose least first."""
    plan, loss = dict(point.plan), point.loss
    best = {unit: _best_quantized(search, point.plan, unit) for unit in plan}
    for unit in sorted(plan, key=lambda unit: search.losses[unit][best[unit]]):
        added = search.losses[unit][best[unit]]
        if plan[unit] == FLOATING and loss + added <= max_loss:
            plan[unit], loss = best[unit], loss + added
    return search.point(plan)


def _best_quantized(search: Search, plan: Mapping[str, str], unit: str) -> str:
    """The quantized precision in which a unit is fastest beside the rest of a plan."""
    options = [name for name in search.losses[unit] if name != FLOATING]
    return min(options, key=lambda name: search.change(plan, {unit: name})[0])


# -- models, scores, accuracy


def _scores(job: Job, precision: str) -> dict[str, dict[str, float]]:
    """Scores of the stage `sensitivity`, by precision and unit."""
    units = job.run.read_json(SENSITIVITY_FILE)["units"]
    return {precision: {unit["unit"]: float(unit["score"]) for unit in units}}


def _value(job: Job, key: Any) -> float:
    """The measured accuracy of a row."""
    job.run.need(key.path, "float" if key == FLOAT else "calibrate")
    row = find_row(job.run.rows(), key)
    assert row is not None
    assert row.value is not None
    return row.value


def _confirm(
    job: Job,
    plans: Plans,
    pricing: Pricing,
    search: Search,
    points: Sequence[Point],
    known: Mapping[str, float],
    folder: Path,
) -> list[Confirmed]:
    """Build the plans with one precision and some points again, and measure the accuracy that is not known."""
    uniform = [(f"all {name}", search.point(plans.uniform(name))) for name in plans.precisions]
    mixed = [point for point in points if len(set(point.plan.values())) > 1]
    named = [*uniform, *(("front", point) for point in mixed)]
    times = pricing.confirm(plans, [point.plan for _, point in named], search.table.blocks, folder)
    confirmed = []
    for (name, point), milliseconds in zip(named, times, strict=True):
        ap = known.get(name.removeprefix("all "))
        if ap is None:
            ap = value_of(job.evaluator.measure(job.predictor(plans.model(point.plan)), None))
        confirmed.append(Confirmed(name, point, milliseconds, ap))
        say(
            f"{name}: {plans.describe(point.plan)}; {milliseconds:.3f} ms {pricing.kind}, AP {ap:.4f} "
            f"(estimated loss {point.loss:.4f})"
        )
    return confirmed


# -- what is written


def _write(
    job: Job,
    plans: Plans,
    pricing: Pricing,
    search: Search,
    front: Sequence[Point],
    confirmed: Sequence[Confirmed],
    chosen: Confirmed,
) -> None:
    plan = chosen.point.plan
    reasons = explain(search, plan, pricing.kind)
    content = {
        "latency": pricing.kind,
        "subject": pricing.subject,
        "gpu": dataclasses.asdict(pricing.gpu) if isinstance(pricing, EstimatedPricing) else None,
        "max_ap_loss": job.config.autotune.max_ap_loss,
        "front": [
            {"milliseconds": p.milliseconds, "estimated_ap_loss": p.loss, "units": Counter(p.plan.values())}
            for p in front
        ],
        "confirmed": [{**one.as_dict(), "is_chosen": one is chosen} for one in confirmed],
        "units": [
            {
                "unit": unit,
                "precision": precision,
                "reason": reasons.get(unit),
                "estimated_ap_loss": search.losses[unit],
                "change_from_all_float_milliseconds": {
                    name: search.change(plans.uniform(FLOATING), {unit: name})[0] for name in plans.models
                },
            }
            for unit, precision in plan.items()
        ],
    }
    job.run.write_json(AUTOTUNE, content)
    slower = sum("slower" in reason for reason in reasons.values())
    say(
        f"chosen: {chosen.name}, {plans.describe(plan)}; {chosen.milliseconds:.3f} ms {pricing.kind} "
        f"({pricing.subject}), AP {chosen.ap:.4f}; {slower} units float because they are slower quantized"
    )
    if set(plan.values()) == {FLOATING}:
        say("nothing to quantize: build the float engine in the GPU's or processor's half precision")
        return
    job.run.write_text(TUNED_PLACEMENT, dump_placement(plans.placement(plan, reasons)))
    say(f"placement: {job.run.path(TUNED_PLACEMENT)}; use it in another run with quant.placement=FILE")


def explain(search: Search, plan: Mapping[str, str], kind: str) -> dict[str, str]:
    """Why each float unit of a plan is float: it would be slower quantized, or accuracy."""
    reasons = {}
    for unit in (unit for unit, precision in plan.items() if precision == FLOATING):
        best = _best_quantized(search, plan, unit)
        slower = search.change(plan, {unit: best})[0]
        reasons[unit] = f"{REASON}: accuracy"
        if slower > 0:
            reasons[unit] = f"{REASON}: {best} is {kind} {1000 * slower:.1f} us slower"
    return reasons


TUNE = Stage(
    "autotune",
    autotune_stage,
    settings=("autotune", "deploy", *MEASURED_BY),
    ignored=(
        "deploy.benchmark_seconds", "deploy.fixed_point_images", "deploy.range_images", "deploy.nms",
        "deploy.float_precisions", "deploy.compute_capabilities",
    ),
    splits=(VAL,),
    files=("autotune.gpu_file",),
    reads=(*FLOAT_FILES, QUANTIZED[PTQ], FLOAT.path, PTQ.path, SENSITIVITY_FILE),
    writes=(AUTOTUNE, TUNED_PLACEMENT),
)  # fmt: skip
