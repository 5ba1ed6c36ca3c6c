"""Training steps that processes take together are those of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lacking_memory import CASES
from shared_training import equal, train
from test_team_members import lines_with, run_team

TOLERANCE = 1e-5  # of the largest magnitude of each tensor: sums are taken in another order


def train_pair(folder: Path, kind: str, stop: str = "all", *more: str, size: int = 2) -> list[dict[str, Any]]:
    """The states of all processes of a team."""
    folder.mkdir(exist_ok=True)
    codes, errors, _ = run_team("shared_training.py", kind, str(folder), stop, *more, size=size)
    assert codes == [0] * size, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def assert_close(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for part in ("model", "average"):
        one = wanted[part] if part == "model" else wanted[part]["model"]
        shared = found[part] if part == "model" else found[part]["model"]
        for name, value in one.items():
            if value.is_floating_point():
                scale = max(float(value.abs().max()), 1e-3)
                assert float((shared[name] - value).abs().max()) < TOLERANCE * scale, name
    for ours, theirs in zip(found["records"], wanted["records"], strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=TOLERANCE)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=10 * TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float", "quantized", "sampled"])
def test_two_processes_train_as_one(tmp_path: Path, kind: str) -> None:
    """Weights, learned scales, BatchNorm statistics, average, losses and gradient norms."""
    states = train_pair(tmp_path, kind)
    assert equal(*[{**state, "random": None} for state in states])  # the processes agree to the last bit
    alone = train(kind).state_dict()
    assert_close(states[0], alone)
    figures = states[0]["records"][-1]["figures"]
    assert {"images_per_second_0", "images_per_second_1", "scaling_efficiency"} <= set(figures)
    assert figures["scaling_efficiency"] > 0
    changed = [name for name, value in alone["model"].items() if "log_scale" in name]
    assert (kind == "float") == (not changed)


@pytest.mark.slow
def test_processes_agree_on_a_smaller_micro_batch_where_one_lacks_memory(tmp_path: Path) -> None:
    """The second one has memory for one image of its four: in both, four parts; the step is that of the batch."""
    states = train_pair(tmp_path, "sampled", "all", "0", "1")
    assert equal(*[{**state, "random": None} for state in states])
    assert states[0]["accumulation"] == {"configured": None, "micro_batch": 1}
    assert_close(states[0], train("sampled").state_dict())


@pytest.mark.slow
def test_processes_take_a_step_again_where_one_runs_out_of_memory() -> None:
    """The others wait in an exchange: of BatchNorm, of the loss, or of some of the gradients."""
    codes, errors, _ = run_team("lacking_memory.py")
    assert [text.count("equal: ") for text in errors] == [len(CASES)] * 2, errors
    assert codes == [3, 3]
    assert len(lines_with(errors, "^error: The memory of the machine or container is used up")) == 1
    assert not lines_with(errors, "Traceback"), errors


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [2, 3])  # 3 processes: shares of 3, 3 and 2 images
def test_processes_in_parts_train_as_one(tmp_path: Path, size: int) -> None:
    """BatchNorm layers look at the parts of all processes that are taken at the same time."""
    for kind in ("quantized", "sampled"):
        states = train_pair(tmp_path, kind, "all", "1", "8", size=size)
        assert_close(states[0], train(kind).state_dict())
    shared = train_pair(tmp_path, "float", "all", "2", "8", size=size)
    assert equal(*[{**state, "random": None} for state in shared[:2]])


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["float", "quantized"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_stopped_team_goes_on_exactly(tmp_path: Path, kind: str, size: int) -> None:
    """With as many processes bit for bit; with another number within the tolerance."""
    whole = train_pair(tmp_path / "whole", kind, size=size)
    part = train_pair(tmp_path / "part", kind, "2", size=size)
    assert part[0]["epoch"] == 2
    resumed = train_pair(tmp_path / "part", kind, "resume", size=size)
    assert equal(*[{**states[0], "random": None} for states in (whole, resumed)])
    assert_close(train(kind, earlier=part[0]).state_dict(), whole[0])
