"""A short run of `benchmarks/fuzz.py`: every format, with fixed seeds."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.fuzz import run_case, run_format
from benchmarks.fuzzing.formats import FORMATS
from benchmarks.fuzzing.mutations import Format

REPOSITORY = Path(__file__).resolve().parents[2]


def test_mutated_files_of_every_format_are_taken_or_refused_in_words() -> None:
    """In a process of its own: OpenCV's threads, which other tests have started, do not survive a fork."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/fuzz.py", "--cases", "300", "--seed", "14"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    *lines, number = done.stdout.splitlines()
    assert (done.returncode, number) == (0, "0"), done.stdout + done.stderr
    assert len(lines) == 2 + len(FORMATS)


def bad(chance: random.Random, folder: Path) -> object:
    """Ends in a different defect for each number."""

    def read() -> None:
        kind = int(folder.name)
        if kind == 0:
            raise KeyError("x")
        if kind == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == 2:
            (folder.parent / "outside").touch()

    return read


def test_the_fuzzer_sees_defects() -> None:
    found = run_format(Format("bad", 1, bad), range(4), 0)  # type: ignore[arg-type]
    assert found.counts == {"exception": 1, "ended": 1, "wrote outside its folder": 1, "taken": 1}
    assert len(found.defects) == 3
    assert any("KeyError" in defect for defect in found.defects)
    assert any("SIGKILL" in defect for defect in found.defects)


def test_the_same_seed_gives_the_same_case(tmp_path: Path) -> None:
    form = next(form for form in FORMATS if form.name == "COCO JSON")
    results = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        kind, text = run_case(form, 3, 7, tmp_path / name / "3")
        results.append((kind, text.replace(name, "")))
    assert results[0] == results[1]
