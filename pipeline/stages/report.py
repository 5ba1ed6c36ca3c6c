"""The stage `report`: table, curves and detections of a run in one file."""

from __future__ import annotations

from typing import Any

import torch

from core.machine import describe_build, describe_machine, describe_versions
from core.rows import QAT
from core.targets import NMS_OUTPUTS
from deploy import describe_graph
from models import measure_network
from pipeline.gates import missed_gates
from pipeline.job import Job
from pipeline.networks import FLOAT_MODEL
from pipeline.run.commands import changed_settings, flat_configuration, next_commands
from pipeline.run.progress import say
from pipeline.stages.activation import MEASURED
from pipeline.stages.autotune import AUTOTUNE
from pipeline.stages.fixed_point import FIXED_POINT
from pipeline.stages.histograms import layer_histograms
from pipeline.stages.pictures import detection_panels
from pipeline.stages.stage import Stage
from quant import Placement, load_placement
from report import ReportData, write_report

HASH_LENGTH = 64  # hexadecimal digits of SHA-256; facts of the machine are among the hashes


def report_stage(job: Job) -> None:
    """Write report.json, report.md and report.html from the artifacts that are there."""
    run = job.run
    data = ReportData(
        experiment=job.config.experiment,
        weights=job.config.weights,
        image_size=job.config.data.input_size,
        rows=run.rows(),
        versions=describe_versions(),
        build=describe_build(),
        machine={**describe_machine(), "threads": torch.get_num_threads(), **describe_device(job.device)},
        stages=run.stages(),
        curves=[
            {"stage": stage, **record}
            for stage, file in (("train", "train.jsonl"), ("finetune", "qat.jsonl"))
            for record in run.read_lines(file)
        ],
        detections=detection_panels(job),
        class_names=job.networks.detector.names if run.path(FLOAT_MODEL).exists() else (),
        sensitivity=run.read_json("sensitivity.json")["units"]
        if run.path("sensitivity.json").exists()
        else None,
        placement=_placement_items(job),
        calibration=run.read_json("calibration.json").get("convergence")
        if run.path("calibration.json").exists()
        else None,
        model=_model_facts(job),
        graph=_graph(job),
        histograms=layer_histograms(job),
        autotune=_autotune(job),
        activation=run.read_json(MEASURED) if run.path(MEASURED).exists() else None,
        findings=_findings(job),
        fixed_point=job.run.read_json(FIXED_POINT)["tensors"] if job.run.path(FIXED_POINT).exists() else [],
        notes=_notes(job),
        chosen=chosen_rows(job),
        commands=next_commands(job.config, run),
        configuration=flat_configuration(job.config),
        changed=list(changed_settings(job.config)),
        hashes=_hashes(job),
        gates=_missed_gates(job),
    )
    paths = write_report(run.directory, data)
    say(f"report: {paths.html}")


def describe_device(device: torch.device) -> dict[str, str]:
    """Where torch ran."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {"device": str(device), **gpu}


def _placement_items(job: Job) -> list[dict[str, Any]] | None:
    path = job.run.path("placement.yaml")
    if not path.exists():
        return None
    placement: Placement = load_placement(path)
    found = {}
    if job.run.path("calibration.json").exists():
        found = {group["name"]: group for group in job.run.read_json("calibration.json")["groups"]}
    items: list[dict[str, Any]] = []
    for group in placement.groups:
        item = {
            "name": group.name,
            "kind": "activation",
            "bits": group.grid.bits,
            "grid": group.grid.name,
            "tensors": len(group.tensors),
            "layers": list(group.layers),
        }
        if group.name in found:
            item |= {"scale": found[group.name]["scale"], "clipped": found[group.name]["clipped"]}
        items.append(item)
    items += [
        {
            "name": site.layer,
            "kind": "weight",
            "bits": site.grid.bits,
            "grid": site.grid.name,
            "group": site.group,
        }
        for site in placement.weights
    ]
    items += [
        {"name": name, "kind": "float", "reason": reason} for name, reason in placement.kept_float.items()
    ]
    return items


def _model_facts(job: Job) -> dict[str, Any] | None:
    """What the float network costs, layer by layer, and what the placement makes of each layer."""
    if not job.run.path(FLOAT_MODEL).exists():
        return None
    path = job.run.path("placement.yaml")
    grids = _grids(load_placement(path)) if path.exists() else {}
    facts = measure_network(job.networks.detector.network, job.config.data.input_size)
    layers: dict[str, dict[str, Any]] = {}
    shares: dict[str, float] = {}
    for layer in facts.layers:
        precision = grids.get(layer.name, "float")
        shares[precision] = shares.get(precision, 0.0) + layer.macs / facts.macs
        if layer.name in layers:  # it runs several times
            layers[layer.name]["macs"] += layer.macs
            continue
        layers[layer.name] = {
            "name": layer.name,
            "kind": layer.kind,
            "parameters": layer.parameters,
            "macs": layer.macs,
            "output": list(layer.output_shape),
            "precision": precision,
        }
    return {
        "parameters": facts.parameters,
        "macs": facts.macs,
        "strides": list(facts.strides),
        "shares": dict(sorted(shares.items())),
        "layers": list(layers.values()),
    }


def _grids(placement: Placement) -> dict[str, str]:
    """Layers and products of two tensors that are quantized -> name of their grid."""
    of_group = {group.name: group.grid.name for group in placement.groups}
    grids = {site.layer: site.grid.name for site in placement.weights}
    return grids | {site.name: of_group[site.groups[0]] for site in placement.matmuls}


def _graph(job: Job) -> dict[str, Any] | None:
    """The first exported graph, and the groups of the placement."""
    if not job.run.path("export.json").exists():
        return None
    exports = job.run.read_json("export.json")["exports"]
    paths = [job.run.path(export["path"]) for export in exports]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return None
    placement = job.run.path("placement.yaml")
    groups = load_placement(placement).groups if placement.exists() else ()
    return {
        "file": path.name,
        "nodes": describe_graph(path),
        "groups": [
            {
                "name": group.name,
                "tensors": [site.name for site in group.tensors],
                "layers": list(group.layers),
            }
            for group in groups
        ],
    }


def _autotune(job: Job) -> dict[str, Any] | None:
    """What the stage `autotune` found, without the list of all units."""
    if not job.run.path(AUTOTUNE).exists():
        return None
    return {key: value for key, value in job.run.read_json(AUTOTUNE).items() if key != "units"}


def _findings(job: Job) -> list[dict[str, Any]]:
    """What the graph check found in the INT8 files of the export stage."""
    if not job.run.path("export.json").exists():
        return []
    checks = job.run.read_json("export.json")["checks"]
    return [{"file": name, **finding} for name, check in checks.items() for finding in check["findings"]]


def _hashes(job: Job) -> dict[str, str]:
    """SHA-256 of what the stages read and wrote: weights, splits of the data, graphs and engines."""
    found: dict[str, str | None] = {}
    for record in job.run.ledger.records().values():
        reads = {name: value for name, value in record.inputs.reads.items() if " " in name}
        found |= {**reads, **record.outputs}
    wanted = ("split", "file of", ".onnx", ".safetensors", ".engine", ".xml", ".yaml")
    return {
        name: value
        for name, value in found.items()
        if value is not None and len(value) == HASH_LENGTH and any(part in name for part in wanted)
    }


def chosen_rows(job: Job) -> dict[str, str]:
    """Rows whose weights were chosen by the figure that they report, and what to say of them."""
    if job.networks.best_key != QAT or not job.run.path("qat.json").exists():
        return {}
    outcome = job.run.read_json("qat.json")
    if outcome["skipped"] or outcome["select"] != "best":
        return {}
    text = (
        f"The weights ({outcome['kept']}) were chosen on the images that this figure is reported on (qat.select=best), "
        "so it is optimistic. Measure on images that took no part in the choice, or set qat.select=last."
    )
    return {row.name: text for row in job.run.rows() if row.key == QAT or row.key.is_quantized_engine}


def _missed_gates(job: Job) -> list[str] | None:
    if job.config.min_ap is None and job.config.max_ap_drop is None:
        return None
    return missed_gates(job.config, job.run.rows(), job.splits.task)


def _notes(job: Job) -> list[str]:
    splits = job.splits
    opened = {"Validation data": splits.val, "Training data": vars(splits).get("train")}
    notes = [f"{name}: {note}" for name, split in opened.items() for note in getattr(split, "notes", ())]
    notes += splits.notes
    if job.run.path("qat.json").exists():
        notes.append(_fine_tuning_note(job.run.read_json("qat.json")))
    if job.run.path(FIXED_POINT).exists():
        notes.append(f"INT8 graph compared with PyTorch: {job.run.read_json(FIXED_POINT)['sentence']}.")
    for row in job.run.rows():
        hint = row.extras.get("precision_hint", "f32")
        if row.key.is_quantized_engine and hint != "f32":
            notes.append(f"Row {row.name}: the float part runs in {hint} (deploy.int8_hint).")
        if row.extras.get("outputs") in NMS_OUTPUTS:
            notes.append(f"Row {row.name}: NMS in the graph, by the thresholds of deploy.nms.")
    if job.config.metric.factory is not None:
        notes.append(f"Rows are measured by {job.config.metric.factory} (metric), not by COCO AP.")
    if job.config.data.limit_val:
        notes.append(f"Figures are over {job.config.data.limit_val} validation images only (data.limit_val).")
    return notes


def _fine_tuning_note(outcome: dict[str, Any]) -> str:
    """Which weights the row qat shows, or why there is none."""
    if outcome["skipped"]:
        return (
            f"Not fine-tuned: the calibrated model loses {outcome['drop']:.4f} against float, less than the "
            f"{outcome['limit']:g} of qat.skip_if_drop_below."
        )
    how = "the best on the validation images" if outcome["select"] == "best" else "the last"
    return f"Row qat: weights of {outcome['kept']}, {how} of {outcome['epochs']} epochs."


REPORT = Stage("report", report_stage, is_always_run=True)
