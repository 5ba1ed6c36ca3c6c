"""`quant.swap_activation=auto` in the job: what it measures, what it chooses, and when it measures again."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_rectangle import settings

from deploy import LatencyReport, Runtime
from deploy.benchmark.timing import summarize
from pipeline.main import run_job
from pipeline.stages import activation

MODEL = (
    "model=custom",
    "model.factory=test_rectangle:small",
    f"metric.factory={__name__}:mean_score",
    "qat.augment=none",
)
AUTO = (*MODEL, "quant.swap_activation=auto", "stages=[calibrate,finetune,report]")
MILLISECONDS = {"silu": 10.0, "relu": 6.0, "hardswish": 8.0}


def mean_score(predict: Any, batches: Any) -> float:
    """A measure that also tells untrained networks apart."""
    scores = torch.cat([found[:, 4] for batch in batches for found in predict(batch.images)])
    return scores.double().mean().item()


class Clock:
    """Stands for the timing: engines take the times of the table, and give their outputs for one image."""

    def __init__(self) -> None:
        self.outputs: list[list[Any]] = []

    def __call__(
        self, engines: Sequence[Runtime], shape: tuple[int, ...], *rest: Any, **more: Any
    ) -> list[LatencyReport]:
        images = np.random.default_rng(0).random(shape, dtype=np.float32)
        self.outputs.append([next(iter(engine.infer_outputs(images).values())) for engine in engines])
        names = list(MILLISECONDS)[: len(engines)]
        return [summarize("openvino", "int8", shape[0], [MILLISECONDS[name] / 1000] * 3) for name in names]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Clock]:
    """A folder with the finished run, and what was timed."""
    folder, clock = tmp_path_factory.mktemp("auto"), Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation, "benchmark_alternately", clock)
        run_job(settings(folder, *AUTO))
    return folder, clock


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def metric_of(folder: Path, row: str) -> float:
    value: float = read(folder / f"run/rows/{row}.json")["extras"]["metric"]
    return value


def test_each_candidate_is_measured_as_a_run_with_it_measures_the_row_ptq(
    finished: tuple[Path, Clock], tmp_path: Path
) -> None:
    folder, clock = finished
    measured = read(folder / "run/activation-measured.json")
    found = {one["activation"]: one for one in measured["candidates"]}
    assert list(found) == list(MILLISECONDS)
    assert {name: one["milliseconds"] for name, one in found.items()} == pytest.approx(MILLISECONDS)
    assert measured["runtime"] == "openvino"
    assert len({one["ap"] for one in found.values()}) == 3
    for name, setting in (("silu", "null"), ("hardswish", "hardswish")):
        run_job(settings(tmp_path / name, *MODEL, f"quant.swap_activation={setting}", "stages=[calibrate]"))
        assert metric_of(tmp_path / name, "ptq") == pytest.approx(found[name]["ap"], abs=1e-9)
    ((silu, relu, hardswish),) = clock.outputs
    for one, other in itertools.combinations((silu, relu, hardswish), 2):
        assert abs(one - other).max() > 1e-4  # engines of three networks


def test_the_chosen_one_is_calibrated_fine_tuned_and_reported(finished: tuple[Path, Clock]) -> None:
    folder = finished[0]
    candidates = {
        one["activation"]: one for one in read(folder / "run/activation-measured.json")["candidates"]
    }
    # the scores of a random network are nearly the same, so all are accurate enough and relu is the fastest
    assert read(folder / "run/activation.json") == {"activation": "relu"}
    assert [name for name, one in candidates.items() if one["is_chosen"]] == ["relu"]
    assert metric_of(folder, "ptq") == pytest.approx(candidates["relu"]["ap"], abs=1e-9)
    report = read(folder / "run/report.json")["activation"]
    assert report == read(folder / "run/activation-measured.json")
    text = (folder / "run/report.md").read_text()
    assert f"| relu | {candidates['relu']['ap']:.4f} | 6.00 | yes |" in text
    assert f"| silu | {candidates['silu']['ap']:.4f} | 10.00 |  |" in text
    page = (folder / "run/report.html").read_text()
    assert "Latency, median [ms]" in page
    assert f"<td>{candidates['hardswish']['ap']:.4f}</td><td>8.00</td>" in page


def test_a_resumed_run_measures_again_only_for_other_engines_or_calibration(
    finished: tuple[Path, Clock], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    clock = Clock()
    monkeypatch.setattr(activation, "benchmark_alternately", clock)
    for more in ("quant.bias_correction=true", "seed=0", "qat.learning_rate=1e-6"):
        run_job(settings(tmp_path, *AUTO, "resume=true", more))
        assert "place: done before" in capsys.readouterr().err
    monkeypatch.setitem(MILLISECONDS, "relu", 9.6)
    run_job(settings(tmp_path, *AUTO, "resume=true", "deploy.runtimes=[openvino,onnxruntime]"))
    text = capsys.readouterr().err
    assert "place again: target and runtimes of deploy has changed" in text
    assert "calibrate again: activation.json has changed" in text  # the placement is the same
    assert "hardswish has no integer kernel" in text
    assert "median 9.60 ms (-4.0%): saves less than 5% of the time" in text
    assert read(tmp_path / "run/activation.json") == {"activation": None}
    assert [len(engines) for engines in clock.outputs] == [2]
    # the user's own choice needs no measurement, and leaves none behind
    run_job(settings(tmp_path, *AUTO, "resume=true", "quant.swap_activation=relu"))
    assert "quant.swap_activation is relu, was auto" in capsys.readouterr().err
    assert len(clock.outputs) == 1
    assert not (tmp_path / "run/activation.json").exists()
    assert (tmp_path / "run/previous/activation-measured.json").exists()
    assert read(tmp_path / "run/report.json")["activation"] is None
