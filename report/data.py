"""What a report is made of: plain data, so that this package needs no other.

The pipeline fills these in; nothing here computes a metric or reads a run directory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.errors import ReportError
from core.image_size import ImageSize, SizeLike
from core.rows import ResultRow, engine_key, find_row
from report.panels import DetectionPanel

MODEL_KEYS = ("parameters", "macs", "strides", "shares", "layers")
AUTOTUNE_KEYS = ("latency", "subject", "front", "confirmed")
ACTIVATION_KEYS = ("measure", "subject", "batch", "max_loss", "min_time_saved", "candidates")
CANDIDATE_KEYS = ("activation", "ap", "milliseconds", "is_chosen")
POINT_KEYS = ("milliseconds", "estimated_ap_loss", "units")
PLAN_KEYS = (
    "name", "units", "expected_milliseconds", "milliseconds", "estimated_ap_loss", "measured_ap_loss", "ap",
)  # fmt: skip
LAYER_KEYS = ("name", "kind", "parameters", "macs", "output", "precision")
GRAPH_KEYS = ("file", "nodes", "groups")
NODE_KEYS = ("name", "operator", "precision", "sources")
GROUP_KEYS = ("name", "tensors", "layers")
HISTOGRAM_PARTS = ("weights", "inputs")
COMMAND_KEYS = ("title", "command")


@dataclass
class ReportData:
    """Everything that `write_report` shows.

    Attributes:
        experiment: name of the experiment.
        weights: where the float weights came from, None when trained in the run.
        image_size: of the network's input, pixels: one number for a square, or (height, width).
        rows: the result table, in the order to be shown; the row "float" is what others are compared with.
        versions: package -> version.
        build: of Octet: property -> value, such as its version and commit.
        machine: property -> value.
        stages: [{"name": str, "seconds": float}], in the order they ran.
        curves: training records; "step" is required, "stage", "epoch" and "learning_rate" are known, every
            other number is drawn: names that begin with "ap" or "validation" as validation results, with "share_"
            as shares of the weights, the rest as loss terms.
        detections: pictures side by side, the most interesting first.
        class_names: by class index of the detections.
        sensitivity: [{"unit": str, "score": float, ...}], any order; None where the stage did not run.
        placement: [{"name": str, "kind": "activation" | "weight" | "float", ...}]; "scale" is drawn where given.
        calibration: how scales settle: {"images": [int], "largest": [float], "median": [float]}, the relative
            distances of all scales from the final ones at each image count; None where nothing was calibrated.
        model: facts about the network at `image_size`: {"parameters": int, "macs": int (multiply-accumulates for one
            image), "strides": [int], "shares": precision -> share of the MACs, 0..1, "layers": [{"name", "kind",
            "parameters", "macs", "output", "precision"}] in the order they run}; None where nobody measured it.
        graph: the exported graph: {"file": name, "nodes": [{"name", "operator", "precision", "sources" (positions),
            "output" (shape)}] in topological order, "groups": [{"name", "tensors", "layers"}] of one scale each}; None
            where nothing was exported.
        histograms: of the worst layers: [{"layer": str, "weights": part, "inputs": part}]; a part is {"grid": name,
            "low", "high": first and last code, "edges": of the bins, in steps of the scale, "before", "after": share of
            the values in each bin, calibrated and fine-tuned; either may be absent}.
        autotune: plans of which some units are quantized: {"latency": "estimated" | "measured", "subject": str,
            "front": [{"milliseconds", "estimated_ap_loss", "units": precision -> count}], "confirmed": [the same of
            plans that were built again, with "name", "expected_milliseconds", "measured_ap_loss", "ap", "is_chosen",
            "layers" and "layers_not_as_planned"]}; None where the stage did not run.
        activation: what was measured to choose one: {"measure": str, "subject": str, "batch": int, "max_loss": in the
            measure, "min_time_saved": share, "candidates": [{"activation", "ap", "milliseconds", "is_chosen"}], SiLU
            first}; None where nobody measured it.
        findings: of the graph check: [{"name", "hazard", "remedy", ...}].
        notes: sentences for the reader.
        chosen: row name -> what to add to its accuracy where its weights were chosen on the evaluation images.
        commands: what to do next: [{"title": str, "command": str, "remark": str}].
        configuration: setting -> value, by dotted key.
        changed: those settings that are not at their defaults.
        hashes: SHA-256 by what was hashed: weights, splits of the data, graphs.
        gates: what the run misses of the limits that the user set, in sentences; None where no limit was set.
    """

    experiment: str
    weights: str | None
    image_size: SizeLike
    rows: Sequence[ResultRow]
    versions: Mapping[str, str] = field(default_factory=dict)
    build: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    stages: Sequence[Mapping[str, Any]] = ()
    curves: Sequence[Mapping[str, Any]] = ()
    detections: Sequence[DetectionPanel] = ()
    class_names: Sequence[str] = ()
    sensitivity: Sequence[Mapping[str, Any]] | None = None
    placement: Sequence[Mapping[str, Any]] | None = None
    calibration: Mapping[str, Any] | None = None
    model: Mapping[str, Any] | None = None
    graph: Mapping[str, Any] | None = None
    histograms: Sequence[Mapping[str, Any]] = ()
    autotune: Mapping[str, Any] | None = None
    activation: Mapping[str, Any] | None = None
    findings: Sequence[Mapping[str, Any]] = ()
    fixed_point: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    chosen: Mapping[str, str] = field(default_factory=dict)
    commands: Sequence[Mapping[str, str]] = ()
    configuration: Mapping[str, Any] = field(default_factory=dict)
    changed: Sequence[str] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
    gates: Sequence[str] | None = None

    @property
    def input_size(self) -> ImageSize:
        """Height and width of the network's input."""
        return ImageSize.of(self.image_size)

    def check(self) -> None:
        """Raise ReportError where the data cannot be shown."""
        names = [row.name for row in self.rows]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ReportError(f"rows named {', '.join(repeated)} appear twice: expected one row per name.")
        for kind, items, keys in (
            ("stage", self.stages, ("name", "seconds")),
            ("curve record", self.curves, ("step",)),
            ("sensitivity item", self.sensitivity or (), ("unit", "score")),
            ("placement item", self.placement or (), ("name", "kind")),
            ("autotune", (self.autotune,) if self.autotune is not None else (), AUTOTUNE_KEYS),
            ("activation", (self.activation,) if self.activation is not None else (), ACTIVATION_KEYS),
            ("candidate", (self.activation or {}).get("candidates", ()), CANDIDATE_KEYS),
            ("front point", (self.autotune or {}).get("front", ()), POINT_KEYS),
            ("plan", (self.autotune or {}).get("confirmed", ()), PLAN_KEYS),
            ("finding", self.findings, ("name", "hazard", "remedy")),
            ("model", (self.model,) if self.model is not None else (), MODEL_KEYS),
            ("layer", (self.model or {}).get("layers", ()), LAYER_KEYS),
            ("graph", (self.graph,) if self.graph is not None else (), GRAPH_KEYS),
            ("graph node", (self.graph or {}).get("nodes", ()), NODE_KEYS),
            ("graph group", (self.graph or {}).get("groups", ()), GROUP_KEYS),
            ("histogram", self.histograms, ("layer", *HISTOGRAM_PARTS)),
            (
                "histogram part",
                [item[part] for item in self.histograms for part in HISTOGRAM_PARTS if part in item],
                ("grid", "low", "high", "edges"),
            ),
            ("command", self.commands, COMMAND_KEYS),
            ("fixed-point item", self.fixed_point, ("name", "values", "differing", "largest_step")),
        ):
            for item in items:
                missing = [key for key in keys if key not in item]
                if missing:
                    raise ReportError(
                        f"{kind} {dict(item)} lacks {', '.join(missing)}: expected {', '.join(keys)}."
                    )
        for panel in self.detections:
            panel.check(len(self.class_names))


def reference_engine(rows: Sequence[ResultRow], row: ResultRow) -> ResultRow | None:
    """Return the float engine that an engine row's latency is compared with: FP32 of the same runtime, else FP16."""
    runtime = row.key.runtime
    if runtime is None or row.key.precision in ("f32", "fp32"):
        return None
    for precision in ("f32", "fp32", "f16", "fp16", "bf16"):
        found = find_row(rows, engine_key(runtime, precision))
        if found is not None and found is not row:
            return found
    return None
