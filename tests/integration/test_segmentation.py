"""The main job with masks: every stage on the synthetic set, small but real, and what the files then hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from main_job import TINY, run_entry

from tests.browser.chromium import check_report

pytestmark = pytest.mark.slow

SMALL = (
    *TINY,
    "data.image_size=64",
    "data.synthetic.size=64",
    "data.synthetic.train=16",
    "data.synthetic.val=4",
)
ROWS = ["float", "ptq", "qat", "engine:openvino:int8", "engine:openvino:fp32"]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masks")
    outcome = run_entry("train_qat.py", *SMALL, "model=yolov9t_seg", "qat.epochs=1", cwd=folder, timeout=900)
    assert outcome.code == 0, outcome.err
    assert "Mask AP" in outcome.out
    return folder


def test_every_row_has_both_aps(finished_run: Path) -> None:
    report = json.loads((finished_run / "runs/demo/latest/report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ROWS
    for row in rows.values():
        assert 0 <= row["ap"] <= 1
        assert 0 <= row["extras"]["ap_mask"] <= row["extras"]["ap50_mask"] <= 1
    assert "| Mask AP |" in (finished_run / "runs/demo/latest/report.md").read_text()


def test_the_report_draws_every_chart(finished_run: Path, tmp_path: Path) -> None:
    charts = check_report(finished_run / "runs/demo/latest/report.html", tmp_path / "profile")
    assert {"accuracy", "loss-0", "loss-1", "sensitivity", "weights-0", "inputs-0"} <= charts


def test_the_mask_loss_is_learned(finished_run: Path) -> None:
    run = finished_run / "runs/demo/latest"
    for name in ("train.jsonl", "qat.jsonl"):
        records = [json.loads(line) for line in (run / name).read_text().splitlines()]
        assert all(record["mask"] > 0 for record in records)
    units = {unit["unit"]: unit for unit in json.loads((run / "sensitivity.json").read_text())["units"]}
    assert units["head.prototypes.conv1.act"]["score"] > 0


def test_engines_agree_with_torch_on_both_outputs(finished_run: Path) -> None:
    parity = json.loads((finished_run / "runs/demo/latest/engines/parity.json").read_text())
    for name in ("coefficients", "prototypes"):
        assert parity["engine:openvino:fp32"][name] < 1e-8
        assert parity["engine:openvino:int8"][name] < 0.01


@pytest.mark.parametrize("target", ["openvino", "onnxruntime", "trt10", "trt11"])
def test_both_outputs_are_exported_for_every_target(finished_run: Path, target: str) -> None:
    outcome = run_entry(
        "export.py", "run=runs/demo/latest", f"target={target}", cwd=finished_run, timeout=600
    )
    assert outcome.code == 0, outcome.err
    model = onnx.load(finished_run / outcome.out.strip().splitlines()[-1])
    assert [value.name for value in model.graph.output] == ["output0", "output1"]
    shapes = [[d.dim_value for d in value.type.tensor_type.shape.dim][1:] for value in model.graph.output]
    assert len(shapes[0]) == 2  # rows and anchors, which the exporter leaves open
    assert shapes[1] == [32, 16, 16]
    kernels = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    # yolov9t's 179, two for each of three coefficient branches, and the prototypes' first two; and the five
    # average-pools, which ONNX Runtime's graph has as depthwise convolutions
    pools = 5 * (target == "onnxruntime")
    assert sum(kernel.dtype == np.int8 and kernel.ndim == 4 for kernel in kernels) == 179 + 6 + 2 + pools


def test_weights_alone_say_that_there_are_masks(finished_run: Path) -> None:
    """Recognised by the keys: no `model=`, and the masks of the data are opened."""
    weights = finished_run / "runs/demo/latest/float.safetensors"
    arguments = [
        *SMALL,
        "model=auto",
        f"weights={weights}",
        "stages=[float]",
        f"run_dir={finished_run}/again",
    ]
    outcome = run_entry("train_qat.py", *arguments, cwd=finished_run, timeout=300)
    assert outcome.code == 0, outcome.err
    assert "mask AP" in outcome.err
    refused = run_entry(
        "train_qat.py", *arguments[:-1], "model=yolov9t", f"run_dir={finished_run}/not", cwd=finished_run
    )
    assert refused.code == 3
    assert "yolov9t-seg" in refused.err
