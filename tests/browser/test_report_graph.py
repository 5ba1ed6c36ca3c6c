"""The network graph of report.html in a real browser: search, zoom, pan, and the group that a click shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser.chromium import ReportPage

VIEW = "return document.querySelector('#graph-frame svg').getAttribute('viewBox').split(' ').map(Number)"
BOX = "document.querySelector(`.box[data-search^='backbone.block7.conv']`)"


@pytest.fixture(scope="module", params=[1440, 390])
def opened(page: ReportPage, report: Path, request: pytest.FixtureRequest) -> ReportPage:
    page.load(report, request.param)
    page.run("document.getElementById('graph-frame').scrollIntoView({block: 'center'})")
    return page


def click(page: ReportPage, element: str) -> None:
    """Press and release the mouse in the middle of an element."""
    x, y = page.run(
        f"const r = {element}.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]"
    )
    for kind in ("mousePressed", "mouseReleased"):
        page.driver.execute_cdp_cmd(
            "Input.dispatchMouseEvent", {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
        )


def test_search_marks_boxes_and_next_goes_to_them(opened: ReportPage) -> None:
    opened.run(
        "const s = document.getElementById('graph-search'); s.value = 'Block7.'; s.dispatchEvent(new Event('input'))"
    )
    assert opened.run("return document.querySelectorAll('.box.found').length") == 1
    assert opened.run("return document.getElementById('graph-count').textContent") == "1 found"
    assert (
        float(opened.run("return getComputedStyle(document.querySelector('.box:not(.found)')).opacity")) < 0.5
    )
    click(opened, "document.getElementById('graph-next')")
    frame, box = opened.run(
        "const m = e => { const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; };"
        f"return [m(document.getElementById('graph-frame')), m({BOX})]"
    )
    assert box == pytest.approx(frame, abs=3)
    assert "backbone.block7.conv" in opened.run("return document.getElementById('graph-details').textContent")
    assert opened.problems() == []


def test_a_click_shows_the_figures_and_the_group(opened: ReportPage) -> None:
    click(opened, "document.getElementById('graph-all')")
    click(opened, BOX)
    told = opened.run("return document.getElementById('graph-details').textContent")
    assert "Reads the groupbackbone.block6.act" in told
    assert "Output in the groupbackbone.block7.act" in told
    assert "Sensitivity of" not in told  # the units of the sample have other names
    marked = opened.run(
        "return [...document.querySelectorAll('.box.member')].map(e => e.dataset.search.split(' ')[0])"
    )
    assert marked == [f"backbone.block{number}.conv" for number in (6, 7, 8)]
    assert opened.problems() == []


def test_zoom_pan_and_back(opened: ReportPage) -> None:
    click(opened, "document.getElementById('graph-all')")
    whole = opened.run(VIEW)
    click(opened, "document.getElementById('graph-in')")
    nearer = opened.run(VIEW)
    assert nearer[2] == pytest.approx(whole[2] / 1.5)
    x, y = opened.run(
        "const r = document.querySelector('#graph-frame svg').getBoundingClientRect(); return [r.x + 50, r.y + 50]"
    )
    for kind, dx in (("mousePressed", 0), ("mouseMoved", 20), ("mouseMoved", 40), ("mouseReleased", 40)):
        opened.driver.execute_cdp_cmd(
            "Input.dispatchMouseEvent",
            {"type": kind, "x": x + dx, "y": y, "button": "left", "buttons": 1, "clickCount": 1},
        )
    assert opened.run(VIEW)[0] < nearer[0]
    before = opened.run("return document.querySelector('#graph-frame svg').viewBox.baseVal.width")
    opened.driver.execute_cdp_cmd(
        "Input.dispatchMouseEvent",
        {"type": "mouseWheel", "x": x, "y": y, "deltaX": 0, "deltaY": -120, "modifiers": 2},
    )
    opened.until(f"return document.querySelector('#graph-frame svg').viewBox.baseVal.width < {before}")
    assert opened.run("return document.querySelector('#graph-frame svg').viewBox.baseVal.width") < before
    click(opened, "document.getElementById('graph-all')")
    assert opened.run(VIEW) == whole
    assert opened.problems() == []
