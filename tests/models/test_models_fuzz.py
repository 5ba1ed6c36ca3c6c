"""Damaged and hostile checkpoints by the hundred, in a process of their own so that its memory can be read off."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
STRICT = ("truncate", "call", "wrong_shape", "huge_size", "cyclic", "bomb")


def fuzz(count: int, seed: int) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("fuzz_checkpoints.py")), str(count), str(seed)]
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("count", "seed"), [(200, 1), pytest.param(2000, 2, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_mutated_checkpoints_are_refused(count: int, seed: int) -> None:
    result = fuzz(count, seed)
    assert result["problems"] == []
    assert result["events"] == []  # nothing imported, compiled, started or unpickled
    assert result["slowest_seconds"] < 5
    assert result["peak_bytes"] < 2 * 2**30
    for kind in STRICT:
        assert result["outcomes"][f"{kind}: refused"] == count // 10
    refused = sum(number for outcome, number in result["outcomes"].items() if outcome.endswith("refused"))
    assert refused > 0.85 * count
