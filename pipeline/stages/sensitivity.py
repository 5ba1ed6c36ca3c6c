"""The stage `sensitivity`: what quantizing each unit costs, and the accuracy budget over that ranking.

A unit is a placement group: the tensors of one scale and the weights of the layers that read them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from core.choices import AUTO, BFLOAT16, FLOAT32
from core.machine import computes_in_bfloat16
from core.rows import FLOAT, MIXED, PTQ
from data import to_input
from models import SegmentTargets
from pipeline.evaluation.measuring import value_of
from pipeline.job import Job
from pipeline.networks import QUANTIZED
from pipeline.run.progress import say, track
from pipeline.run.sweep import Sweep
from pipeline.splits import TRAIN, VAL
from pipeline.stages.budget import BUDGET, keep_budget
from pipeline.stages.load import FLOAT_FILES, MEASURED_BY
from pipeline.stages.recalibration import recalibration_file
from pipeline.stages.stage import Stage
from quant import Figures, SwitchedUnits, UnitScore, measure_fisher, measure_sqnr, placement_of, switch_units

BATCH = 4
FISHER_BATCH = 16  # where images are small: what each batch takes whatever its size counts less
FISHER_PIXELS = FISHER_BATCH * 320 * 320
SENSITIVITY_FILE, POLICY = "sensitivity.json", "sensitivity-policy.yaml"


def sensitivity_stage(job: Job) -> None:
    """Rank the units by what quantizing them costs; where a budget is set, leave as few as possible in float."""
    config = job.config.sensitivity
    if config.method == "none":
        return
    model = job.networks.load(PTQ)
    scores = sorted(rank_units(job, model), key=lambda score: (-score.score, score.unit))
    if job.stage_team.first:
        units = [score.as_dict() for score in scores]
        job.run.write_json(
            SENSITIVITY_FILE, {"method": config.method, "images": config.images, "units": units}
        )
        job.run.write_text(POLICY, _policy(model, scores))
    worst = ", ".join(f"{score.unit} {score.score:.3g}" for score in scores[:3])
    say(f"most sensitive units: {worst}")
    if job.config.quant.accuracy_budget is not None:
        ranking = [score.unit for score in scores]
        keep_budget(job, model, ranking, job.config.quant.accuracy_budget, kept_results(job, model))


def rank_units(job: Job, model: fx.GraphModule) -> Iterable[UnitScore]:
    """Score of every unit of a calibrated model by `sensitivity.method`."""
    measure = {"fisher": rank_by_fisher, "sqnr": _sqnr, "map": _map}[job.config.sensitivity.method]
    return measure(job, model)


def rank_by_fisher(job: Job, model: fx.GraphModule) -> list[UnitScore]:
    """Score of every unit from the gradients of each of `sensitivity.images` training images.

    The processes of a team share the batches; the figures of each are kept, for a run that is stopped.
    """
    splits, team, layout = job.splits, job.stage_team, job.networks.memory_format
    height, width = job.config.data.input_size
    batch = max(BATCH, min(FISHER_BATCH, FISHER_PIXELS // (height * width)))
    masks, batch = splits.task == "segment", min(batch, 2 * job.config.evaluate.batch_size)
    loader = splits.letterboxed(
        splits.train, batch, job.config.sensitivity.images, team, masks, whole_batches=True
    )
    batches = (
        (images.contiguous(memory_format=layout), targets_by_image(targets, len(images)))
        for images, targets in splits.labelled(loader, "sensitivity (fisher)")
    )
    sweep = kept_results(job, model)
    products = fisher_products(job.config.sensitivity.precision, job.device)

    def kept(number: int, compute: Callable[[], Figures]) -> Figures:
        item = f"fisher:{products}:{batch}:{number * team.size + team.rank}"
        figures: Figures | None = sweep.read(item)
        if figures is None:
            figures = compute()
            sweep.keep(item, figures)
        return figures

    return measure_fisher(model, batches, job.networks.loss(), team.gather, kept, products)


def fisher_products(precision: str, device: torch.device) -> torch.dtype:
    """The type in which `fisher` multiplies gradients, for `sensitivity.precision`."""
    if precision == AUTO:
        precision = BFLOAT16 if device.type == "cpu" and computes_in_bfloat16() else FLOAT32
    return torch.bfloat16 if precision == BFLOAT16 else torch.float32


def targets_by_image(targets: Tensor | SegmentTargets, count: int) -> list[Tensor | SegmentTargets]:
    """The targets of each image of a batch, as a loss takes them for a batch of one."""
    boxes = targets.boxes if isinstance(targets, SegmentTargets) else targets
    found: list[Tensor | SegmentTargets] = []
    for index in range(count):
        own = boxes[:, 0] == index
        rows = torch.cat((torch.zeros_like(boxes[own, :1]), boxes[own, 1:]), dim=1)
        found.append(
            SegmentTargets(rows, targets.masks[own]) if isinstance(targets, SegmentTargets) else rows
        )
    return found


def _sqnr(job: Job, model: fx.GraphModule) -> Iterable[UnitScore]:
    """Score of every unit by the output error with it alone quantized; the processes of a team share the units."""
    loader = job.splits.letterboxed(job.splits.train, BATCH, job.config.sensitivity.images)
    units, team = [group.name for group in placement_of(model).groups], job.stage_team
    sweep = kept_results(job, model)
    found = team.share({unit: value for unit in units if (value := sweep.known(f"sqnr:{unit}")) is not None})
    share = [unit for unit in units if unit not in found][team.rank :: team.size]

    def measure() -> Iterator[UnitScore]:
        if share:
            images = list(job.splits.images(loader, memory_format=job.networks.memory_format))
            for score in measure_sqnr(model, images, {*units} - {*share}):
                sweep.keep(f"sqnr:{score.unit}", score.score)
                yield score

    measured = team.gather(list(track(measure(), "sensitivity (sqnr)", len(share))))
    return [*itertools.chain(*measured), *(UnitScore(unit, value) for unit, value in found.items())]


def _map(job: Job, model: fx.GraphModule) -> list[UnitScore]:
    return score_map(measure_units(job, model), [group.name for group in placement_of(model).groups])


def score_map(ap: Mapping[str, float], units: Iterable[str]) -> list[UnitScore]:
    """Scores of `measure_units`: how far AP moves with a unit quantized alone and left float alone, in the mean.

    Magnitudes, because a sign is chance: the roundings of a sensitive unit may just as well raise the AP of these
    images, and will lower it on others. The parts hold the signed figures: what AP lost, and what it gained.
    """
    scores = []
    for unit in units:
        lost, gained = ap["none"] - ap[f"on:{unit}"], ap[f"off:{unit}"] - ap["all"]
        parts = {"lost_when_quantized_alone": lost, "gained_when_left_float": gained}
        scores.append(UnitScore(unit, (abs(lost) + abs(gained)) / 2, parts))
    return scores


def measure_units(job: Job, model: fx.GraphModule) -> dict[str, float]:
    """AP with `all` units quantized, with `none`, and for each unit with it alone `off:UNIT` and alone `on:UNIT`.

    The processes of a team share these items, each on all images; their results meet in the run directory. Units are
    measured in groups, each with the values that the network computes before them (see `quant.SwitchedUnits`), but for
    a metric of the user's own, which looks at one model at a time.
    """
    units = [group.name for group in placement_of(model).groups]
    items = ["all", "none", *(f"{kind}:{unit}" for unit in units for kind in ("off", "on"))]
    sweep, team, images = kept_results(job, model), job.stage_team, job.config.sensitivity.images
    predict = job.predictor(model)

    def measure(item: str) -> float:
        kind, _, unit = item.partition(":")
        quantized = set(units) if kind in {"all", "off"} else set()
        quantized ^= {unit} & set(units)
        switch_units(model, quantized)
        return value_of(job.evaluator.measure(predict, None, limit=images))

    with job.alone():
        share = items[team.rank :: team.size]
        found = sweep.run(share, measure)
        if job.evaluator.metric is None and any(sweep.known(item) is None for item in items):
            groups, together = _grouped(job, model, units)
            groups = [["all"], ["none"], *groups][team.rank :: team.size]
            share = list(itertools.chain(*groups))
            found = sweep.run_groups(
                groups, lambda group: together(group) if ":" in group[0] else {group[0]: measure(group[0])}
            )
        for _ in track(found, "sensitivity (map)", len(share)):
            pass
        team.wait()
        return dict(sweep.run(items, measure))


def _grouped(
    job: Job, model: fx.GraphModule, units: list[str]
) -> tuple[list[list[str]], Callable[[list[str]], dict[str, float]]]:
    """The items of all units in groups, and what measures the items of a group."""
    memory_format, limit = job.networks.memory_format, job.config.sensitivity.images
    batch = next(iter(job.splits.val_batches(job.config.evaluate.batch_size, limit)))
    images = to_input(batch.images, job.device).contiguous(memory_format=memory_format)
    switched = {kind: SwitchedUnits(model, kind == "off", images) for kind in ("off", "on")}

    def measure(items: list[str]) -> dict[str, float]:
        kind = items[0].partition(":")[0]
        chosen = [item.partition(":")[2] for item in items]

        def outputs(images: Tensor) -> Iterator[Any]:
            return switched[kind].outputs(chosen, images.contiguous(memory_format=memory_format))

        decode = job.networks.detector.decode
        metrics = job.evaluator.measure_each(outputs, len(items), decode, limit)
        return dict(zip(items, map(value_of, metrics), strict=True))

    groups = [
        [f"{kind}:{unit}" for unit in group] for kind in switched for group in switched[kind].groups(units)
    ]
    return groups, measure


def kept_results(job: Job, model: fx.GraphModule) -> Sweep:
    """The results of this stage's measurements so far, for this model and these images.

    They are in the run directory, or in `sensitivity.directory`, which several runs can share.
    """
    folder = job.config.sensitivity.directory
    return Sweep((Path(folder) if folder else job.run.path("sensitivity")) / _sweep_key(job, model))


def _sweep_key(job: Job, model: fx.GraphModule) -> str:
    """What the sweep's figures depend on: the calibrated model, its codes and the images measured."""
    digest = hashlib.sha256(",".join(group.grid.name for group in placement_of(model).groups).encode())
    for name in (FLOAT_FILES[0], QUANTIZED[PTQ]):
        digest.update(job.run.need(name, "calibrate").read_bytes())
    settings = (
        job.config.data.image_size,
        job.config.data.limit_val,
        job.config.sensitivity.images,
        vars(job.config.evaluate),
        job.config.metric.factory,
    )
    digest.update(json.dumps([settings, job.splits.truth, job.splits.digest(TRAIN)], default=str).encode())
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


SENSITIVITY = Stage(
    "sensitivity",
    sensitivity_stage,
    needs=("calibrate",),
    settings=("sensitivity", "quant.accuracy_budget", *MEASURED_BY),
    ignored=("sensitivity.directory",),
    splits=(TRAIN, VAL),
    reads=(*FLOAT_FILES, QUANTIZED[PTQ], FLOAT.path),
    writes=(SENSITIVITY_FILE, POLICY, BUDGET, QUANTIZED[MIXED], recalibration_file(MIXED), MIXED.path),
    is_shared=True,
)
