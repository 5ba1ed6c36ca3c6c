"""The stage that finds what quantization costs where: sensitivity of every unit, and the accuracy budget over it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import fx

from core.errors import ConfigError, GateError
from data import to_input
from models import measure_network
from pipeline.evaluation.measuring import measure_name, row_value, value_of
from pipeline.job import Job
from pipeline.run.progress import say, track
from pipeline.run.sweep import Sweep
from quant import (
    ACTIVATION_QUANTIZERS,
    Mode,
    Placement,
    UnitScore,
    activation_quantizers,
    dump_placement,
    insert,
    measure_fisher,
    measure_sqnr,
    placement_of,
    quantized_layers,
    search_budget,
    set_mode,
    without_units,
)

BATCH = 4
BUDGET_REASON = "accuracy budget"


def sensitivity_stage(job: Job) -> None:
    """Rank the units by what quantizing them costs; where a budget is set, leave as few as possible in float."""
    config = job.config.sensitivity
    if config.method == "none":
        return
    model = job.load_quantized("ptq.safetensors", "calibrate")
    measure = {"fisher": rank_by_fisher, "sqnr": _sqnr, "map": _map}[config.method]
    scores = sorted(measure(job, model), key=lambda score: (-score.score, score.unit))
    job.run.write_json(
        "sensitivity.json",
        {"method": config.method, "images": config.images, "units": [score.as_dict() for score in scores]},
    )
    job.run.write_text("sensitivity-policy.yaml", _policy(model, scores))
    worst = ", ".join(f"{score.unit} {score.score:.3g}" for score in scores[:3])
    say(f"most sensitive units: {worst}")
    if job.config.quant.max_ap_drop is not None:
        _keep_budget(job, model, [score.unit for score in scores], job.config.quant.max_ap_drop)


def rank_by_fisher(job: Job, model: fx.GraphModule) -> list[UnitScore]:
    """Score of every unit from one backward pass over `sensitivity.images` training images."""
    masks = job.task == "segment"
    loader = job.letterboxed(job.train_set, BATCH, job.config.sensitivity.images, masks=masks)
    moved = (batch.to(job.device) for batch in track(loader, "sensitivity (fisher)", len(loader)))
    batches = ((to_input(batch.images, job.device), job.targets(batch)) for batch in moved)
    return measure_fisher(model, batches, job.loss())


def _sqnr(job: Job, model: fx.GraphModule) -> Iterable[UnitScore]:
    loader = job.letterboxed(job.train_set, BATCH, job.config.sensitivity.images)
    images = [to_input(batch.images, job.device) for batch in loader]
    return track(measure_sqnr(model, images), "sensitivity (sqnr)", len(placement_of(model).groups))


def _map(job: Job, model: fx.GraphModule) -> list[UnitScore]:
    return score_map(measure_units(job, model), [group.name for group in placement_of(model).groups])


def score_map(ap: Mapping[str, float], units: Iterable[str]) -> list[UnitScore]:
    """Scores of `measure_units`: how far AP moves with a unit quantized alone and left float alone, in the mean.

    Magnitudes, because a sign is luck: the roundings of a sensitive unit may just as well raise the AP of these images,
    and will lower it on others. The parts hold the signed figures: what AP lost, and what it gained.
    """
    scores = []
    for unit in units:
        lost, gained = ap["none"] - ap[f"on:{unit}"], ap[f"off:{unit}"] - ap["all"]
        parts = {"lost_when_quantized_alone": lost, "gained_when_left_float": gained}
        scores.append(UnitScore(unit, (abs(lost) + abs(gained)) / 2, parts))
    return scores


def measure_units(job: Job, model: fx.GraphModule) -> dict[str, float]:
    """AP with `all` units quantized, with `none`, and for each unit with it alone `off:UNIT` and alone `on:UNIT`."""
    units = [group.name for group in placement_of(model).groups]
    items = ["all", "none", *(f"{kind}:{unit}" for unit in units for kind in ("off", "on"))]
    sweep = Sweep(job.run.path("sensitivity") / _sweep_key(job))

    def measure(item: str) -> float:
        kind, _, unit = item.partition(":")
        quantized = set(units) if kind in {"all", "off"} else set()
        quantized ^= {unit} & set(units)
        switch_units(model, quantized)
        loader = job.val_loader(limit=job.config.sensitivity.images)
        return value_of(job.evaluate_batches(job.predictor(model), loader))

    return dict(track(sweep.run(items, measure), "sensitivity (map)", len(items)))


def switch_units(model: fx.GraphModule, quantized: set[str]) -> None:
    """Switch the given units on (activations and the weights that read them) and all others off."""
    set_mode(model, Mode.OFF)
    quantizers, layers = activation_quantizers(model), quantized_layers(model)
    for group in placement_of(model).groups:
        if group.name in quantized:
            quantizers[group.name].mode = Mode.QUANTIZE
            for layer in group.layers:
                layers[layer].weight_quantizer.mode = Mode.QUANTIZE


def _sweep_key(job: Job) -> str:
    """What the sweep's figures depend on: the calibrated model and the images measured."""
    digest = hashlib.sha256()
    for name in ("float.safetensors", "ptq.safetensors", "placement.yaml"):
        digest.update(job.run.need(name, "calibrate").read_bytes())
    settings = (
        job.config.data.image_size,
        job.config.sensitivity.images,
        vars(job.config.evaluate),
        job.config.metric.factory,
    )
    digest.update(json.dumps([settings, job.truth], default=str).encode())
    return digest.hexdigest()[:16]


def _policy(model: fx.GraphModule, scores: list[UnitScore]) -> str:
    """The ten most sensitive units as policy rules, ready to be pasted into a configuration."""
    layers = {group.name: group.layers for group in placement_of(model).groups}
    lines = [
        "# The most sensitive units first; keep the lines you want and run again.",
        "quant:",
        "  policy:",
    ]
    for score in scores[:10]:
        for layer in layers[score.unit]:
            lines.append(f"    - {{match: '{layer}', keep_float: true}}  # {score.unit}: {score.score:.4g}")
    return "\n".join(lines) + "\n"


def _keep_budget(job: Job, model: fx.GraphModule, ranking: list[str], max_drop: float) -> None:
    """Leave the units in float that the budget needs; the plan, the calibrated model and the row `ptq` follow.

    Raises:
        GateError: not even the allowed units in float reach the budget.
        ConfigError: the float row is missing, so that there is nothing to compare with.
    """
    rows = {row["name"]: row for row in job.run.rows()}
    reference = row_value(rows["float"]) if "float" in rows else None
    if reference is None:
        raise ConfigError("quant.max_ap_drop needs the float row: add the stage `float` before `sensitivity`")
    target = reference - max_drop
    figure = measure_name(job.config.metric.factory, job.task)

    def measure(kept: frozenset[str]) -> float:
        switch_units(model, set(ranking) - kept)
        value = value_of(job.evaluate_batches(job.predictor(model), job.val_loader()))
        say(f"budget: {len(kept)} units float, {figure} {value:.4f} (target {target:.4f})")
        return value

    result = search_budget(ranking, measure, target)
    facts = measure_network(job.detector.network, (job.config.data.image_size,) * 2)
    macs: Counter[str] = Counter()
    for layer in facts.layers:  # a layer that runs several times stands there as often
        macs[layer.name] += layer.macs
    layers = {group.name: group.layers for group in placement_of(model).groups}
    costs = [
        {"unit": unit, "layers": list(layers[unit]), "macs": sum(macs[layer] for layer in layers[unit])}
        for unit in result.units
    ]
    job.run.write_json(
        "budget.json",
        {
            "target_ap": target,
            "ap": result.accuracy,
            "met": result.met,
            "float_units": costs,
            "float_macs_share": sum(int(str(cost["macs"])) for cost in costs) / facts.macs,
            "trials": [vars(trial) for trial in result.trials],
        },
    )
    if not result.met:
        raise GateError(
            f"accuracy budget max_ap_drop={max_drop} not met: {figure} {result.accuracy:.4f} with {len(result.units)} "
            f"units float, target {target:.4f}; raise the budget or fine-tune instead"
        )
    if result.units:
        _apply(job, model, without_units(placement_of(model), result.units, BUDGET_REASON))


def _apply(job: Job, model: fx.GraphModule, placement: Placement) -> None:
    """Make the smaller plan this run's plan, with the scales that are there."""
    smaller = insert(job.detector.network, placement, job.config.qat.learn_scales).to(job.device).eval()
    found = activation_quantizers(model)
    for name, quantizer in activation_quantizers(smaller).items():
        quantizer.load_state_dict(found[name].state_dict())
    own = {key for key in smaller.state_dict() if not key.startswith(f"{ACTIVATION_QUANTIZERS}.")}
    smaller.load_state_dict(
        {key: value for key, value in model.state_dict().items() if key in own}, strict=False
    )
    set_mode(smaller, Mode.QUANTIZE)
    job.run.write_text("placement.yaml", dump_placement(placement))
    job.save_quantized(smaller, "ptq.safetensors")
    metrics = job.measure(job.predictor(smaller), "ptq within budget")
    job.record_row("ptq", metrics, observer=job.config.quant.observer, float_units=len(placement.kept_float))
