"""Saved states of a stage: going back after a divergence, and a disk that fills up."""

from __future__ import annotations

import errno
import math
import os
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from core.errors import DivergenceError, StateError, WriteError
from pipeline.run.directory import Run
from pipeline.stages import saved_training
from pipeline.stages.saved_training import SavedTraining
from training import TrainingOptions, TrainingState
from training.team import ALONE

STEPS = 5


def new(directory: Path, minutes: float = 60.0, **options: Any) -> SavedTraining:
    job: Any = SimpleNamespace(
        run=Run(directory),
        device=torch.device("cpu"),
        stage_team=ALONE,
        config=SimpleNamespace(checkpoint_minutes=minutes),
    )
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 1, 1))
    settings = {"epochs": 2, "learning_rate": 1e-2, "warmup_fraction": 0.0, **options}
    return SavedTraining(job, "states", "log.jsonl", TrainingState(network, TrainingOptions(**settings)))


def batches(epoch: int, samples: int) -> Any:
    for step in range(samples // 2, STEPS):
        yield torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(10 * epoch + step)), None


def loss(raw: Any, targets: Any, size: Any) -> dict[str, torch.Tensor]:
    return {"error": raw.square().mean()}


def train(saved: SavedTraining, task_loss: Any = loss) -> None:
    for _ in saved.train(batches, STEPS, task_loss):
        saved.save()


def diverging(rates: list[float], saved: SavedTraining, limit: float) -> Any:
    """A loss that is not finite from step 6 on where the learning rate is above a limit."""

    def task_loss(raw: Any, targets: Any, size: Any) -> dict[str, torch.Tensor]:
        rates.append(saved.state.rate_scale)
        bad = saved.state.step >= 6 and saved.state.rate_scale > limit
        return {"error": raw.square().mean() * (math.nan if bad else 1.0)}

    return task_loss


def test_after_a_divergence_the_last_state_is_taken_at_half_the_rate(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    saved, rates = new(tmp_path, epochs=4), list[float]()
    train(saved, diverging(rates, saved, limit=0.3))
    assert saved.state.step == 4 * STEPS
    assert (
        rates == [1.0] * 10 + [0.5] * 5 + [0.25] * 15
    )  # 4 bad steps in a row; from step 5, the end of an epoch
    peak = max(record.learning_rate for record in saved.state.records if record.step >= 5)
    assert peak < 0.25 * 1e-2
    err = capfd.readouterr().err
    assert "loss is not finite at step 6" in err
    assert "all learning rates are multiplied by 0.5 from here on" in err
    assert "all learning rates are multiplied by 0.25 from here on" in err


def test_the_third_divergence_ends_it_and_a_lower_rate_goes_on(tmp_path: Path) -> None:
    saved = new(tmp_path, epochs=4)
    with pytest.raises(DivergenceError, match=r"at step 6 .*: lower the learning rate \(now 0\.01\)"):
        train(saved, diverging([], saved, limit=0.0))
    again = new(tmp_path, epochs=4, learning_rate=1e-4)
    assert again.restore()
    assert (again.state.step, again.state.rate_scale) == (5, 1.0)
    train(again)
    assert again.state.step == 4 * STEPS


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    saved = new(tmp_path, minutes=0.0)

    def task_loss(raw: Any, targets: Any, size: Any) -> dict[str, torch.Tensor]:
        if saved.state.step == 3 and saved.state.rate_scale == 1.0:  # as a broken optimizer would
            saved.state.average.model[0].weight.data.fill_(math.inf)  # type: ignore[union-attr]
        return loss(raw, targets, size)

    train(saved, task_loss)
    assert saved.state.rate_scale == 0.5
    assert saved.state.step == 2 * STEPS
    assert torch.isfinite(saved.state.averaged[0].weight).all()  # type: ignore[index]


# -- full disks


def test_every_write_of_a_state_may_find_the_disk_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """ENOSPC at each of the system calls that a save makes: the states before it stay, and training goes on."""
    expected = new(tmp_path / "plain")
    (tmp_path / "plain").mkdir()
    train(expected)
    calls = {"fsync": os.fsync, "replace": Path.replace, "save": torch.save, "write_bytes": Path.write_bytes}
    for name, real in calls.items():
        folder = tmp_path / name
        folder.mkdir()
        saved = new(folder, minutes=0.0)
        count, failed = 0, list[int]()

        def fail(
            *arguments: Any,
            name: str = name,
            real: Any = real,
            saved: Any = saved,
            failed: Any = failed,
            **settings: Any,
        ) -> Any:
            nonlocal count
            count += 1
            if saved.state.step in (2, 3):
                failed.append(count)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
            return real(*arguments, **settings)

        place: Any = {"fsync": os, "replace": Path, "save": torch, "write_bytes": Path}[name]
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fail)
            train(saved)
        assert failed
        assert all(
            torch.equal(a, b)
            for a, b in zip(saved.state.model.parameters(), expected.state.model.parameters(), strict=True)
        )
        again = new(folder)
        assert again.restore()
        assert again.state.step == 2 * STEPS
        assert not list(folder.rglob(".writing-*"))
    err = capfd.readouterr().err
    assert (
        "(No space left on device): free some space or choose another folder. The state of step 1 is kept"
        in err
    )


def test_a_stop_on_a_full_disk_goes_on_from_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = new(tmp_path, minutes=0.0)

    def task_loss(raw: Any, targets: Any, size: Any) -> dict[str, torch.Tensor]:
        if saved.state.step == 3:
            monkeypatch.setattr(torch, "save", full)
        if saved.state.step == 5:
            raise KeyboardInterrupt
        return loss(raw, targets, size)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(KeyboardInterrupt):
        train(saved, task_loss)
    again = new(tmp_path)
    assert again.restore()
    assert again.state.step == 3


def test_a_disk_without_space_for_the_states_is_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(saved_training.shutil, "disk_usage", lambda _: usage(1000))
    with pytest.raises(
        WriteError, match=r"has 0 MB free, the states of this training take up to .* MB: free some"
    ):
        train(new(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_states_of_another_network_are_an_error(tmp_path: Path) -> None:
    train(new(tmp_path))
    other = new(tmp_path)
    other.state.model.append(nn.Conv2d(1, 1, 1))
    with pytest.raises(StateError, match=r"do not fit this network .*remove the folder") as caught:
        other.restore()
    assert caught.value.exit_code == 3
