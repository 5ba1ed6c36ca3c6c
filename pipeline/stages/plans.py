"""A plan (unit -> precision) as a placement, as a quantized model and as a graph for a target."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx import ModelProto
from torch import fx

from core.names import listing
from core.rows import FLOAT, PTQ
from core.targets import TARGETS
from deploy import load_onnx
from deploy.compile.report import half_precision
from pipeline.job import Job
from pipeline.networks import Networks
from pipeline.stages.export import write_onnx
from quant import (
    ACTIVATION_QUANTIZERS,
    Mode,
    Placement,
    activation_quantizers,
    placement_of,
    set_mode,
    without_units,
)

FLOATING = "float"  # the precision of units that are not quantized
REASON = "autotune"


class Plans:
    """The plans of one network.

    Args:
        job: the job.
        models: precision -> the calibrated model that has every unit in it; all have the same units. The first is the
            run's own.
        options: unit -> what it can be, float first; None where every unit can be float or any model's.
    """

    def __init__(
        self,
        job: Job,
        models: Mapping[str, fx.GraphModule],
        options: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.job = job
        self.models = models
        self.placements = {name: placement_of(model) for name, model in models.items()}
        first = next(iter(self.placements.values()))
        self.units = [group.name for group in first.groups]
        self.options = dict(options) if options else dict.fromkeys(self.units, tuple(self.precisions))
        self.tensors = {site.name: group.name for group in first.groups for site in group.tensors}

    @property
    def precisions(self) -> list[str]:
        """What a unit can be: float, or one of the models'."""
        return [FLOATING, *self.models]

    def uniform(self, precision: str) -> dict[str, str]:
        """The plan with one precision throughout; units that cannot have it are float."""
        return {unit: precision if precision in self.options[unit] else FLOATING for unit in self.units}

    @property
    def own(self) -> dict[str, str]:
        """The plan of the run's own model: every unit quantized."""
        first = next(iter(self.models))
        return {unit: first if first in names else names[-1] for unit, names in self.options.items()}

    @property
    def all_uniform(self) -> list[dict[str, str]]:
        """The plans with one precision throughout, float first."""
        return [self.uniform(precision) for precision in self.precisions]

    def planned(self, plan: Mapping[str, str]) -> dict[str, str]:
        """Layer -> its precision in a plan, `float` for those without quantized weights."""
        placement = self.placement(plan)
        return {site.layer: plan[site.group] for site in placement.weights} | dict.fromkeys(
            placement.kept_float, FLOATING
        )

    def placement(self, plan: Mapping[str, str], reasons: Mapping[str, str] | None = None) -> Placement:
        """The placement of a plan; `reasons` say by unit why it stays float."""
        found = {
            name: {group.name: group for group in placement.groups}
            for name, placement in self.placements.items()
        }
        first = next(iter(self.placements.values()))
        groups = tuple(
            group if plan[group.name] == FLOATING else found[plan[group.name]][group.name]
            for group in first.groups
        )
        placement = dataclasses.replace(first, groups=groups)
        for unit in self.units:
            if plan[unit] == FLOATING:
                placement = without_units(placement, [unit], (reasons or {}).get(unit, REASON))
        grids = {
            (name, site.layer): site.grid for name, mine in self.placements.items() for site in mine.weights
        }
        weights = tuple(
            dataclasses.replace(site, grid=grids[plan[site.group], site.layer]) for site in placement.weights
        )
        return _without_mixed_products(dataclasses.replace(placement, weights=weights))

    def model(self, plan: Mapping[str, str]) -> fx.GraphModule:
        """The calibrated model of a plan, quantizers on."""
        placement = self.placement(plan)
        sources = {group.name: self.models[plan[group.name]] for group in placement.groups}
        return assemble(self.job.networks, placement, sources, next(iter(self.models.values())))

    def write(self, plan: Mapping[str, str], target: str, path: Path) -> ModelProto:
        """Export a plan for a target; returns the graph, that of a float plan in the types that its engine has."""
        if any(precision != FLOATING for precision in plan.values()):
            write_onnx(self.job, self.model(plan).cpu(), target, PTQ.name, path)
            return load_onnx(path)
        network = self.job.networks.student.cpu()
        write_onnx(self.job, network, TARGETS[target].float_target or target, FLOAT.name, path)
        model = load_onnx(path)
        return half_precision(model) if TARGETS[target].half else model

    def describe(self, plan: Mapping[str, str]) -> str:
        """How many units have which precision: `12 int8, 133 float`."""
        counts = {name: sum(found == name for found in plan.values()) for name in self.precisions}
        return listing(f"{count} {name}" for name, count in counts.items() if count)


def _without_mixed_products(placement: Placement) -> Placement:
    """Leave products of two tensors in float where these have codes of two kinds, which no engine multiplies."""
    kinds = {group.name: group.grid.kind for group in placement.groups}
    mixed = {site.name for site in placement.matmuls if len({kinds[name] for name in site.groups}) > 1}
    return dataclasses.replace(
        placement,
        matmuls=tuple(site for site in placement.matmuls if site.name not in mixed),
        kept_float={
            **placement.kept_float,
            **dict.fromkeys(sorted(mixed), f"{REASON}: its operands have codes of two kinds"),
        },
    )


def assemble(
    networks: Networks, placement: Placement, sources: Mapping[str, fx.GraphModule], rest: fx.GraphModule
) -> fx.GraphModule:
    """A model of a smaller or mixed placement out of calibrated ones, quantizers on.

    Args:
        networks: the run's networks.
        placement: what the model has.
        sources: group -> the model that its scale, and the layers that read it, are from.
        rest: the model that layers without quantized weights are from.
    """
    model = networks.insert(placement)
    for name, quantizer in activation_quantizers(model).items():
        quantizer.load_state_dict(activation_quantizers(sources[name])[name].state_dict())
    owners = {site.layer: sources[site.group] for site in placement.weights}
    states = {id(source): source.state_dict() for source in (rest, *owners.values())}
    chosen: dict[str, Any] = {}
    for key in model.state_dict():
        layer = next((name for name in owners if key.startswith(f"{name}.")), None)
        state = states[id(rest if layer is None else owners[layer])]
        if not key.startswith(f"{ACTIVATION_QUANTIZERS}.") and key in state:
            chosen[key] = state[key]
    model.load_state_dict(chosen, strict=False)
    set_mode(model, Mode.QUANTIZE)
    return model
