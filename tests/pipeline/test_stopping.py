"""Signals: exit codes, finishing the step, the second signal, loader workers, and the command that goes on."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from data.worker_signals import holding_signals
from pipeline.run.commands import resume_command
from pipeline.run.directory import Run
from pipeline.run.stopping import STOPPING, Stopped
from pipeline.stages.saved_training import SavedTraining
from training import Checkpoints, TrainingOptions, TrainingState, train_epochs
from training.team import ALONE

REPOSITORY = Path(__file__).resolve().parents[2]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: 75}


@pytest.fixture(autouse=True)
def handlers() -> Any:
    before = {number: signal.getsignal(number) for number in CODES}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    STOPPING.requested, STOPPING.is_deferred = None, False


@pytest.mark.parametrize("number", CODES)
def test_a_signal_outside_of_training_stops_where_it_comes(number: signal.Signals) -> None:
    STOPPING.watch()
    with pytest.raises(Stopped) as caught:
        os.kill(os.getpid(), number)
    assert caught.value.code == CODES[number]


@pytest.mark.parametrize("number", CODES)
def test_a_signal_in_a_step_lets_it_finish_and_saves(tmp_path: Path, number: signal.Signals) -> None:
    network = nn.Conv2d(3, 1, 1)
    state = TrainingState(network, TrainingOptions(epochs=2))
    job: Any = SimpleNamespace(
        run=Run(tmp_path),
        device=torch.device("cpu"),
        stage_team=ALONE,
        config=SimpleNamespace(checkpoint_minutes=60.0),
    )
    saved = SavedTraining(job, "states", "log.jsonl", state)

    def loss(raw: torch.Tensor, targets: Any, size: Any) -> dict[str, torch.Tensor]:
        if state.step == 2:
            os.kill(os.getpid(), number)
        return {"error": raw.square().mean()}

    STOPPING.watch()
    batches = [(torch.rand(2, 3, 4, 4), None)] * 4
    with pytest.raises(Stopped) as caught:
        list(train_epochs(state, lambda epoch, samples: batches, 4, loss, saved.after_step))
    assert caught.value.code == CODES[number]
    content = Checkpoints(tmp_path / "states").load()
    assert content is not None
    assert (content["training"]["step"], content["training"]["samples"]) == (3, 6)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


def test_the_command_that_goes_on_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["train_qat.py", "+experiment=demo", "data.class_names=[a b,c]", "run_dir=old", "resume=false"]
    command = resume_command(Path("/runs/my run"), given)
    assert shlex.split(command) == [
        "python", "train_qat.py", "+experiment=demo", "data.class_names=[a b,c]", "run_dir=/runs/my run", "resume=true",
    ]  # fmt: skip
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert resume_command(Path("r"), ["train_qat.py"]) == (
        "torchrun --nproc-per-node 2 train_qat.py run_dir=r resume=true"
    )


def test_workers_start_with_sigterm_blocked() -> None:
    """A signal to the process group may come before a worker is able to tell who sent it."""

    class Masks(torch.utils.data.Dataset[bool]):
        def __getitem__(self, index: int) -> bool:
            return signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])

        def __len__(self) -> int:
            return 1

    with holding_signals():
        held = iter(torch.utils.data.DataLoader(Masks(), num_workers=1, multiprocessing_context="fork"))
    assert bool(next(held))
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def fork_holding_signals(forked: list[int]) -> None:
    with holding_signals():
        if (child := os.fork()) == 0:
            os._exit(0)
        os.waitpid(child, 0)
        forked.append(child)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_within_a_fork_stops_after_it(number: signal.Signals) -> None:
    """Python drops what a handler raises there: the run would go on until the next step, after a traceback."""
    pending = [number]
    os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), pending.pop()) if pending else None)
    STOPPING.watch()
    with pytest.raises(Stopped) as caught:
        fork_holding_signals(forked := [])
    assert forked
    assert caught.value.code == CODES[number]


# -- real processes

SETTINGS = (
    "+experiment=demo", "data.image_size=64", "data.synthetic.size=64", "data.synthetic.train=16",
    "data.synthetic.val=4", "data.workers=2", "train.epochs=500", "train.batch_size=4", "threads=1",
    "stages=[train]", "run_dir=run",
)  # fmt: skip


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    """A training with two loader workers, as a process group of its own."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / "train_qat.py"), *SETTINGS, *more]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stderr=subprocess.PIPE, start_new_session=True
    )


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def wait_for(what: Any, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def living(pids: list[int]) -> list[int]:
    states = {pid: Path(f"/proc/{pid}/stat") for pid in pids}
    return [
        pid
        for pid, path in states.items()
        if path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"
    ]


def stop_in_training(folder: Path, *signals: tuple[int, float]) -> tuple[int, str]:
    """Start, send signals to the process group in the middle of training, and see that nobody stays behind."""
    process = start(folder, "checkpoint_minutes=0")
    wait_for(lambda: list(folder.glob("run/train-state/0*.pt")) and len(children(process.pid)) >= 2)
    workers = children(process.pid)
    assert len(workers) == 2
    for number, pause in signals:
        os.killpg(process.pid, number)
        time.sleep(pause)
    err = process.communicate(timeout=240)[1]
    wait_for(lambda: not living(workers), 5.0)
    return process.returncode, err


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(
            pytest.param(n, marks=pytest.mark.exhaustive)
            for n in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
        ),
    ],
)
def test_a_signal_to_the_process_group_saves_and_ends(tmp_path: Path, number: signal.Signals) -> None:
    code, err = stop_in_training(tmp_path, (number, 0.0))
    assert code == CODES[number], err
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert f"Stopped by {number.name}. To continue: python " in err
    assert err.rstrip().endswith("run_dir=run resume=true")
    assert not (tmp_path / "run/run.lock").exists()
    assert not list((tmp_path / "run").rglob(".writing-*"))


STUCK = """
import time
from pipeline.run.stopping import STOPPING
STOPPING.watch()
STOPPING.is_deferred = True
print("in a step", flush=True)
end = time.monotonic() + 60
while time.monotonic() < end:
    time.sleep(0.01)
"""


def test_a_second_signal_stops_at_once_and_an_echo_does_not() -> None:
    """A launcher passes on the signal that the process group has already got: that is no second one."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in a step\n"
    for pause in (0.2, 1.5):
        process.send_signal(signal.SIGTERM)
        time.sleep(pause)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "Stopping after this step; a second signal stops immediately." in err
    assert "Stopped immediately; the states saved before are kept." in err


@pytest.mark.exhaustive
def test_workers_end_with_a_killed_main_process(tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for(lambda: len(children(process.pid)) >= 2)
    workers = children(process.pid)
    process.kill()
    process.communicate()
    wait_for(lambda: not living(workers), 2.0)
