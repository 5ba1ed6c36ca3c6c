"""Sweeps survive SIGKILL at any point and give the same results for one worker and for several."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.run.sweep import Sweep

REPOSITORY = Path(__file__).resolve().parents[2]
ITEMS = [f"off:unit.{index}/x" for index in range(30)]
WORKER = """
import importlib.util, json, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("sweep", sys.argv[4])  # without the rest of the package: no torch
sweep = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep)
items = json.loads(sys.argv[2])
def measure(item):
    with open(sys.argv[1] + ".measured", "a") as stream:
        stream.write(item + chr(10))
    time.sleep(0.02)
    return len(item) + items.index(item) / 7
found = dict(sweep.Sweep(Path(sys.argv[1])).run(items, measure))
Path(sys.argv[3]).write_text(json.dumps(dict(sorted(found.items()))))
"""


def start(directory: Path, out: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    module = str(REPOSITORY / "pipeline/run/sweep.py")
    command = [sys.executable, "-c", WORKER, str(directory), json.dumps(ITEMS), str(out), module]
    return subprocess.Popen(command, env=environment)


def undisturbed(folder: Path) -> str:
    assert start(folder / "plain", folder / "plain.json").wait(timeout=120) == 0
    return (folder / "plain.json").read_text()


def test_ten_kills_leave_the_same_file(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path)
    chance = random.Random(0)
    killed = 0
    for _ in range(10):
        worker = start(tmp_path / "killed", tmp_path / "killed.json")
        done_before = len(list((tmp_path / "killed").glob("*.json")))
        deadline = time.monotonic() + 60
        while worker.poll() is None and len(list((tmp_path / "killed").glob("*.json"))) < done_before + 1:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.03))
        if worker.poll() is None:
            worker.send_signal(signal.SIGKILL)
            killed += 1
        worker.wait()
    assert killed >= 8
    assert start(tmp_path / "killed", tmp_path / "killed.json").wait(timeout=120) == 0
    assert (tmp_path / "killed.json").read_text() == expected


def test_three_workers_share_a_directory(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path)
    workers = [start(tmp_path / "shared", tmp_path / f"{index}.json") for index in range(3)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0]
    assert {(tmp_path / f"{index}.json").read_text() for index in range(3)} == {expected}
    assert sorted((tmp_path / "shared.measured").read_text().splitlines()) == sorted(ITEMS)  # none twice
    assert not list((tmp_path / "shared").glob("*.lock"))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"item": "a", "value": "x"}', '{"item": "a"}'])
def test_a_damaged_result_is_measured_again(tmp_path: Path, content: str) -> None:
    sweep = Sweep(tmp_path)
    dict(sweep.run(["a", "b"], len))
    (tmp_path / "a.json").write_text(content)
    measured: list[str] = []
    assert dict(sweep.run(["a", "b"], lambda item: measured.append(item) or 7.0)) == {"a": 7.0, "b": 1.0}
    assert measured == ["a"]


def test_known_results_are_not_measured_again(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    assert dict(sweep.run(["a", "b"], len)) == {"a": 1.0, "b": 1.0}

    def fail(item: str) -> float:
        raise AssertionError(item)

    assert dict(sweep.run(["a", "b"], fail)) == {"a": 1.0, "b": 1.0}


def test_items_that_differ_in_punctuation_have_their_own_files(tmp_path: Path) -> None:
    items = ["on:a/b", "on:a.b", "on-a/b"]
    assert dict(Sweep(tmp_path).run(items, lambda item: float(items.index(item)))) == {
        "on:a/b": 0.0,
        "on:a.b": 1.0,
        "on-a/b": 2.0,
    }
