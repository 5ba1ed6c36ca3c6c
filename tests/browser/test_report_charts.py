"""report.html in a real browser: every place gets its chart, at both widths, without an error or a request."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from report import build_report, write_report
from tests.browser.chromium import ReportPage
from tests.report.sample import sample_data

CHARTS = {
    "accuracy", "f1", "loss-0", "gradient-0", "rate-0", "loss-1", "gradient-1", "ap-1", "share-1", "rate-1",
    "sensitivity", "weights-0", "inputs-0", "placement", "calibration", "front", "stages",
}  # fmt: skip
CHART_DATA = re.compile(r'(<script type="application/json" id="report-charts">)(.*?)(</script>)', re.DOTALL)


@pytest.mark.parametrize("width", [1440, 390])
def test_every_place_has_its_chart(page: ReportPage, report: Path, width: int) -> None:
    counts = page.open(report, width)
    assert {place.removeprefix("chart-") for place in counts["places"]} == CHARTS
    assert counts["drawn"] == counts["places"]
    assert counts["notes"] == []
    assert page.problems() == []
    assert page.run("return document.documentElement.scrollWidth") <= width, "the page scrolls sideways"


def test_charts_that_cannot_be_drawn_are_named_and_stop_no_other(
    page: ReportPage, report: Path, tmp_path: Path
) -> None:
    text = report.read_text(encoding="utf-8")
    charts = {chart["key"]: chart for chart in json.loads(CHART_DATA.search(text)[2])}  # type: ignore[index]
    charts["accuracy"]["traces"] = None
    charts["loss-0"]["traces"][0]["y"].append(1.0)
    charts["gradient-0"]["traces"][0] |= {"x": None, "y": None}
    charts["rate-0"]["traces"][0] = None
    charts["loss-1"]["key"] = "elsewhere"
    charts["ap-1"]["layout"] = None  # Plotly's own layout will do
    charts["stages"] = None
    spoilt = tmp_path / "report.html"
    changed = json.dumps(list(charts.values()))
    spoilt.write_text(CHART_DATA.sub(lambda match: match[1] + changed + match[3], text), encoding="utf-8")
    counts = page.open(spoilt)
    lost = {"accuracy", "loss-0", "gradient-0", "rate-0", "loss-1", "stages"}
    assert set(counts["drawn"]) == {f"chart-{key}" for key in CHARTS - lost}
    named = [re.match(r"Chart (\S+) was not drawn: \S+", note)[1] for note in counts["notes"]]  # type: ignore[index]
    assert sorted(named) == ["accuracy", "elsewhere", "gradient-0", "loss-0", "null", "rate-0"]
    assert page.problems() == []


def test_unreadable_chart_data_is_told(page: ReportPage, report: Path, tmp_path: Path) -> None:
    broken = tmp_path / "report.html"
    text = report.read_text(encoding="utf-8")
    broken.write_text(CHART_DATA.sub(lambda match: match[1] + "[{" + match[3], text), encoding="utf-8")
    page.load(broken)
    page.until("return document.querySelector('.not-drawn')")
    assert page.counts()["notes"][0].startswith("Chart data was not drawn: ")
    assert page.problems() == []


def test_a_point_tells_its_figures_when_pointed_at(page: ReportPage, report: Path) -> None:
    page.open(report)
    page.run("document.getElementById('chart-sensitivity').scrollIntoView({block: 'center'})")
    middle = page.run(
        "const r = document.querySelector('#chart-sensitivity .bars .point path').getBoundingClientRect();"
        "return [r.x + r.width / 2, r.y + r.height / 2]"
    )
    page.move_mouse(*middle)
    page.until("return document.querySelector('#chart-sensitivity .hovertext')")
    told = page.run("return document.querySelector('#chart-sensitivity .hovertext')?.textContent")
    assert (
        told
        == "backbone.block1score: 1layers: layer10kept float: 100,000 MACs, 2.50% of the network, leave INT8"
    )


def test_the_front_shows_the_plans_of_one_precision_the_chosen_one_and_what_was_measured(
    page: ReportPage, report: Path
) -> None:
    page.open(report)
    all_of = "[...document.querySelectorAll('{}')].map({})".format
    names = all_of("#chart-front .legendtext", "e => e.textContent")
    page.until(f"return {names}.length === 6")
    assert page.run(f"return {names}") == [
        "front", "all FP16", "all INT8", "all FP8", "chosen", "measured AP loss",
    ]  # fmt: skip
    centre = "e => (r => [r.x + r.width / 2, r.y + r.height / 2])(e.getBoundingClientRect())"
    traces = all_of(
        "#chart-front .scatterlayer .trace", f"t => [...t.querySelectorAll('.point')].map({centre})"
    )
    front, *uniform, chosen, measured = page.run(f"return {traces}")
    assert [len(points) for points in (front, *uniform, chosen, measured)] == [3, 1, 1, 1, 1, 4]
    assert chosen[0] == pytest.approx(front[1], abs=1)  # the plan in the middle
    assert uniform[0][0] == pytest.approx(front[2], abs=1)  # FP16 is the slow end
    assert measured[3][0] > chosen[0][0]  # 0.01 ms slower when built again
    assert measured[3][1] > chosen[0][1]  # and lower on the page, with the smaller loss
    table = page.run(f"return {all_of('[aria-labelledby=autotune] tbody tr', 'e => e.innerText.trim()')}")
    assert [line.split("\t")[0] for line in table] == ["all FP16", "all INT8", "all FP8", "on the front"]
    assert table[3].split("\t")[1:] == [
        "3 float, 4 FP8, 2 INT8", "1.500", "1.510", "0.0040", "0.0030", "0.5970", "0 of 9", "yes",
    ]  # fmt: skip
    assert page.problems() == []


def test_charts_follow_the_width_of_the_window(page: ReportPage, report: Path) -> None:
    width_of = "document.querySelector('#chart-accuracy .main-svg').getBoundingClientRect().width"
    page.open(report, 1440)
    wide = page.run(f"return {width_of}")
    page.resize(390)
    page.until(f"return {width_of} < 390")
    assert page.run(f"return {width_of}") < 390 < wide


def test_long_names_are_shortened_on_a_narrow_page_only(page: ReportPage, tmp_path: Path) -> None:
    name = "backbone.stage3.branch1.csp.bottlenecks.2.add"
    data = dataclasses.replace(sample_data(), sensitivity=[{"unit": name, "score": 1.0}])
    labels = "return [...document.querySelectorAll('#chart-sensitivity .ytick')].map(e => e.textContent)"
    html = write_report(tmp_path, data).html
    page.open(html, 1440)
    assert page.run(labels) == [name]
    page.resize(390)
    page.until(f"{labels}[0]?.length <= 20")
    assert page.run(labels) == ["…p.bottlenecks.2.add"]


def test_charts_follow_light_and_dark(page: ReportPage, report: Path) -> None:
    page.open(report, scheme="light")
    background = "document.querySelector('#chart-stages').layout.paper_bgcolor"
    assert page.run(f"return {background}") == "#ffffff"
    page.set_scheme("dark")
    page.until(f"return {background} !== '#ffffff'")
    assert page.run(f"return {background}") == "#1c2024"
    assert page.problems() == []


@pytest.mark.parametrize("width", [1440, 390])
def test_runs_side_by_side(page: ReportPage, tmp_path: Path, width: int) -> None:
    for name in ("first", "second"):
        write_report(tmp_path / name, sample_data())
    html = build_report([tmp_path / "first", tmp_path / "second"], tmp_path / "comparison.html")
    counts = page.open(html, width)
    assert counts == {"places": ["chart-accuracy"], "drawn": ["chart-accuracy"], "notes": []}
    assert page.problems() == []
    assert page.run("return document.documentElement.scrollWidth") <= width
