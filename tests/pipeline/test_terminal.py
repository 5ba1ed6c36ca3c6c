"""What a run says on a terminal: the number of each stage, the time left, and what to do next."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from test_stages import SmallJob, write

from core.rows import FLOAT, ResultRow, engine_key
from pipeline.main import run_stages
from pipeline.run.directory import Run
from pipeline.run.estimate import Estimate, duration
from pipeline.run.ledger import Inputs
from pipeline.run.terminal import print_result
from pipeline.stages.stage import Stage
from report import ReportData, format_verdicts, write_report

SETTINGS = {"first": {"seed": 0}, "second": {"epochs": 5}}


def earlier_run(folder: Path, seconds: dict[str, float], age: float = 0.0, epochs: int = 5) -> Run:
    """A finished run of two stages."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    run = Run(folder)
    for name, chosen in {**SETTINGS, "second": {"epochs": epochs}}.items():
        run.ledger.finish(name, Inputs(chosen, {}), {}, seconds[name])
    when = (folder / "config.yaml").stat().st_mtime - age
    os.utime(folder, (when, when))
    return run


def new_run(folder: Path) -> Run:
    folder.mkdir()
    return Run(folder)


def test_the_estimate_is_that_of_the_newest_run_with_the_same_settings(tmp_path: Path) -> None:
    earlier_run(tmp_path / "old", {"first": 1.0, "second": 2.0}, age=500)
    earlier_run(tmp_path / "newer", {"first": 10.0, "second": 100.0}, age=100)
    earlier_run(tmp_path / "other", {"first": 7.0, "second": 7.0}, epochs=6)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.yaml").touch()
    (tmp_path / "broken/state.json").write_text("{")
    estimate = Estimate(new_run(tmp_path / "now"), SETTINGS)
    assert estimate.left(["first", "second"]) == pytest.approx(110.0)
    assert estimate.describe(["first", "second"]) == f", about 2 min left (as in {tmp_path / 'newer'})"
    estimate.note("first", 30.0)  # three times as slow here
    assert estimate.left(["second"]) == pytest.approx(300.0)


def test_without_an_earlier_run_there_is_no_estimate(tmp_path: Path) -> None:
    earlier_run(tmp_path / "other", {"first": 7.0, "second": 7.0}, epochs=6)
    estimate = Estimate(new_run(tmp_path / "now"), SETTINGS)
    assert estimate.left(["second"]) is None
    assert estimate.describe(["second"]) == ""


def test_durations_are_rounded_as_a_reader_says_them() -> None:
    found = [duration(seconds) for seconds in (0.4, 42, 59.4, 59.6, 200, 3599, 9000)]
    assert found == ["0 s", "42 s", "59 s", "1 min", "3 min", "1 h 0 min", "2 h 30 min"]


def test_stages_are_counted_and_those_that_are_done_are_no_part_of_the_estimate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("pipeline.main.say", said.append)
    stages = [
        Stage(name, write(f"{name}.json"), settings=("seed",), writes=(f"{name}.json",)) for name in "ab"
    ]
    first = SmallJob(new_run(tmp_path / "first").directory)
    run_stages(first, stages)  # type: ignore[arg-type]
    assert said == ["[1/2] --- a", "[2/2] --- b"]
    (tmp_path / "first/config.yaml").touch()
    second = SmallJob(new_run(tmp_path / "second").directory)
    run_stages(second, stages[:1])  # type: ignore[arg-type]
    said.clear()
    run_stages(second, stages)  # type: ignore[arg-type]
    assert said == ["[1/2] a: done before", f"[2/2] --- b, about 0 s left (as in {tmp_path / 'first'})"]


def test_a_run_ends_with_the_next_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [
        {"title": "Continue this run", "command": "again"},
        {"title": "See what it detects", "command": "predict"},
    ]
    (tmp_path / "report.html").touch()
    print_result(Run(tmp_path), commands)
    assert capsys.readouterr().out.splitlines() == [f"report: {tmp_path / 'report.html'}", "next: predict"]
    print_result(Run(tmp_path), commands[:1])
    assert capsys.readouterr().out.splitlines()[-1] == "next: again"


def test_a_run_ends_with_the_sentences_of_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each once: the sentence, its interval, whether it is noise, and that the images also chose the weights."""
    random = np.random.default_rng(0)
    draws = 0.5 + random.normal(0, 0.01, 1000)
    engine = engine_key("openvino", "int8")
    rows = [
        ResultRow(FLOAT, ap=0.5, draws=tuple(draws)),
        ResultRow(engine, ap=0.499, draws=tuple(draws - 0.001 + random.normal(0, 0.002, 1000))),
    ]
    run = new_run(tmp_path / "run")
    for row in rows:
        run.write_row(row)
    chosen = {engine.name: "Chosen on these images."}
    print_result(run, (), chosen)
    printed = capsys.readouterr().out
    differences = np.array(rows[1].draws) - np.array(rows[0].draws)
    low, high = np.percentile(differences, (2.5, 97.5))
    assert f"interval of the difference: {low:+.4f} to {high:+.4f}" in printed
    assert "0.0010 below the float model (0.5000)" in printed
    assert "within the noise of these images. Chosen on these images.\n" in printed
    page = write_report(run.directory, ReportData("x", None, 64, rows=rows, chosen=chosen)).html.read_text()
    for sentence in format_verdicts(rows, chosen).splitlines():
        assert sentence in printed
        assert sentence.removesuffix(" Chosen on these images.") in page
