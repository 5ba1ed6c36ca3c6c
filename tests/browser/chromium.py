"""One headless Chromium for the tests that look at a report as a reader does.

Debian has both programs: `apt-get install chromium chromium-driver`. Their paths are given to selenium, so that it
neither searches for a browser nor downloads one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
SECONDS = 20.0  # until everything is drawn; one or two are usual
COUNTS = """
const places = [...document.querySelectorAll('div.plot')];
const notes = [...document.querySelectorAll('.not-drawn')].filter(line => line.offsetHeight > 0);
return {
  places: places.map(place => place.id),
  drawn: places.filter(place => place.querySelector('.point, .js-line')).map(place => place.id),  // by marks
  notes: notes.map(line => line.textContent),
};
"""


class ReportPage:
    """A report in the browser.

    Args:
        driver: selenium's driver of Chromium, with the logs "browser" and "performance".
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.address = ""

    def load(self, path: Path, width: int = 1440, scheme: str = "light") -> None:
        """Show the file in a window of that width, in pixels."""
        self.problems()  # forget those of an earlier page
        self.resize(width)
        self.set_scheme(scheme)
        self.address = path.resolve().as_uri()
        self.driver.get(self.address)

    def open(self, path: Path, width: int = 1440, scheme: str = "light") -> dict[str, list[str]]:
        """Show the file, have all charts drawn as for print, wait until each is drawn or reported; return `counts`."""
        self.load(path, width, scheme)
        self.run("window.dispatchEvent(new Event('beforeprint'))")
        self.until(
            f"const c = (() => {{{COUNTS}}})(); return c.drawn.length + c.notes.length >= c.places.length"
        )
        return self.counts()

    def resize(self, width: int, height: int = 1000) -> None:
        """Give the window another size, in pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def set_scheme(self, scheme: str) -> None:
        """Switch to "light" or "dark"."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def move_mouse(self, x: float, y: float) -> None:
        """Move the pointer to a point of the window, in pixels from its upper left corner."""
        event = {"type": "mouseMoved", "x": x, "y": y}
        self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)

    def run(self, script: str, *arguments: object) -> Any:
        """Return what the JavaScript returns."""
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str) -> None:
        """Wait until the JavaScript returns something true, at most SECONDS; go on in any case."""
        from selenium.common.exceptions import TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        with suppress(TimeoutException):
            WebDriverWait(self.driver, SECONDS, poll_frequency=0.1).until(lambda _: self.run(script))

    def counts(self) -> dict[str, list[str]]:
        """Return the ids of all places, of those with a chart, and the visible lines about charts not drawn."""
        return dict(self.run(COUNTS))

    def problems(self) -> list[str]:
        """Return console errors and warnings, and requests to anything but the page, since the last call.

        Pages of the browser itself (`chrome:`) are its own matter.
        """
        found = [entry["message"] for entry in self.driver.get_log("browser")]
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                address = message["params"]["request"]["url"]
                if address != self.address and not address.startswith(("data:", "blob:", "chrome:")):
                    found.append(f"request: {address}")
        return found


WIDTHS = (1440, 390)  # pixels: a desk, and a telephone


def check_report(path: Path, profile: Path) -> set[str]:
    """Open a report at both widths: every chart has marks, nothing is requested or logged, nothing runs off the page.

    Returns:
        The charts, by key.
    """
    with report_page(profile) as page:
        for width in WIDTHS:
            counts = page.open(path, width)
            assert counts["drawn"] == counts["places"]
            assert counts["notes"] == []
            assert page.problems() == []
            assert page.run("return document.documentElement.scrollWidth") <= width
        boxes = page.run("return document.querySelectorAll('.box').length")
        page.run(
            "const s = document.getElementById('graph-search'); s.value = 'conv'; s.dispatchEvent(new Event('input'))"
        )
        assert 0 < page.run("return document.querySelectorAll('.box.found').length") < boxes
        pictures = page.run(
            "return [...document.querySelectorAll('.store image')].map(e => e.getBBox().width)"
        )
        assert len(pictures) > 0
        assert all(side > 0 for side in pictures)
    return {place.removeprefix("chart-") for place in counts["places"]}


@contextmanager
def report_page(profile: Path) -> Iterator[ReportPage]:
    """Start Chromium with a fresh profile folder; skip the test where Chromium or its driver is absent."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("Chromium is absent: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(programs[0])
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    try:
        yield ReportPage(driver)
    finally:
        driver.quit()
