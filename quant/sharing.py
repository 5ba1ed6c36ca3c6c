"""Which concats keep one shared scale: decided by what the shared scale costs, measured on images.

One scale over a concat saves an engine every requantization there, but the finest of its inputs then gets the
coarsest grid. Whether that matters can only be seen at the outputs. So for each concat the quantized network runs once
with the scale shared and once with it split, everything else alike, and the shared scale stays unless

    error(shared) > (1 + tolerance) * error(split),

error being the unexplained variance of the float network's output maps (`distillation_loss`). Splits are confirmed one
after the other, the most gainful first, on top of those already made: two concats of one group often gain the same.

All candidates are calibrated from one pass over the data: histograms are kept per tensor, and those of a group's
members add up exactly.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from quant.calibration.calibrate import apply_histograms, calibrate_weights, collect_histograms
from quant.calibration.observers import Histogram
from quant.fake_quantize import Mode
from quant.finetuning.distillation import distillation_loss
from quant.graph import trace
from quant.insertion import insert, quantized_layers, set_mode
from quant.placement.placement import Group, Placement, TensorSite
from quant.placement.placer import PlacementOptions, place
from quant.placement.policy import Policy, Rule


@dataclass(frozen=True)
class ConcatDecision:
    """What was decided for one concat, and why.

    Attributes:
        concat: its name.
        shared: whether its inputs keep one scale.
        error_shared: output error with the scale shared, the splits confirmed before this one in place.
        error_split: output error with the scale split as well.
    """

    concat: str
    shared: bool
    error_shared: float
    error_split: float

    @property
    def cost(self) -> float:
        """What sharing costs: error(shared) / error(split) - 1."""
        return self.error_shared / max(self.error_split, 1e-30) - 1


@dataclass(frozen=True)
class SharingResult:
    """The decided placement, the decisions in graph order, and the output error of three placements."""

    placement: Placement
    decisions: tuple[ConcatDecision, ...]
    tolerance: float
    error_all_shared: float
    error_decided: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {
            "tolerance": self.tolerance,
            "error_all_shared": self.error_all_shared,
            "error_decided": self.error_decided,
            "concats": [{**asdict(decision), "cost": decision.cost} for decision in self.decisions],
        }


def measure_sharing(
    network: nn.Module,
    options: PlacementOptions,
    rules: tuple[Rule, ...],
    batches: Iterable[Tensor],
    compared: Sequence[Tensor],
    method: str = "mse",
    weight_method: str = "mse",
    percentile: float = 99.99,
    tolerance: float = 0.1,
) -> SharingResult:
    """Decide for each concat whether its inputs keep one scale; concats that a policy rule decides are left to it.

    Args:
        network: as for `place`.
        options: as for `place`; `share_concat_scales` is ignored.
        rules: policy rules.
        batches: calibration images [B, C, H, W], read once.
        compared: images on which the outputs are compared, as batches; read once per candidate placement.
        method: calibration method of activations, `percentile` in percent.
        weight_method: calibration method of weights.
        percentile: for the percentile method.
        tolerance: relative rise of the output error that one shared scale may cost.

    Returns:
        The placement, which is that of `place` with `share: false` rules for the split concats, and its decisions.
    """
    trial = _Trial(network, replace(options, share_concat_scales=True), rules)
    trial.prepare(batches, compared, weight_method, method, percentile)
    decided = Policy(rules)
    open_concats = [
        name
        for name, shared in trial.placement(()).concats.items()
        if shared and decided.lookup("share", [name]) is None
    ]
    all_shared = current = trial.error(())
    alone = {concat: trial.error((concat,)) for concat in open_concats}
    splits: tuple[str, ...] = ()
    found: dict[str, ConcatDecision] = {}
    for concat in sorted(open_concats, key=lambda name: alone[name]):
        error = trial.error((*splits, concat)) if splits else alone[concat]
        if (
            alone[concat] * (1 + tolerance) >= all_shared
        ):  # gains too little by itself: not tried on top of others
            found[concat] = ConcatDecision(concat, True, all_shared, alone[concat])
            continue
        split = current > (1 + tolerance) * error
        found[concat] = ConcatDecision(concat, not split, current, error)
        if split:
            splits, current = (*splits, concat), error
    decisions = tuple(found[concat] for concat in open_concats)
    return SharingResult(trial.placement(splits), decisions, tolerance, all_shared, current)


class _Trial:
    """Candidate placements of one network, all calibrated from the same histograms and compared on the same images."""

    def __init__(self, network: nn.Module, options: PlacementOptions, rules: tuple[Rule, ...]) -> None:
        self.network = trace(network)
        self.options = options
        self.rules = rules
        self.placements: dict[tuple[str, ...], Placement] = {}

    def placement(self, splits: Sequence[str]) -> Placement:
        """The placement with these concats split and all others shared."""
        key = tuple(splits)
        if key not in self.placements:
            extra = tuple(Rule(glob.escape(name), share=False) for name in splits)
            self.placements[key] = place(self.network, self.options, (*self.rules, *extra))
        return self.placements[key]

    def prepare(
        self,
        batches: Iterable[Tensor],
        compared: Sequence[Tensor],
        weight_method: str,
        method: str,
        percentile: float,
    ) -> None:
        """Count every tensor that any placement quantizes, choose the weight scales, and keep the float outputs.

        A placement with several splits quantizes no tensor that no single split quantizes: a concat is quantized where
        a reader reaches it, which the splits of others can only prevent.
        """
        base = self.placement(())
        placements = [base, *(self.placement((concat,)) for concat in base.concats)]
        sites = {
            site.node: site
            for placement in placements
            for group in placement.groups
            for site in group.tensors
        }
        groups = tuple(Group(node, (TensorSite(node, node, site.users),), ()) for node, site in sites.items())
        observed = insert(self.network, Placement(groups, base.weights)).eval()
        self.histograms, self.num_images = collect_histograms(observed, batches)
        calibrate_weights(observed, weight_method)
        self.weights = {
            name: layer.weight_quantizer.state_dict() for name, layer in quantized_layers(observed).items()
        }
        self.method, self.percentile = method, percentile
        self.compared = compared
        set_mode(observed, Mode.OFF)
        with torch.no_grad():
            self.references = [observed(images) for images in compared]

    def error(self, splits: Sequence[str]) -> float:
        """Output error of the calibrated placement, the mean over the compared batches."""
        model = self._calibrated(self.placement(splits))
        with torch.no_grad():
            errors = [
                float(distillation_loss(model(images), reference))
                for images, reference in zip(self.compared, self.references, strict=True)
            ]
        return sum(errors) / len(errors)

    def _calibrated(self, placement: Placement) -> fx.GraphModule:
        device = self.compared[0].device
        model = insert(self.network, placement, learn_scales=False).to(device).eval()
        for name, layer in quantized_layers(model).items():
            layer.weight_quantizer.load_state_dict(self.weights[name])
        merged = {}
        for group in placement.groups:
            merged[group.name] = Histogram()
            for site in group.tensors:
                merged[group.name].merge(self.histograms[site.node])
        apply_histograms(model, merged, self.method, self.percentile, self.num_images)
        set_mode(model, Mode.QUANTIZE)
        return model
