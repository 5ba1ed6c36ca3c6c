"""Histograms of the report: weights and inputs of the worst layers on their grids, before and after fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from core.grid import Grid
from core.rows import PTQ, QAT
from pipeline.job import Job
from pipeline.networks import QUANTIZED
from quant import FakeQuantize, activation_quantizers, placement_of, quantized_layers

NUM_LAYERS = 4
NUM_IMAGES, BATCH = 8, 4  # validation images for the inputs
NUM_BINS = 80
BEYOND = 1.25  # the axis goes this far beyond the grid; what lies further out counts at its ends
BEFORE, AFTER = "before", "after"

Counts = NDArray[np.int64]


def layer_histograms(job: Job) -> list[dict[str, Any]]:
    """One entry per layer, see `report.data.ReportData.histograms`; none where nothing was calibrated."""
    if not job.run.path(QUANTIZED[PTQ]).exists():
        return []
    keys = [job.networks.calibrated_key, *([QAT] if job.run.path(QUANTIZED[QAT]).exists() else [])]
    found: list[dict[str, Any]] = []
    for key, label in zip(keys, (BEFORE, AFTER), strict=False):
        model = job.networks.load(key).eval()
        found = found or _entries(job, model)
        _add_weights(model, found, label)
        _add_inputs(job, model, found, label)
    return found


def _entries(job: Job, model: fx.GraphModule) -> list[dict[str, Any]]:
    """The layers of the most sensitive units; without a ranking those whose weights lose most in rounding."""
    layers, groups = quantized_layers(model), activation_quantizers(model)
    sites = {site.layer: site for site in placement_of(model).weights if site.layer in layers}
    if job.run.path("sensitivity.json").exists():
        units = [item["unit"] for item in job.run.read_json("sensitivity.json")["units"]]
        ranked = [layer for unit in units for layer, site in sites.items() if site.group == unit]
    else:
        ranked = sorted(sites, key=lambda name: -_rounding_error(layers[name]))
    chosen = [name for name in ranked if sites[name].group in groups][:NUM_LAYERS]
    inputs = {
        sites[layer].group: _axis(groups[sites[layer].group].grid) for layer in chosen
    }  # layers may share one
    return [
        {
            "layer": layer,
            "group": sites[layer].group,
            "weights": _axis(sites[layer].grid),
            "inputs": inputs[sites[layer].group],
        }
        for layer in chosen
    ]


def _rounding_error(layer: Any) -> float:
    """Squared error of the quantized weights over their squares."""
    weight = layer.weight.detach()
    with torch.no_grad():
        error = layer.weight_quantizer(weight) - weight
    return float(error.square().sum() / weight.square().sum().clamp_min(1e-30))


def _axis(grid: Grid) -> dict[str, Any]:
    low, high = float(grid.low), float(grid.high)
    edges = np.linspace(min(BEYOND * low, -0.05 * high), BEYOND * high, NUM_BINS + 1)
    return {"grid": grid.name, "low": low, "high": high, "edges": edges.round(3).tolist()}


def _add_weights(model: fx.GraphModule, entries: list[dict[str, Any]], label: str) -> None:
    layers = quantized_layers(model)
    for entry in entries:
        layer = layers.get(entry["layer"])
        if layer is not None:
            weight = layer.weight.detach()
            steps = layer.weight_quantizer.steps(weight.ndim).detach()
            entry["weights"][label] = _shares(_count(weight / steps, entry["weights"]))


def _add_inputs(job: Job, model: fx.GraphModule, entries: list[dict[str, Any]], label: str) -> None:
    quantizers = activation_quantizers(model)
    axes = {entry["group"]: entry["inputs"] for entry in entries if entry["group"] in quantizers}
    counts: dict[str, Counts] = {group: np.zeros(NUM_BINS, np.int64) for group in axes}

    def watch(group: str) -> Callable[..., None]:
        def hook(quantizer: FakeQuantize, arguments: tuple[Tensor, ...]) -> None:
            counts[group] += _count(arguments[0].detach() / quantizer.scale.detach(), axes[group])

        return hook

    handles = [quantizers[group].register_forward_pre_hook(watch(group)) for group in axes]
    try:
        for batch in job.splits.letterboxed(job.splits.val, BATCH, NUM_IMAGES):
            with torch.inference_mode():
                model(batch.images.to(job.device).float() / 255)
    finally:
        for handle in handles:
            handle.remove()
    for group, axis in axes.items():
        axis[label] = _shares(counts[group])


def _count(values: Tensor, axis: dict[str, Any]) -> Counts:
    """Number of values in each bin, in steps of the grid; those beyond the axis in its end bins."""
    edges = axis["edges"]
    flat = values.float().flatten().clamp(edges[0], edges[-1])
    return torch.histc(flat.cpu(), NUM_BINS, edges[0], edges[-1]).numpy().astype(np.int64)


def _shares(counts: Counts) -> list[float]:
    return (counts / max(int(counts.sum()), 1)).round(8).tolist()
