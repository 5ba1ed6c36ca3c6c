"""The main job on a file of Ultralytics, without fine-tuning: a checkpoint and a YOLO dataset are all that is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from main_job import run_entry

REFERENCE_AP = 0.5634  # pycocotools on Ultralytics' own outputs, from the checkpoint's README


@pytest.mark.exhaustive
def test_yolo11_keeps_its_accuracy_in_both_engines(shared_data: Path, tmp_path: Path) -> None:
    outcome = run_entry(
        "train_qat.py",
        "+experiment=detector",
        f"weights={shared_data / 'weights/yolo11n-bccd.pt'}",
        f"data.root={shared_data / 'data/bccd'}",
        "data.image_size=320",
        "data.workers=0",
        "quant.calibration_images=128",
        "deploy.runtimes=[openvino,onnxruntime]",
        "deploy.benchmark_seconds=0.2",
        "stages=[float,calibrate,export,engine,report]",
        cwd=tmp_path,
        timeout=550,
    )
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "runs/detector/latest/report.json").read_text())
    rows = {row["name"]: row["ap"] for row in report["rows"]}
    assert rows["float"] == pytest.approx(REFERENCE_AP, abs=0.002)
    for runtime in ("openvino", "onnxruntime"):
        assert rows[f"engine:{runtime}:int8"] >= rows["float"] - 0.001
        assert rows[f"engine:{runtime}:fp32"] == pytest.approx(rows["float"], abs=0.0005)
