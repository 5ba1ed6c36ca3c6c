"""A network, a dataset and a metric that Octet does not know go through the whole job, as a user brings them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
from main_job import REPOSITORY, TINY, run_entry
from safetensors.torch import load_file

from tests.browser.chromium import check_report

SSDLITE = ("model=custom", "model.factory=examples.ssdlite:build")
ROWS = ["float", "ptq", "qat", "engine:openvino:int8", "engine:openvino:fp32"]

UNTRACEABLE = """
import torch
from torch import nn
from pipeline import CustomDetector

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, images):
        x = self.conv(images)
        if x.mean() > 0:  # line 13
            x = -x
        return x

def build(names):
    return CustomDetector(Network(), strides=(8,))
"""


def rows_of(run: Path) -> dict[str, Any]:
    report = json.loads((run / "report.json").read_text())
    return {row["name"]: row for row in report["rows"]}


@pytest.fixture(scope="module")
def ssdlite_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working folder in which torchvision's SSDlite has gone through the tiny main job."""
    folder = tmp_path_factory.mktemp("ssdlite")
    outcome = run_entry("train_qat.py", *TINY, *SSDLITE, cwd=folder, timeout=500)
    assert outcome.code == 0, outcome.err
    return folder


@pytest.mark.slow
def test_a_detector_of_torchvision_becomes_an_int8_engine(ssdlite_run: Path) -> None:
    run = ssdlite_run / "runs/demo/latest"
    rows = rows_of(run)
    assert list(rows) == ROWS
    assert all(0 <= row["ap"] <= row["ap50"] <= 1 for row in rows.values())
    assert rows["engine:openvino:int8"]["size_bytes"] < 0.6 * rows["engine:openvino:fp32"]["size_bytes"]
    parity = json.loads((run / "engines/parity.json").read_text())
    assert parity["engine:openvino:fp32"]["score_max"] < 1e-4
    assert parity["engine:openvino:int8"]["score_max"] < 0.05
    assert parity["engine:openvino:int8"]["box_mean_px"] < 1.0
    losses = [json.loads(line) for line in (run / "qat.jsonl").read_text().splitlines()]
    assert all({"bbox_regression", "classification", "distillation"} <= set(record) for record in losses)


@pytest.mark.slow
def test_the_retinanet_experiment_runs_with_one_head_on_three_levels(tmp_path: Path) -> None:
    outcome = run_entry("train_qat.py", "+experiment=retinanet", *TINY[1:], cwd=tmp_path, timeout=500)
    assert outcome.code == 0, outcome.err
    run = tmp_path / "runs/retinanet/latest"
    assert list(rows_of(run)) == ROWS
    model = json.loads((run / "report.json").read_text())["model"]
    layers = {layer["name"]: layer for layer in model["layers"]}
    assert model["strides"] == [8, 16, 32]
    head = layers["head.classification_head.conv.0.0"]
    assert head["macs"] == 48 * 48 * 9 * (12**2 + 6**2 + 3**2), "once for each level"
    assert head["precision"] == "INT8"
    floating = {name for name, layer in layers.items() if layer["precision"] == "float"}
    assert floating == {"head.classification_head.cls_logits", "head.regression_head.bbox_reg"}
    parity = json.loads((run / "engines/parity.json").read_text())
    assert parity["engine:openvino:fp32"]["score_max"] < 1e-4


@pytest.mark.slow
def test_the_graph_is_quantized_where_it_should_be(ssdlite_run: Path) -> None:
    model = onnx.load(ssdlite_run / "runs/demo/latest/model.onnx")
    kernels = [
        t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4
    ]
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert (
        len(convolutions) - len(kernels) == 12
    )  # the last convolution of each of six levels, boxes and classes
    assert not [node for node in model.graph.node if node.op_type == "BatchNormalization"]


@pytest.mark.slow
def test_weights_of_a_run_start_another_and_wrong_ones_are_refused(ssdlite_run: Path) -> None:
    weights = ssdlite_run / "runs/demo/latest/float.safetensors"
    arguments = (*TINY, *SSDLITE, f"weights={weights}", "stages=[float]")
    outcome = run_entry("train_qat.py", *arguments, "run_dir=again", cwd=ssdlite_run)
    assert outcome.code == 0, outcome.err
    again = json.loads((ssdlite_run / "again/rows/float.json").read_text())
    assert again["ap"] == pytest.approx(rows_of(ssdlite_run / "runs/demo/latest")["float"]["ap"], abs=1e-6)
    kept, copied = load_file(weights), load_file(ssdlite_run / "again/float.safetensors")
    assert "backbone.features.0.0.1.running_mean" in kept, "the user's own names, not folded"
    assert all(kept[key].equal(copied[key]) for key in kept)
    (ssdlite_run / "bad.safetensors").write_bytes(weights.read_bytes()[:-8])
    bad = ("weights=bad.safetensors", "run_dir=refused")
    outcome = run_entry("train_qat.py", *TINY, *SSDLITE, *bad, cwd=ssdlite_run)
    assert outcome.code == 3
    assert "bad.safetensors" in outcome.err


@pytest.mark.slow
def test_a_run_is_exported_again(ssdlite_run: Path) -> None:
    outcome = run_entry("export.py", "run=runs/demo/latest", "target=trt10", "trust=true", cwd=ssdlite_run)
    assert outcome.code == 0, outcome.err
    assert Path(outcome.out.strip().splitlines()[-1]).is_file()


@pytest.mark.slow
def test_the_documented_example_runs_as_it_is_written(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs/custom.md").read_text(encoding="utf-8")
    code = re.search(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    commands = re.findall(r"^python (\S+) (.*mine\.py:.*|run=.*)$", page, flags=re.MULTILINE)
    assert code is not None
    (tmp_path / "mine.py").write_text(code[1])
    assert [entry for entry, _ in commands] == ["train_qat.py", "export.py"]
    (entry, arguments), (export_entry, export_arguments) = commands
    short = ("train.epochs=12", "qat.epochs=1", "sensitivity.images=4", "deploy.benchmark_seconds=0.2")
    gates = ("max_ap_drop=0.5", "min_ap=0.99")
    outcome = run_entry(entry, *arguments.split(), *short, *gates, cwd=tmp_path, timeout=500)
    assert outcome.code == 4, outcome.err  # the gate works on the user's number
    assert "metric" in outcome.err
    assert "min_ap=0.99" in outcome.err
    rows = rows_of(tmp_path / "runs/demo/latest")
    assert list(rows) == ROWS
    for row in rows.values():
        assert row["ap"] is None
        assert 0 <= row["extras"]["metric"] <= 1
    assert rows["float"]["extras"]["metric"] > 0.3, "the small network learns the rectangles"
    assert rows["engine:openvino:int8"]["extras"]["metric"] >= rows["float"]["extras"]["metric"] - 0.15
    outcome = run_entry(export_entry, *export_arguments.split(), cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    page = tmp_path / "runs/demo/latest/report.html"
    assert "below min_ap=0.99" in page.read_text(encoding="utf-8")
    charts = check_report(page, tmp_path / "profile")
    assert {"accuracy", "loss-0", "loss-1", "sensitivity"} <= charts
    assert "f1" not in charts, "nobody measured an operating point"


def test_an_untraceable_network_exits_2_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "branching.py").write_text(UNTRACEABLE)
    outcome = run_entry("train_qat.py", *TINY, "model=custom", "model.factory=branching:build", cwd=tmp_path)
    assert outcome.code == 2
    assert "branching.py:13 (forward)" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_factory_that_is_not_there_exits_2(tmp_path: Path) -> None:
    outcome = run_entry("train_qat.py", *TINY, "model=custom", "model.factory=nowhere:build", cwd=tmp_path)
    assert outcome.code == 2
    assert "nowhere" in outcome.err
    assert str(tmp_path) in outcome.err
