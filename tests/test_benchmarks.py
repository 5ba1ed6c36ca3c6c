"""The comparisons with other tools end well where the tools are not there; `make bench` fails on a regression."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import cast

import onnx
import pytest
import torch

from benchmarks import compare_ptq, regression
from benchmarks.peers import tools
from deploy import export_onnx
from models import build_detector
from pipeline.job import Job
from pipeline.stages.export import Deployed
from quant import with_named_nodes

REPOSITORY = Path(__file__).resolve().parent.parent
COMPARISONS = ("compare_ptq.py", "compare_engines.py", "check_peers.py")


@pytest.mark.slow
@pytest.mark.parametrize("script", COMPARISONS)
def test_comparison_without_its_peers_is_skipped(script: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OCTET_")}
    empty = tmp_path / "python"  # an interpreter that sees no packages
    empty.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    empty.chmod(0o755)
    command = [sys.executable, str(REPOSITORY / "benchmarks" / script), "--nncf-python", str(empty)]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    first, *_, last = result.stdout.splitlines()
    assert first.startswith("skipped nncf: ")
    assert "cannot import it" in first
    assert last.startswith("skipped: ")
    assert list(tmp_path.iterdir()) == [empty]


def test_peers_are_calibrated_on_the_images_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [torch.full((200, 3, 2, 2), float(number)) for number in range(2)]
    monkeypatch.setattr(compare_ptq, "calibration_images", lambda job: iter(batches))
    images = compare_ptq.images_for_peers(cast(Job, "the job"))
    assert images.shape == (compare_ptq.MAX_CALIBRATION_IMAGES, 3, 2, 2)
    assert images[:200].max() == 0
    assert images[200:].min() == 1


def test_an_engine_of_another_tool_needs_its_file(tmp_path: Path) -> None:
    model = tmp_path / "net.xml"
    model.touch()
    assert compare_ptq.engines_of([f"other={model}"]) == {("other", "net"): model}
    with pytest.raises(SystemExit, match="expected TOOL=FILE"):
        compare_ptq.engines_of([f"other={tmp_path / 'missing.xml'}"])


def test_names_that_peers_leave_float_are_those_of_the_files(tmp_path: Path) -> None:
    model = build_detector("yolov9t", 2, "silu")
    network, names = with_named_nodes(model.network)
    deployed = Deployed(network, model.decode).eval()
    path = export_onnx(
        deployed, tmp_path / "float.onnx", (64, 64), "openvino", quantized=False, names=names
    ).path
    nodes = [node.name for node in onnx.load(path).graph.node]
    last = [name for name in nodes if re.fullmatch(tools.LAST_CONVS, name)]
    assert last == [f"head.{part}.{level}.output" for level in range(3) for part in ("box", "cls")]
    assert sum(bool(re.fullmatch(tools.DECODE, name)) for name in nodes) > 10


COMMITTED = {
    "step": {"ratio": 1.10, "least": 1.05, "largest": 1.20},
    "pass": {"ratio": 3.00, "least": 2.90, "largest": 3.10},
}


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0.50, []), (1.10, []), (1.25, []), (1.27, ["step: 1.27, committed 1.10 (1.05 to 1.20), margin 5%"])],
)
def test_a_work_is_slower_beyond_the_spread_and_the_margin(step: float, expected: list[str]) -> None:
    measured = {
        "step": {"ratio": step, "least": 0.1, "largest": 9.0},
        "pass": COMMITTED["pass"],
        "new": {"ratio": 99.0, "least": 99.0, "largest": 99.0},
    }
    assert regression.compare(COMMITTED, measured, 0.05) == expected


def test_a_committed_work_that_is_not_measured_fails() -> None:
    (line,) = regression.compare(COMMITTED, {"step": COMMITTED["step"]}, 0.05)
    assert line.startswith("pass: no longer measured")


@pytest.mark.parametrize(("pass_now", "code"), [(3.0, 0), (3.7, 1)])
def test_the_exit_code_of_a_regression_is_1(
    pass_now: float,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "ratios.json"
    monkeypatch.setattr(regression, "FILE", file)
    monkeypatch.setattr(regression, "measure", lambda: COMMITTED)
    assert regression.main(["--write"]) == 0
    now = {**COMMITTED, "pass": {"ratio": pass_now, "least": pass_now, "largest": pass_now}}
    monkeypatch.setattr(regression, "measure", lambda: now)
    assert regression.main([]) == code
    assert ("slower: pass: 3.70, committed 3.00 (2.90 to 3.10)" in capsys.readouterr().out) == bool(code)


def test_committed_ratios_have_their_spread() -> None:
    committed = json.loads(regression.FILE.read_text())["ratios"]
    assert {name.partition(":")[0] for name in committed} == {"training_step", "passes", "startup", "loader"}
    for row in committed.values():
        assert 0 < row["least"] <= row["ratio"] <= row["largest"]
