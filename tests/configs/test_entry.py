"""The command line as users meet it: a process, its exit code, and what it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
sys.path.insert(0, {repository!r})
from configs import Config, hydra_entry
from core.errors import OctetError

class Missing(OctetError):
    exit_code = 3

@hydra_entry()
def main(config: Config) -> float:
    if config.seed == 7:
        raise Missing("seven is missing")
    if config.seed == 8:
        raise KeyboardInterrupt
    if config.seed == 9:
        raise RuntimeError("a bug")
    print("RUN", config.experiment, config.quant.observer, config.run_dir)
    return 0.5

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "entry.py"
    path.write_text(SCRIPT.format(repository=str(REPOSITORY)))
    return path


def run(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=script.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_single_run_leaves_nothing_behind(script: Path) -> None:
    result = run(script, "+experiment=demo", "quant.observer=minmax")
    assert (result.returncode, result.stdout, result.stderr) == (0, "RUN demo minmax None\n", "")
    assert [path.name for path in script.parent.iterdir()] == ["entry.py"]


def test_a_slip_ends_in_one_line_and_code_2(script: Path) -> None:
    result = run(script, "+experiment=demo", "epcohs=3")
    assert result.returncode == 2
    assert result.stderr == "error: Unknown key 'epcohs' in 'epcohs=3'; closest: train.epochs.\n"
    assert result.stdout == ""


def test_a_value_out_of_limits_ends_in_code_2(script: Path) -> None:
    result = run(script, "+experiment=demo", "data.image_size=100")
    assert result.returncode == 2
    assert result.stderr.startswith("error: data.image_size=100: expected a multiple of 32")
    assert len(result.stderr.splitlines()) == 1


def test_an_unknown_flag_ends_in_code_2(script: Path) -> None:
    result = run(script, "--epochs", "3")
    assert result.returncode == 2
    assert "--epochs" in result.stderr


def test_the_traceback_is_there_on_request(script: Path) -> None:
    result = run(script, "+experiment=demo", "data.image_size=100", HYDRA_FULL_ERROR="1")
    assert result.returncode != 0
    assert "Traceback" in result.stderr


def test_an_expected_error_has_its_own_code(script: Path) -> None:
    result = run(script, "+experiment=demo", "seed=7")
    assert (result.returncode, result.stderr) == (3, "error: seven is missing\n")


def test_interruption_has_its_own_code(script: Path) -> None:
    assert run(script, "+experiment=demo", "seed=8").returncode == 130


def test_a_bug_keeps_its_traceback(script: Path) -> None:
    result = run(script, "+experiment=demo", "seed=9")
    assert result.returncode not in (0, 2, 3, 4)
    assert "RuntimeError: a bug" in result.stderr
    assert "Traceback" in result.stderr


def test_a_sweep_gives_every_job_its_directory(script: Path) -> None:
    result = run(script, "-m", "+experiment=demo", "quant.observer=minmax,mse")
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("RUN")]
    assert [line[2] for line in lines] == ["minmax", "mse"]
    directories = [Path(line[3]) for line in lines]
    assert len(set(directories)) == 2
    for number, directory in enumerate(directories):
        assert directory.is_dir()
        assert directory.name == str(number)
        assert directory.parent.parent == script.parent / "runs" / "demo" / "multirun"


def test_a_sweep_goes_on_after_a_failed_job(script: Path) -> None:
    result = run(script, "-m", "+experiment=demo", "seed=7,1")
    assert result.returncode == 3
    assert sum(line.startswith("RUN") for line in result.stdout.splitlines()) == 1
    assert "seven is missing" in result.stderr
    assert "1 job(s) of the sweep failed" in result.stderr


def test_a_sweep_over_a_misspelt_option_is_refused(script: Path) -> None:
    result = run(script, "-m", "+experiment=demo,bcd")
    assert result.returncode == 2
    assert "Unknown experiment 'bcd'" in result.stderr


def test_a_sweep_into_one_directory_is_refused(script: Path) -> None:
    result = run(script, "-m", "+experiment=demo", "seed=1,2", "run_dir=here")
    assert result.returncode == 2
    assert "every job would write there" in result.stderr


def test_help_names_the_usage_and_the_groups(script: Path) -> None:
    result = run(script, "--help")
    assert result.returncode == 0
    assert "+experiment=NAME" in result.stdout
    assert "yolov9t" in result.stdout


def test_the_composed_configuration_can_be_printed(script: Path) -> None:
    result = run(script, "+experiment=demo", "--cfg", "job")
    assert result.returncode == 0
    assert "experiment: demo" in result.stdout
