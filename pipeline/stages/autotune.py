"""The stage `autotune`: which units to quantize, and in which codes, so that the engine is fast and accurate.

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

from core.choices import FP8
from core.errors import ConfigError
from core.rows import FLOAT, PTQ, RowKey, find_row
from core.targets import TARGETS
from deploy.autotune.costs import CostTable, plans_to_build
from deploy.autotune.search import Point, Search
from pipeline.evaluation.measuring import value_of
from pipeline.job import Job
from pipeline.networks import QUANTIZED
from pipeline.run.progress import say
from pipeline.splits import TRAIN, VAL
from pipeline.stages.load import FLOAT_FILES, MEASURED_BY
from pipeline.stages.plans import FLOATING, REASON, Plans
from pipeline.stages.pricing import Built, EstimatedPricing, Pricing, choose_pricing
from pipeline.stages.sensitivity import SENSITIVITY_FILE, rank_units
from pipeline.stages.stage import Stage
from pipeline.stages.variants import calibrated_as, options_of, precisions_of
from quant import dump_placement, placement_of

AUTOTUNE, TUNED_PLACEMENT = "autotune.json", "autotune-placement.yaml"
FLOATS = ("fp16", "bf16", "fp32")  # what engines call what plans call float
SMALLEST_DROP = 0.001  # AP; less cannot be told from chance on a few hundred images

Losses = dict[str, dict[str, float]]  # unit -> precision -> AP


@dataclass(frozen=True)
class Confirmed:
    """A plan that was built again.

    Attributes:
        name: `all float`, `all int8`, or `front`.
        point: the plan with what the search expected.
        built: the engine built with this plan, its latency estimated or measured.
        ap: measured accuracy, or the user's own metric.
        loss: what that is below the float model's.
        differing: layers that the engine runs in another precision than planned; None if not reported.
    """

    name: str
    point: Point
    built: Built
    ap: float
    loss: float
    differing: Sequence[Mapping[str, str]] | None

    @property
    def milliseconds(self) -> float:
        """Latency of the engine."""
        return self.built.milliseconds

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {
            "name": self.name,
            "units": Counter(self.point.plan.values()),
            "expected_milliseconds": self.point.milliseconds,
            "milliseconds": self.milliseconds,
            "estimated_ap_loss": self.point.loss,
            "measured_ap_loss": self.loss,
            "ap": self.ap,
            "layers": None if self.built.layers is None else len(self.built.layers),
            "layers_not_as_planned": self.differing,
        }


def check_autotune(job: Job) -> None:
    """Find settings that cannot work before any long work.

    Raises:
        ConfigError, DeployError: see `choose_pricing`; or codes or outputs that the GPU's graph cannot have.
    """
    config, pricing = job.config, choose_pricing(job)
    precisions_of(job, pricing.precisions)
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
    plans, losses = make_plans(job, precisions_of(job, pricing.precisions), ap[FLOAT] - ap[PTQ])
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
        confirmed = _confirm(job, plans, pricing, search, points, ap, Path(folder))
    allowed = [one for one in confirmed if one.loss <= config.max_ap_loss]
    if config.quantize_slower:
        allowed = [one for one in allowed if one.name != f"all {FLOATING}"] or allowed
        chosen = min(allowed, key=lambda one: list(one.point.plan.values()).count(FLOATING))
    else:
        chosen = min(allowed, key=lambda one: one.milliseconds)
    _write(job, plans, pricing, search, front, confirmed, chosen)


def make_plans(job: Job, precisions: Sequence[str], drop: float) -> tuple[Plans, Losses]:
    """What plans are made of, and the estimated AP loss of every unit in each precision that it can have.

    The run's own model is calibrated and scored already; those of the other precisions are here.

    Args:
        job: the job.
        precisions: quantized ones, the run's own first.
        drop: AP of the float model - AP of the run's calibrated model.
    """
    own, *others = precisions
    models = {own: job.networks.load(PTQ)}
    scores = {own: _scores(job)}
    for precision in others:
        models[precision] = calibrated_as(job, models[own], precision)
        ranked = rank_units(job, models[precision])
        scores[precision] = {score.unit: score.score for score in ranked}
    options = options_of(job.networks, placement_of(models[own]), precisions)
    losses = estimate_losses(scores, drop)
    return Plans(job, models, options), {
        unit: {name: losses[unit][name] for name in names} for unit, names in options.items()
    }


def learn_costs(job: Job, plans: Plans, pricing: Pricing, folder: Path) -> CostTable:
    """Build engines with several plans and take the costs of all blocks from them."""
    blocks = pricing.blocks(plans, folder)
    config = job.config
    count = config.autotune.mixtures * len(plans.models)
    wanted = plans_to_build(blocks, plans.options, plans.all_uniform, count, config.seed)
    table = CostTable(blocks)
    for plan, costs in zip(wanted, pricing.price(plans, wanted, blocks, folder), strict=True):
        table.add(plan, costs)
    return table


def estimate_losses(scores: Mapping[str, Mapping[str, float]], drop: float) -> Losses:
    """Estimated AP loss of every unit in each precision.

    Sensitivity scores are not accuracies. Those of the first precision are taken for shares of what its
    calibrated model lost against float, at least `SMALLEST_DROP`; the others' are on the same scale.

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
    """The quantized precision in which a unit is fastest within a plan; float if it has none."""
    options = [name for name in search.losses[unit] if name != FLOATING] or [FLOATING]
    return min(options, key=lambda name: search.change(plan, {unit: name})[0])


# -- models, scores, accuracy


def _scores(job: Job) -> dict[str, float]:
    """Scores of the stage `sensitivity`, by unit."""
    units = job.run.read_json(SENSITIVITY_FILE)["units"]
    return {unit["unit"]: float(unit["score"]) for unit in units}


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
    rows: Mapping[RowKey, float],
    folder: Path,
) -> list[Confirmed]:
    """Build the plans with one precision and some points again, and measure the accuracy that is not known."""
    uniform = dict(zip((f"all {name}" for name in plans.precisions), plans.all_uniform, strict=True))
    mixed = [point for point in points if dict(point.plan) not in uniform.values()]
    named = [(name, search.point(plan)) for name, plan in uniform.items()] + [("front", p) for p in mixed]
    engines = pricing.confirm(plans, [point.plan for _, point in named], search.table.blocks, folder)
    confirmed = []
    for (name, point), built in zip(named, engines, strict=True):
        if set(point.plan.values()) == {FLOATING}:
            ap = rows[FLOAT]
        elif point.plan == plans.own:
            ap = rows[PTQ]
        else:
            ap = value_of(job.evaluator.measure(job.predictor(plans.model(point.plan)), None))
        differing = compare_precisions(plans.planned(point.plan), built.layers)
        one = Confirmed(name, point, built, ap, rows[FLOAT] - ap, differing)
        confirmed.append(one)
        say(
            f"{name}: {plans.describe(point.plan)}; {built.milliseconds:.3f} ms {pricing.kind}, AP {ap:.4f} "
            f"(loss {one.loss:.4f}, estimated {point.loss:.4f}){_of_layers(one)}"
        )
    return confirmed


def compare_precisions(
    planned: Mapping[str, str], built: Mapping[str, str] | None
) -> list[dict[str, str]] | None:
    """Layers that an engine runs in another precision than planned; None if it does not report it.

    Args:
        planned: layer -> `float` or a quantized precision.
        built: layer -> precision of the engine; float ones have names such as `fp16`.
    """
    if built is None:
        return None
    found = {name: FLOATING if built.get(name) in FLOATS else built.get(name, "missing") for name in planned}
    return [
        {"layer": name, "planned": precision, "built": built.get(name, "missing")}
        for name, precision in planned.items()
        if found[name] != precision
    ]


def _of_layers(one: Confirmed) -> str:
    """How many layers of a built plan run as planned, if the builder reports it; for messages."""
    if one.differing is None:
        return ""
    first = "".join(f"; {item['layer']} in {item['built']}" for item in one.differing[:1])
    return f", {len(one.differing)} layers not as planned{first}"


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
        "precisions": plans.precisions,
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
                    name: search.change(plans.uniform(FLOATING), {unit: name})[0]
                    for name in plans.options[unit]
                    if name != FLOATING
                },
            }
            for unit, precision in plan.items()
        ],
    }
    job.run.write_json(AUTOTUNE, content)
    slower = sum("slower" in reason for reason in reasons.values())
    say(
        f"chosen: {chosen.name}, {plans.describe(plan)}; {chosen.milliseconds:.3f} ms {pricing.kind} "
        f"({pricing.subject}), AP {chosen.ap:.4f}; {slower} units in float because they are slower quantized"
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
    settings=("autotune", "deploy", "quant", "sensitivity", "data.limit_train", *MEASURED_BY),
    ignored=(
        "quant.placement", "quant.policy", "quant.float_patterns", "quant.accuracy_budget",
        "deploy.benchmark_seconds", "deploy.fixed_point_images", "deploy.range_images", "deploy.nms",
        "deploy.float_precisions", "deploy.compute_capabilities",
    ),
    splits=(TRAIN, VAL),
    files=("autotune.gpu_file",),
    reads=(*FLOAT_FILES, QUANTIZED[PTQ], FLOAT.path, PTQ.path, SENSITIVITY_FILE),
    writes=(AUTOTUNE, TUNED_PLACEMENT),
)  # fmt: skip
