"""Several processes measure, calibrate and rank one run: the figures of one process, to the last digit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from main_job import REPOSITORY, Outcome, run_entry

from benchmarks.kill_resume import fingerprints

SHORT = (
    "+experiment=bccd", "data.image_size=96", "data.workers=0", "data.limit_val=12", "evaluate.batch_size=4",
    "quant.calibration_images=20", "quant.calibration_batch_size=4", "sensitivity.images=3",
    "stages=[float,calibrate,sensitivity]", "threads=1", "device=cpu",
)  # fmt: skip
SAME = ("rows/float.json", "rows/ptq.json", "calibration.json", "ptq.safetensors", "sensitivity.json")


ENTRY = REPOSITORY / "train_qat.py"


def run_team(size: int, *arguments: str, cwd: Path, restarts: int = 0, entry: Path = ENTRY) -> Outcome:
    """Run `train_qat.py` in several processes that torchrun starts."""
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size),
            "--max-restarts", str(restarts), str(entry), *arguments,
        ],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


def of_data(shared: Path) -> tuple[str, ...]:
    return (f"data.root={shared / 'data/bccd'}", f"weights={shared / 'weights/gelan-t-bccd.pt'}")


@pytest.fixture(scope="module")
def alone(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    done = run_entry("train_qat.py", *SHORT, *of_data(shared_data), "run_dir=run", cwd=folder)
    assert done.code == 0, done.err
    assert '"ap": 0.0,' not in (folder / "run/rows/float.json").read_text()  # there is something to compare
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_processes_find_what_one_finds(alone: Path, shared_data: Path, tmp_path: Path, size: int) -> None:
    done = run_team(size, *SHORT, *of_data(shared_data), "run_dir=run", cwd=tmp_path)
    assert done.code == 0, done.err
    assert (
        f"{size} processes share float, calibrate, sensitivity; the first process runs the other stages"
        in done.err
    )
    for name in ("--- calibrate", "calibration: ", "float: AP"):
        assert done.err.count(name) == 1
    for name in SAME:
        assert (tmp_path / "run" / name).read_bytes() == (alone / name).read_bytes(), name


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["sqnr", "map"])
def test_other_rankings_and_the_budget_are_those_of_one(
    alone: Path, shared_data: Path, tmp_path: Path, method: str
) -> None:
    settings = (
        *SHORT, *of_data(shared_data), f"sensitivity.method={method}", "quant.accuracy_budget=0",
        "sensitivity.images=1",
    )  # fmt: skip
    one = run_entry("train_qat.py", *settings, "run_dir=one", cwd=tmp_path, timeout=550)
    four = run_team(4, *settings, "run_dir=four", cwd=tmp_path)
    assert one.code == 0 or "not met" in one.err, one.err
    assert (four.code == 0) == (one.code == 0), four.err
    for name in ("sensitivity.json", "budget.json"):
        assert (tmp_path / "four" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


@pytest.mark.exhaustive
def test_a_failed_job_says_its_exit_code_and_restarts(shared_data: Path, tmp_path: Path) -> None:
    """A gate that cannot be met ends with code 4, which torchrun turns into 1; a restart goes on in the same run."""
    settings = (*SHORT, *of_data(shared_data), "stages=[float,calibrate]", "min_ap=0.999", "resume=auto")
    done = run_team(2, *settings, "run_dir=run", cwd=tmp_path, restarts=1)
    assert done.code == 1
    assert done.err.count("exit code 4; torchrun itself ends with 1, whatever the code") == 2
    assert len(re.findall(r"^error: ptq reaches AP", done.err, re.MULTILINE)) == 2
    assert len(re.findall("float: done before", done.err)) == 1
    assert re.search(r"exitcode +: 4", done.err)


DRAWN = (
    "+experiment=demo", "data.image_size=64", "data.synthetic.size=64", "data.synthetic.train=16",
    "data.synthetic.val=4", "data.workers=0", "train.epochs=2", "train.batch_size=4", "qat.epochs=1",
    "qat.batch_size=4", "quant.calibration_images=4", "threads=1", "checkpoint_minutes=0", "resume=auto",
    "stages=[train,calibrate,finetune]", "train.layout=contiguous", "qat.layout=contiguous",
)  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.timeout(3000)
def test_a_killed_process_and_a_restart_end_like_an_undisturbed_job(tmp_path: Path) -> None:
    """`--max-restarts`: the second process is killed in float training, and all go on from the saved state."""
    done = run_team(2, *DRAWN, "run_dir=whole", cwd=tmp_path)
    assert done.code == 0, done.err
    killer = Path(__file__).with_name("kill_member.py")
    done = run_team(2, *DRAWN, "run_dir=killed", cwd=tmp_path, restarts=1, entry=killer)
    assert done.code == 0, done.err
    assert "has ended without a message: it was killed" in done.err or "Signal 9 (SIGKILL)" in done.err
    assert len(re.findall("continuing after step [1-9]", done.err)) == 1
    whole, killed = (fingerprints(tmp_path / name) for name in ("whole", "killed"))
    logs = {name for name in whole if name.endswith(".jsonl")}  # with the speeds of the processes
    assert {name for name in whole if killed.get(name) != whole[name]} <= logs
    assert set(whole) == set(killed)
