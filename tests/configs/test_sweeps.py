"""Sweeps end with all their jobs in view, whatever launcher runs them and however a job ends."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = """
import json
import os
import sys
import time
from pathlib import Path
from configs import Config, hydra_entry
from core.errors import OctetError
from pipeline import report_sweep

class Missing(OctetError):
    exit_code = 3

@hydra_entry(after_sweep=report_sweep)
def main(config: Config) -> float:
    if config.seed == 7:
        raise Missing("seven is missing")
    if config.seed == 8:
        first, limit = Path("swept/.jobs/0.json"), time.monotonic() + 120
        while time.monotonic() < limit and not (first.exists() and json.loads(first.read_text())["exit_code"] == 0):
            time.sleep(0.1)  # joblib ends the other workers of a pool that has lost one
        os._exit(9)  # as if it were killed
    if config.seed == 9:
        raise RuntimeError("a bug")
    return 0.5

if __name__ == "__main__":
    main()
"""
LAUNCHERS = {"basic": None, "joblib": "hydra_plugins.hydra_joblib_launcher", "submitit_local": "submitit"}


def sweep(
    folder: Path, launcher: str, seeds: str
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, object]]]:
    """Run a sweep over seeds; the process, and the records of sweep.json."""
    needed = LAUNCHERS[launcher]
    if needed is not None and importlib.util.find_spec(needed.split(".")[0]) is None:
        pytest.skip(f"{needed} is not installed: pip install -e '.[sweeps]'")
    (folder / "entry.py").write_text(SCRIPT)
    more = {"joblib": ["hydra.launcher.n_jobs=2"], "submitit_local": ["hydra.launcher.timeout_min=5"]}
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH")]
    done = subprocess.run(
        [
            sys.executable, "entry.py", "-m", "+experiment=demo", f"hydra/launcher={launcher}", f"seed={seeds}",
            *more.get(launcher, ()), "hydra.sweep.dir=swept",
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )  # fmt: skip
    path = folder / "swept/sweep.json"
    return done, json.loads(path.read_text()) if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_failed_job_is_a_line_of_the_sweep(tmp_path: Path, launcher: str) -> None:
    done, records = sweep(tmp_path, launcher, "7,1,7")
    assert done.returncode == 3, done.stderr
    assert [(record["job"], record["exit_code"], record["error"]) for record in records] == [
        ("seed=7", 3, "seven is missing"),
        ("seed=1", 0, None),
        ("seed=7", 3, "seven is missing"),
    ]
    assert "2 job(s) of the sweep failed" in done.stderr
    assert "job 0 failed: seven is missing" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_killed_job_is_a_line_of_the_sweep(tmp_path: Path, launcher: str) -> None:
    done, records = sweep(tmp_path, launcher, "1,8")
    assert done.returncode == 1, done.stderr
    assert [record["exit_code"] for record in records][1] is None
    assert "job 1 failed: it was ended from outside" in done.stdout
    assert "of the sweep failed" in done.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_defect_keeps_its_traceback_and_the_sweep_its_records(tmp_path: Path, launcher: str) -> None:
    done, records = sweep(tmp_path, launcher, "1,9")
    assert done.returncode != 0
    assert [(record["exit_code"], record["error"]) for record in records] == [
        (0, None),
        (1, "RuntimeError: a bug"),
    ]
    assert "Traceback" in done.stderr


@pytest.mark.slow
def test_no_failure_is_exit_code_0(tmp_path: Path) -> None:
    done, records = sweep(tmp_path, "joblib" if importlib.util.find_spec("joblib") else "basic", "1,2")
    assert done.returncode == 0, done.stderr
    assert [record["exit_code"] for record in records] == [0, 0]
