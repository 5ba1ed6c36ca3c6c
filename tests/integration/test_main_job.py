"""The main job, small but real: every stage, every artifact, resume, export for every target."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from main_job import TINY, run_entry

from core.files import hash_file
from models import load_detector
from tests.browser.chromium import check_report

ROW_KEYS = {
    "name",
    "kind",
    "runtime",
    "engine_precision",
    "ap",
    "ap50",
    "precision",
    "recall",
    "latency_ms_median",
    "latency_ms_p99",
    "images_per_second",
    "size_bytes",
}
STAGES = ["train", "float", "place", "calibrate", "sensitivity", "finetune", "export", "engine", "report"]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working folder in which the tiny main job has run once."""
    folder = tmp_path_factory.mktemp("job")
    outcome = run_entry("train_qat.py", *TINY, cwd=folder)
    assert outcome.code == 0, outcome.err
    assert "engine:openvino:int8" in outcome.out
    return folder


def test_report_holds_every_row_and_stage(finished_run: Path) -> None:
    report = json.loads((finished_run / "runs/demo/latest/report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["float", "ptq", "qat", "engine:openvino:int8", "engine:openvino:fp32"]
    for name, row in rows.items():
        assert set(row) >= ROW_KEYS
        assert 0 <= row["ap"] <= row["ap50"] <= 1
        is_engine = name.startswith("engine:")
        assert (row["latency_ms_median"] is not None) == is_engine
        assert (row["size_bytes"] is not None) == is_engine
        point = row["operating_point"]
        assert point["confidence"] == 0.25
        assert (point["overall"]["agreement"] is None) == (name == "float")
    assert rows["engine:openvino:int8"]["size_bytes"] < rows["engine:openvino:fp32"]["size_bytes"]
    agreement = rows["engine:openvino:fp32"]["operating_point"]["overall"]["agreement"]
    assert agreement["drop_in"] in ((True,) if agreement["reference"] else (None,))
    assert [stage["name"] for stage in report["stages"]] == STAGES[:-1]
    assert all(stage["seconds"] > 0 for stage in report["stages"])
    assert report["image_size"] == 96
    assert report["versions"]["torch"]
    assert report["machine"]["processor"]


def test_the_report_draws_every_chart(finished_run: Path, tmp_path: Path) -> None:
    layers = [f"{kind}-{number}" for kind in ("weights", "inputs") for number in range(4)]
    assert check_report(finished_run / "runs/demo/latest/report.html", tmp_path / "profile") == {
        "accuracy", "f1", "loss-0", "gradient-0", "rate-0", "loss-1", "gradient-1", "ap-1", "share-1", "rate-1",
        "sensitivity", *layers, "placement", "stages",
    }  # fmt: skip


def test_the_report_has_what_its_figures_need(finished_run: Path) -> None:
    report = json.loads((finished_run / "runs/demo/latest/report.json").read_text())
    assert all(len(row["draws"]) == 1000 for row in report["rows"])
    assert all(set(item["weights"]) >= {"before", "after"} for item in report["histograms"])
    assert sum(report["histograms"][0]["inputs"]["after"]) == pytest.approx(1, abs=1e-4)
    assert len(report["graph"]["nodes"]) > 300
    written = {tensor for group in report["graph"]["groups"] for tensor in group["tensors"]}
    assert len(written & {node["name"] for node in report["graph"]["nodes"]}) > 100
    assert [view["name"] for view in report["detections"][0]["views"]][:2] == [
        "ground truth",
        "float (torch)",
    ]
    assert "openvino" in report["detections"][0]["views"][2]["name"]
    assert report["hashes"]["model.onnx"] == hash_file(finished_run / "runs/demo/latest/model.onnx")
    assert report["configuration"]["train.epochs"] == 1
    assert "train.epochs" in report["changed"]
    assert "chosen on the images" in report["chosen"]["qat"]
    assert report["gates"] is None


def test_report_says_what_the_model_costs_and_what_of_it_is_int8(finished_run: Path) -> None:
    model = json.loads((finished_run / "runs/demo/latest/report.json").read_text())["model"]
    network = load_detector(finished_run / "runs/demo/latest/float.safetensors").network
    assert model["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert model["strides"] == [8, 16, 32]
    layers = {layer["name"]: layer for layer in model["layers"]}
    assert len(layers) == 185
    stem = layers["backbone.stem1.conv"]
    assert (stem["macs"], stem["output"], stem["precision"]) == (16 * 3 * 9 * 48 * 48, [16, 48, 48], "INT8")
    floating = {name for name, layer in layers.items() if layer["precision"] == "float"}
    assert floating == {f"head.{branch}.{level}.output" for branch in ("box", "cls") for level in range(3)}
    assert sum(layer["macs"] for layer in layers.values()) == model["macs"]
    share = sum(layers[name]["macs"] for name in floating) / model["macs"]
    assert model["shares"] == pytest.approx({"INT8": 1 - share, "float": share})


def test_engines_agree_with_torch_on_real_outputs(finished_run: Path) -> None:
    run = finished_run / "runs/demo/latest"
    parity = json.loads((run / "engines/parity.json").read_text())
    assert parity["engine:openvino:fp32"]["score_max"] < 1e-3
    assert parity["engine:openvino:fp32"]["box_max_px"] < 0.05
    assert parity["engine:openvino:int8"]["score_mean"] < 0.01
    assert parity["engine:openvino:int8"]["box_mean_px"] < 0.5
    export = json.loads((run / "export.json").read_text())
    assert export["parity"]["model.onnx"]["box_mean_px"] < 0.5
    assert export["checks"]["model.onnx"]["findings"] == []


def test_artifacts_are_complete_and_nothing_is_left_half_written(finished_run: Path) -> None:
    run = finished_run / "runs/demo/latest"
    expected = {"config.yaml", "state.json", "float.safetensors", "placement.yaml", "calibration.json"}
    expected |= {"ptq.safetensors", "qat.safetensors", "qat.jsonl", "train.jsonl", "sensitivity.json"}
    expected |= {"model.onnx", "float.onnx", "report.html", "report.md", "report.json"}
    names = {path.name for path in run.iterdir()}
    assert expected <= names
    leftovers = [p for p in run.rglob("*") if p.name.startswith(".") or "partial" in p.name]
    assert not leftovers
    assert not list(run.rglob("*-state/*"))


def test_losses_are_logged_term_by_term(finished_run: Path) -> None:
    lines = (finished_run / "runs/demo/latest/qat.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 2 * (24 // 8)
    assert all({"box", "cls", "dfl", "distillation", "total"} <= set(record) for record in records)
    for record in records:
        terms = record["box"] + record["cls"] + record["dfl"] + record["distillation"]
        assert record["total"] == pytest.approx(terms, rel=1e-4)


def test_resume_skips_what_is_done(finished_run: Path) -> None:
    before = (finished_run / "runs/demo/latest/qat.safetensors").stat().st_mtime_ns
    outcome = run_entry("train_qat.py", *TINY, "resume=true", cwd=finished_run)
    assert outcome.code == 0, outcome.err
    assert "finetune: done before" in outcome.err
    assert (finished_run / "runs/demo/latest/qat.safetensors").stat().st_mtime_ns == before


def test_resume_with_another_target_exports_and_times_its_graph(finished_run: Path, tmp_path: Path) -> None:
    """A run that is resumed for ONNX Runtime must not time the graph that was written for OpenVINO."""
    run = tmp_path / "run"
    shutil.copytree((finished_run / "runs/demo/latest").resolve(), run)
    trained = (run / "qat.safetensors").read_bytes()
    resumed = (*TINY, f"run_dir={run}", "resume=true", "deploy=onnxruntime")
    outcome = run_entry("train_qat.py", *resumed, cwd=finished_run)
    assert outcome.code == 0, outcome.err
    assert "--- export again: deploy.target is onnxruntime, was openvino" in outcome.err
    assert "finetune: done before" in outcome.err
    assert (run / "qat.safetensors").read_bytes() == trained
    metadata = {entry.key: entry.value for entry in onnx.load(run / "model.onnx").metadata_props}
    assert metadata["octet.target"] == "onnxruntime"
    rows = {path.stem for path in (run / "rows").iterdir()}
    assert rows == {"float", "ptq", "qat", "engine-onnxruntime-int8", "engine-onnxruntime-fp32"}


def test_resume_with_another_observer_calibrates_again_and_what_follows(
    finished_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree((finished_run / "runs/demo/latest").resolve(), run)
    arguments = (*TINY, f"run_dir={run}", "resume=true", "quant.observer=minmax")
    refused = run_entry("train_qat.py", *arguments, "stages=[finetune]", cwd=finished_run)
    assert refused.code == 2
    assert "quant.observer is minmax, was mse" in refused.err
    outcome = run_entry("train_qat.py", *arguments, "stages=[calibrate,sensitivity]", cwd=finished_run)
    assert outcome.code == 0, outcome.err
    assert "calibrate again: quant.observer is minmax, was mse" in outcome.err
    assert "sensitivity again: ptq.safetensors has changed" in outcome.err
    assert "place: done before" in outcome.err
    groups = json.loads((run / "calibration.json").read_text())["groups"]
    assert {group["method"] for group in groups} == {"minmax"}


def test_an_accuracy_budget_brings_its_stages_along(finished_run: Path, tmp_path: Path) -> None:
    """The default stages have no `sensitivity`; the budget must be kept all the same."""
    run = tmp_path / "run"
    shutil.copytree((finished_run / "runs/demo/latest").resolve(), run)
    arguments = (*TINY, f"run_dir={run}", "resume=true", "stages=[calibrate,export]")
    outcome = run_entry("train_qat.py", *arguments, "quant.accuracy_budget=0.5", cwd=finished_run)
    assert outcome.code == 0, outcome.err
    assert "--- sensitivity again: quant.accuracy_budget is 0.5, was none" in outcome.err
    assert json.loads((run / "budget.json").read_text())["met"] is True


def test_runs_of_an_older_version_are_refused_and_kept(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree((finished_run / "runs/demo/latest").resolve(), run)
    (run / "state.json").write_text('[{"name": "float", "seconds": 1.0}]')
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    outcome = run_entry("train_qat.py", *TINY, f"run_dir={run}", "resume=true", cwd=finished_run)
    assert outcome.code == 2
    assert "another version of Octet" in outcome.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_weights_are_needed_unless_they_are_trained(tmp_path: Path) -> None:
    arguments = [argument for argument in TINY if not argument.startswith("train.")]
    outcome = run_entry("train_qat.py", *arguments, "stages=[float,calibrate]", cwd=tmp_path)
    assert outcome.code == 2
    assert "weights is not set and `train` is not among the stages" in outcome.err
    assert not (tmp_path / "runs/demo").exists()


@pytest.mark.parametrize("target", ["openvino", "onnxruntime", "trt10", "trt11"])
def test_export_writes_every_target(finished_run: Path, target: str) -> None:
    outcome = run_entry("export.py", "run=runs/demo/latest", f"target={target}", cwd=finished_run)
    assert outcome.code == 0, outcome.err
    path = finished_run / outcome.out.strip().splitlines()[-1]
    model = onnx.load(path)
    assert [value.name for value in model.graph.input] == ["images"]
    assert [value.name for value in model.graph.output] == ["output0"]
    types = [node.op_type for node in model.graph.node]
    assert types.count("QuantizeLinear") >= 100
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    kernels = [value for value in constants.values() if value.dtype == np.int8 and value.ndim == 4]
    # ONNX Runtime's graph has yolov9t's five average-pools as depthwise convolutions
    assert len(kernels) == 179 + 5 * (target == "onnxruntime")
    assert min(int(kernel.min()) for kernel in kernels) >= -127
    quantizers = [node for node in model.graph.node if node.op_type in {"QuantizeLinear", "DequantizeLinear"}]
    scales = [constants[node.input[1]].astype(np.float32) for node in quantizers]
    assert all(np.isfinite(scale).all() and (scale > 0).all() for scale in scales)


def test_missed_gate_exits_4_with_the_report_written(tmp_path: Path, finished_run: Path) -> None:
    outcome = run_entry("train_qat.py", *TINY, "resume=true", "min_ap=0.999", cwd=finished_run)
    assert outcome.code == 4
    assert "min_ap=0.999" in outcome.err
    page = finished_run / "runs/demo/latest/report.html"
    assert "below min_ap=0.999" in page.read_text(encoding="utf-8")
    assert check_report(page, tmp_path / "profile") >= {"accuracy", "f1", "loss-0", "loss-1", "sensitivity"}


def test_sweep_ends_with_a_table_over_its_jobs(finished_run: Path) -> None:
    arguments = [*TINY, "stages=[train,calibrate]", "quant.observer=minmax,entropy"]
    outcome = run_entry("train_qat.py", "-m", *arguments, cwd=finished_run)
    assert outcome.code == 0, outcome.err
    table = outcome.out.strip().splitlines()[-2:]
    assert [line.split()[0] for line in table] == ["quant.observer=minmax", "quant.observer=entropy"]
    (sweep,) = (finished_run / "runs/demo/multirun").glob("*/sweep.json")
    records = json.loads(sweep.read_text())
    assert [record["directory"] for record in records] == ["0", "1"]
    assert all(set(record["ap"]) == {"ptq"} for record in records)
