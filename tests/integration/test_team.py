"""Several processes calibrate one run: the same scales as one process finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from main_job import REPOSITORY, TINY, run_entry, untrained_weights

SHORT = (*TINY, "stages=[calibrate]", "quant.calibration_images=20", "quant.calibration_batch_size=4")


@pytest.mark.slow
def test_two_processes_calibrate_as_one_does(tmp_path: Path) -> None:
    weights = untrained_weights(tmp_path)
    alone = run_entry("train_qat.py", *SHORT, weights, "run_dir=alone", cwd=tmp_path)
    assert alone.code == 0, alone.err
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    team = subprocess.run(
        [*launcher, str(REPOSITORY / "train_qat.py"), *SHORT, weights, "run_dir=team"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert team.returncode == 0, team.stderr
    assert "2 processes: they share the calibration images" in team.stderr
    assert team.stderr.count("--- calibrate") == 1
    found, expected = (
        json.loads((next((tmp_path / name).rglob("calibration.json"))).read_text())
        for name in ("team", "alone")
    )
    assert found["num_images"] == expected["num_images"] == 20
    assert found["groups"] == expected["groups"]
    kept = [next((tmp_path / name).rglob("ptq.safetensors")).read_bytes() for name in ("team", "alone")]
    assert kept[0] == kept[1]
    assert team.stderr.count("calibration: ") == 1
