"""Processes that work together: what they exchange, and how they end when one of them does."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT = 60.0  # seconds; a stopped process is to be missed after 3 here


def run_team(script: str, *arguments: str, size: int = 2) -> tuple[list[int], list[str], float]:
    """Processes without torchrun, as `srun` starts them: exit codes, errors, seconds from when the last one prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(script)), *arguments],
            env={
                **os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    assert processes[-1].stdout is not None
    processes[-1].stdout.readline()  # it is about to fail
    started = time.monotonic()
    errors = [process.communicate(timeout=300)[1] for process in processes]
    return [process.returncode for process in processes], errors, time.monotonic() - started


def lines_with(errors: list[str], pattern: str) -> list[str]:
    return [line for text in errors for line in text.splitlines() if re.search(pattern, line)]


CASES = {
    "raise": ([3, 3], r"^error: image 7 is missing$"),
    "stop": (
        [3, -9],
        r"^error: process 1 \(pid \d+ on .*\) has shown no sign of life for 3 s: it was stopped by a",
    ),
    "all fail": ([3, 3], r"^error: the same in all$"),
    "stop in an exchange": (
        [3, -9],
        r"^error: process 1 .* no sign of life for 3 s: it was stopped by a signal$",
    ),
    "kill": ([3, -9], r"^error: process 1 .* it has ended$"),
    "kill in an exchange": ([3, -9], r"^error: process 1 .* has ended without a message: it was killed"),
}
IN_ALL_TESTS = [pytest.param(what, marks=pytest.mark.exhaustive) for what in list(CASES)[2:]]


@pytest.mark.slow
@pytest.mark.parametrize("what", [*list(CASES)[:2], *IN_ALL_TESTS])
def test_one_that_ends_takes_the_others_with_it(what: str) -> None:
    codes, message = CASES[what]
    found, errors, seconds = run_team("team_member.py", what)
    assert found == codes, errors
    assert len(lines_with(errors, message)) == len(lines_with(errors, "^error: ")) == 1, errors
    assert not lines_with(errors, "Traceback"), errors
    assert seconds < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("what", ["fine", "busy watch"])
def test_all_end_well(what: str) -> None:
    codes, errors, _ = run_team("team_member.py", what)
    assert codes == [0, 0], errors


@pytest.mark.slow
def test_a_restart_by_torchrun_finds_the_new_processes() -> None:
    """torchrun keeps its store: the addresses of the processes before, one of which was killed, are in it still."""
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "--max-restarts", "1", "--monitor-interval", "0.1",
            str(Path(__file__).with_name("team_member.py")), "kill once",
        ],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count("done") == 2
    assert len(lines_with([done.stdout], r"^pid \d+$")) == 2
