"""A disk that fills up in the middle of a job: a small tmpfs, filled while float training and fine-tuning run."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from main_job import REPOSITORY

from benchmarks.kill_resume import SETTINGS, fingerprints
from training import Checkpoints

MEGABYTES = 160
JOB = (*SETTINGS[:-1], "stages=[train,calibrate,finetune]", "train.epochs=4", "qat.epochs=3")
PATIENCE = 1500.0  # seconds on a busy machine


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "none", folder]
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted here: {error}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def start(folder: Path, run: Path, resume: bool) -> subprocess.Popen[str]:
    arguments = (*JOB, f"run_dir={run}", f"resume={str(resume).lower()}")
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "train_qat.py"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def fill(folder: Path) -> Path:
    """Take all space that is left."""
    file = folder / "filling"
    with file.open("wb") as stream:
        for size in (2**20, 4096):
            try:
                while True:
                    os.write(stream.fileno(), bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return file


@pytest.mark.exhaustive
@pytest.mark.timeout(4 * PATIENCE)
def test_a_job_whose_disk_fills_up_goes_on_once_there_is_space(tmp_path: Path, disk: Path) -> None:
    """Twice, in float training and in fine-tuning: message, exit code 3, states that are whole, equal artifacts."""
    whole = start(tmp_path, tmp_path / "whole", resume=False)
    error = whole.communicate(timeout=PATIENCE)[1]
    assert whole.returncode == 0, error
    run = disk / "run"
    for states in ("train-state", "qat-state"):
        process = start(tmp_path, run, resume=run.exists())
        while not list(run.glob(f"{states}/0*.pt")):
            assert process.poll() is None
            time.sleep(0.01)
        filling = fill(disk)
        error = process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == 3, error
        assert "Traceback" not in error
        last = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(last) == 1
        assert (
            "cannot be written (No space left on device): free some space or choose another folder" in last[0]
        )
        assert f"To continue after that: python {REPOSITORY / 'train_qat.py'}" in error
        assert Checkpoints(run / states).load() is not None
        assert not list(run.rglob(".writing-*"))
        filling.unlink()
    process = start(tmp_path, run, resume=True)
    error = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, error
    assert "continuing after step " in error
    assert fingerprints(run) == fingerprints(tmp_path / "whole")
