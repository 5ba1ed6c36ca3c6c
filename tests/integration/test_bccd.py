"""The main job on real input: an unmodified checkpoint of the official trainer and real photographs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from main_job import run_entry

REFERENCE_AP = 0.5984  # pycocotools on the same checkpoint, from its README
REFERENCE_AP50 = 0.8879


@pytest.fixture(scope="module")
def rows(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Rows of a short run: fine-tuning sees 48 images once."""
    folder = tmp_path_factory.mktemp("bccd")
    outcome = run_entry(
        "train_qat.py",
        "+experiment=bccd",
        f"weights={shared_data / 'weights/gelan-t-bccd.pt'}",
        f"data.root={shared_data / 'data/bccd'}",
        "data.limit_train=48",
        "quant.calibration_images=64",
        "qat.epochs=1",
        "evaluate.engine=pycocotools",
        "deploy.benchmark_seconds=2",
        cwd=folder,
        timeout=550,
    )
    assert outcome.code == 0, outcome.err
    report = json.loads((folder / "runs/bccd/latest/report.json").read_text())
    return {row["name"]: row for row in report["rows"]}


@pytest.mark.slow
def test_float_row_is_the_reference(rows: dict[str, Any]) -> None:
    assert rows["float"]["ap"] == pytest.approx(REFERENCE_AP, abs=0.002)
    assert rows["float"]["ap50"] == pytest.approx(REFERENCE_AP50, abs=0.002)


@pytest.mark.slow
def test_int8_engine_keeps_the_accuracy(rows: dict[str, Any]) -> None:
    engine = rows["engine:openvino:int8"]
    assert engine["ap"] >= rows["float"]["ap"] - 0.005
    assert engine["ap"] == pytest.approx(rows["qat"]["ap"], abs=0.003)
    assert rows["engine:openvino:fp32"]["ap"] == pytest.approx(rows["float"]["ap"], abs=0.0005)


@pytest.mark.slow
def test_int8_engine_is_faster_and_smaller(rows: dict[str, Any]) -> None:
    int8, fp32 = rows["engine:openvino:int8"], rows["engine:openvino:fp32"]
    assert int8["latency_ms_median"] < fp32["latency_ms_median"]
    assert int8["size_bytes"] < fp32["size_bytes"]
