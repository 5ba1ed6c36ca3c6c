"""Runs side by side: what differs, and whether it is noise."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from report import ReportData, build_report, write_report
from report.__main__ import main
from report.compare import HEADINGS, is_paired, render_comparison
from report.compare import _line as line
from tests.report.sample import EVIL, sample_data, sample_rows

HASHES = {"val split": "cd" * 32}


def run(shift: float, noise: float, hashes: dict[str, str] = HASHES, **changes: object) -> ReportData:
    """A run whose INT8 engine scores `shift` more than that of the sample, on draws that differ by `noise`."""
    rows = sample_rows()
    engine = rows[-1]
    differences = np.random.default_rng(5).normal(shift, noise, len(engine.draws))
    draws = tuple((np.array(engine.draws) + differences).tolist())
    rows[-1] = dataclasses.replace(engine, ap=(engine.ap or 0) + shift, draws=draws)
    return dataclasses.replace(sample_data(), rows=rows, hashes=hashes, **changes)


@pytest.mark.parametrize(("shift", "noise", "verdict"), [(0.02, 0.002, "no"), (0.001, 0.01, "yes")])
def test_the_difference_to_the_first_run_is_paired(shift: float, noise: float, verdict: str) -> None:
    first, second = run(0, 0), run(shift, noise)
    found = dict(zip(HEADINGS, line("b", second, first), strict=True))
    differences = np.subtract(second.rows[-1].draws, first.rows[-1].draws)
    low, high = np.percentile(differences, [2.5, 97.5])
    assert found["Difference to the first run"] == f"{shift:+.4f} ({low:+.4f} to {high:+.4f})"
    assert found["Noise"] == verdict
    assert (found["Shipped row"], found["Speed-up"], found["Size MB"]) == (
        "engine:openvino:int8",
        "2.00x",
        "2.00",
    )


def test_other_images_have_no_paired_interval() -> None:
    first, second = run(0, 0), run(0.01, 0.001, {"val split": "ef" * 32})
    assert not is_paired(second, first)
    found = dict(zip(HEADINGS, line("b", second, first), strict=True))
    assert (found["Difference to the first run"], found["Noise"]) == ("+0.0100", "-")
    assert "other images than a" in render_comparison([("a", first), ("b", second)])
    limited = dataclasses.replace(first, configuration={"data.limit_val": 8})
    assert not is_paired(limited, first)


def test_only_settings_that_differ_are_listed() -> None:
    page = render_comparison(
        [("a", run(0, 0)), (EVIL, run(0, 0, configuration={"seed": 4, "stages": ["float"]}))]
    )
    settings = page[
        page.index("<caption>Settings</caption>") : page.index("Octet, machine and libraries: the same")
    ]
    assert "seed" in settings
    assert "stages" not in settings
    assert "<img" not in page


def test_the_command_builds_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two", "three"):
        write_report(tmp_path / "runs" / name, run(0, 0))
    runs = [str(tmp_path / "runs" / name) for name in ("one", "two", "three")]
    assert main([*runs, "--output", str(tmp_path / "all.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "all.html")
    text = (tmp_path / "all.html").read_text(encoding="utf-8")
    assert all(f"runs/{name}" in text for name in ("one", "two", "three"))
    assert main([runs[0], runs[0]]) == 3
    assert "named twice" in capsys.readouterr().err


def test_runs_without_rows_are_compared_all_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report(tmp_path / name, ReportData(name, None, 320, []))
    page = build_report([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html")
    assert page.stat().st_size < 30_000  # no chart, no plotly
