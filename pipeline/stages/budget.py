"""The accuracy budget: as few units in float as keep the calibrated model within it; row `mixed`."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable

from torch import fx

from core.errors import GateError, RunError
from core.rows import FLOAT, MIXED, find_row
from models import measure_network
from pipeline.evaluation.measuring import measure_name, value_of
from pipeline.job import Job
from pipeline.run.progress import say
from pipeline.run.sweep import Sweep
from pipeline.stages.plans import assemble
from pipeline.stages.recalibration import recalibrate
from quant import (
    BudgetResult,
    Placement,
    placement_of,
    search_budget,
    switch_units,
    without_units,
)

BUDGET = "budget.json"
REASON = "accuracy budget"


def keep_budget(job: Job, model: fx.GraphModule, ranking: list[str], max_drop: float, sweep: Sweep) -> None:
    """Search the units to leave in float, and keep the model that has them in float, with its row `mixed`.

    The processes of a team share the images of every measurement, and so measure the same units.

    Args:
        job: the job.
        model: the calibrated model.
        ranking: its units, the most sensitive first.
        max_drop: largest loss of AP (or of the user's metric) against float.
        sweep: keeps the accuracy of every trial.

    Raises:
        GateError: not even all units in float reach the budget.
        RunError: the float row is missing, so that there is nothing to compare with.
    """
    row = find_row(job.run.rows(), FLOAT)
    if row is None or row.value is None:
        raise RunError("quant.accuracy_budget needs the row float: add the stage `float`")
    target = row.value - max_drop
    figure = measure_name(job.config.metric.factory, job.splits.task)

    def measure(kept: frozenset[str]) -> float:
        def trial(_: str) -> float:
            switch_units(model, set(ranking) - kept)
            return value_of(job.evaluator.measure(job.predictor(model), None))

        item = hashlib.sha256(json.dumps(sorted(kept)).encode()).hexdigest()[:16]
        value = _kept_value(job, sweep, f"float:{item}", trial)
        say(f"budget: {len(kept)} units float, {figure} {value:.4f} (target {target:.4f})")
        return value

    result = search_budget(ranking, measure, target)
    if job.stage_team.first:
        _write(job, model, result, target)
    if not result.met:
        raise GateError(
            f"quant.accuracy_budget={max_drop} not met: {figure} {result.accuracy:.4f} with {len(result.units)} "
            f"units float, target {target:.4f}; raise the budget or fine-tune instead"
        )
    if result.units:
        _keep_mixed(job, model, without_units(placement_of(model), result.units, REASON))


def _kept_value(job: Job, sweep: Sweep, item: str, measure: Callable[[str], float]) -> float:
    """The value of a sweep's item; the processes of a team measure it together."""
    team = job.stage_team
    if team.size == 1:
        ((_, value),) = sweep.run([item], measure)
        return value
    known = team.share(sweep.known(item))
    value = measure(item) if known is None else known
    if team.first:
        sweep.keep(item, value)
    return value


def _write(job: Job, model: fx.GraphModule, result: BudgetResult, target: float) -> None:
    """Keep what was found and what it costs: layers and multiply-accumulates that stay float."""
    facts = measure_network(job.networks.detector.network, job.config.data.input_size)
    macs: Counter[str] = Counter()
    for layer in facts.layers:  # a layer that runs several times is listed as often
        macs[layer.name] += layer.macs
    placement = placement_of(model)
    layers = {
        group.name: (*group.layers, *(site.name for site in placement.matmuls if group.name in site.groups))
        for group in placement.groups
    }
    floating = {layer for unit in result.units for layer in layers[unit]}
    costs = {unit: sum(macs[layer] for layer in layers[unit]) for unit in result.units}
    content = {
        "target_ap": target,
        "ap": result.accuracy,
        "met": result.met,
        "float_units": [
            {"unit": unit, "layers": list(layers[unit]), "macs": cost} for unit, cost in costs.items()
        ],
        "float_macs_share": sum(macs[layer] for layer in floating) / facts.macs,
        "trials": [vars(trial) for trial in result.trials],
    }
    job.run.write_json(BUDGET, content)


def _keep_mixed(job: Job, model: fx.GraphModule, placement: Placement) -> None:
    """Keep the model of the smaller placement, with the scales that are there."""
    smaller = assemble(job.networks, placement, {group.name: model for group in placement.groups}, model)
    if job.stage_team.first:
        recalibrate(job, smaller, MIXED)
    smaller = job.keep(smaller, placement, MIXED)
    measured = job.measure(MIXED, job.predictor(smaller))
    job.record(MIXED, measured, observer=job.config.quant.observer, float_units=len(placement.kept_float))
