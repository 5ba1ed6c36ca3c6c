"""A CPU engine is told of the finer grid for ReLU; targets are refused grids that they do not run before any work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data.formats.synthetic_scene import CLASSES
from models import build_detector, save_detector

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "+experiment=demo", "model.activation=relu", "data.image_size=64", "data.synthetic.size=64",
    "data.synthetic.train=8", "data.synthetic.val=4", "quant.calibration_images=4", "data.workers=0",
)  # fmt: skip


def untrained_weights(directory: Path) -> str:
    path = directory / "untrained.safetensors"
    save_detector(build_detector("yolov9t", len(CLASSES), "relu", CLASSES), path)
    return f"weights={path}"


def run(directory: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    weights = untrained_weights(directory)
    command = [
        sys.executable,
        str(ROOT / "train_qat.py"),
        *SMALL,
        weights,
        f"run_dir={directory / 'run'}",
        *overrides,
    ]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300)


def test_the_hint_names_the_setting(tmp_path: Path) -> None:
    found = run(tmp_path, "stages=[place]")
    assert found.returncode == 0, found.stderr
    assert "groups are never negative: quant.activations.unsigned=true" in found.stdout + found.stderr
    assert "unsigned," not in found.stdout


def test_tensorrt_is_refused_before_any_work(tmp_path: Path) -> None:
    found = run(
        tmp_path, "quant.activations.unsigned=true", "deploy.target=trt10", "stages=[place,calibrate,export]"
    )
    assert found.returncode == 2
    assert "takes signed codes only" in found.stdout + found.stderr
    assert not (tmp_path / "run" / "placement.yaml").exists()


@pytest.mark.parametrize(
    ("setting", "named"),
    [("quant=fp8", "quant.grid"), ("quant.policy=[{match: x, grid: fp8}]", "quant.policy, x")],
)
def test_fp8_is_refused_for_integer_engines_before_any_work(tmp_path: Path, setting: str, named: str) -> None:
    found = run(tmp_path, setting, "stages=[place,calibrate,export]")
    assert found.returncode == 2
    assert (
        f"{named}: grid=fp8, but no engine of target openvino runs fp8 codes: export for trt11"
        in found.stderr
    )
    assert not (tmp_path / "run" / "placement.yaml").exists()
