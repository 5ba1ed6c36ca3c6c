"""The written reports: JSON against the promised keys, HTML through a parser, and both whole or not at all."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from core.errors import ReportError
from core.files import write_text
from core.rows import FLOAT, ResultRow, engine_key
from report import DetectionPanel, ReportData, write_report
from report.__main__ import main
from report.charts import Chart
from report.html import chart_json, headline
from tests.report.sample import EVIL, make_row, sample_data, sample_rows

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, text per element, and unbalanced tags."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.unbalanced: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str, str]:
    paths = write_report(tmp_path_factory.mktemp("run"), sample_data())
    return json.loads(paths.json.read_text()), paths.markdown.read_text(), paths.html.read_text()


@pytest.fixture(scope="module")
def page(written: tuple[dict, str, str]) -> Page:
    return Page(written[2])


def test_json_holds_what_is_promised(written: tuple[dict, str, str]) -> None:
    content = written[0]
    assert {"rows", "experiment", "weights", "image_size", "versions", "machine", "stages"} <= set(content)
    row_keys = {
        "name", "kind", "runtime", "engine_precision", "ap", "ap50", "precision", "recall",
        "latency_ms_median", "latency_ms_p99", "images_per_second", "size_bytes",
    }  # fmt: skip
    for row in content["rows"]:
        assert set(row) == {*row_keys, "extras", "operating_point", "draws"}
    assert [row["name"] for row in content["rows"]] == [
        "float", "ptq", "qat", "engine:openvino:f32", "engine:openvino:int8",
    ]  # fmt: skip
    assert content["rows"][0]["latency_ms_median"] is None
    assert content["rows"][4]["latency_ms_median"] == 10.0
    assert content["rows"][4]["size_bytes"] == 2_000_000
    assert content["stages"] == [{"name": "float", "seconds": 12.5}, {"name": "finetune", "seconds": 130.0}]
    assert content["image_size"] == 320


def test_json_writes_null_for_nan(tmp_path: Path) -> None:
    data = ReportData(
        "x", None, 320, [make_row("float", ap=math.nan, ap50=math.inf, extras={"deep": [math.nan, 1.0]})]
    )
    row = json.loads(write_report(tmp_path, data).json.read_text(), parse_constant=pytest.fail)["rows"][0]
    assert row["ap"] is None
    assert row["ap50"] is None
    assert row["extras"] == {"deep": [None, 1.0]}


def test_model_facts_stand_in_every_report(written: tuple[dict, str, str], page: Page) -> None:
    content, markdown, _ = written
    assert content["model"]["macs"] == 4_000_000
    assert [layer["precision"] for layer in content["model"]["layers"]].count("INT8") == 20
    assert "75.0% INT8, 25.0% float" in markdown
    assert "75.0% INT8, 25.0% float" in page.texts["td"]
    assert {"4,000,000", "8, 16", "5.00%", "16 x 40 x 40"} <= set(page.texts["td"])
    names = {f"layer{n}" for n in range(30) if n != 25} | {EVIL}
    assert names <= set(page.texts["th"]), "every layer in the page"
    section = markdown.split("### The 20 layers")[1].split("##")[0]
    assert "layer29" in section
    assert "layer19" not in section, "the cheap ones are left out here"


def test_the_operating_point_stands_in_every_report(written: tuple[dict, str, str], page: Page) -> None:
    content, markdown, _ = written
    points = {row["name"]: row["operating_point"] for row in content["rows"]}
    assert points["qat"] is None
    assert points["float"]["overall"]["agreement"] is None
    assert points["ptq"]["overall"]["agreement"]["drop_in"] is False
    assert points["engine:openvino:int8"]["overall"]["agreement"]["drop_in"] is True
    assert (points["ptq"]["confidence"], points["ptq"]["best_confidence"]) == (0.25, 0.3)
    assert len(points["ptq"]["f1_curve"]) == 101
    line = "| ptq | 0.8000 | 0.7500 | 0.7742 | 0.9000 | 0.30 | 93.00% | 1.50% | -0.0200 | no |"
    assert line in markdown
    assert "| 99.50% | 1.50% | +0.0010 | yes |" in markdown
    assert "| float | cell | 220 | 210 | 0.8000 | 0.7500 | 0.7742 | - | - | - |" in markdown
    assert "At confidence 0.25, IoU 0.5." in markdown
    assert "Would users notice" in page.texts["h2"]
    assert {"93.00%", "-0.0200", "yes", "no"} <= set(page.texts["td"])


def test_a_report_without_operating_points_has_no_such_section(tmp_path: Path) -> None:
    paths = write_report(tmp_path, ReportData("x", None, 320, [make_row("float", ap=0.5)]))
    assert "Would users notice" not in paths.html.read_text(encoding="utf-8")
    assert "Would users notice" not in paths.markdown.read_text(encoding="utf-8")


def test_html_is_well_formed(page: Page) -> None:
    assert page.unbalanced == []
    assert len(page.all("h1")) == 1


def test_html_fetches_nothing(page: Page) -> None:
    addresses = [
        value
        for _, attributes in page.elements
        for key, value in attributes.items()
        if key in ("src", "href")
    ]
    assert addresses
    assert all(address.startswith(("data:image/jpeg;base64,", "#picture-")) for address in addresses)
    assert page.all("link") == []
    policy = next(
        meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy


def test_html_holds_plotly_once_and_draws_every_chart(page: Page) -> None:
    scripts = page.all("script")
    assert (
        len(scripts) == 5
    )  # data and script of the graph, data of the charts, plotly.js, and what draws them
    assert sum(len(text) > 1_000_000 for text in page.texts["script"]) == 1
    charts = json.loads(next(text for text in page.texts["script"] if text.lstrip().startswith("[{")))
    places = {attributes["id"] for attributes in page.all("div") if attributes.get("class") == "plot"}
    assert places == {f"chart-{chart['key']}" for chart in charts}
    assert {chart["key"] for chart in charts} == {
        "accuracy", "f1", "loss-0", "gradient-0", "rate-0", "loss-1", "gradient-1", "ap-1", "share-1", "rate-1",
        "sensitivity", "weights-0", "inputs-0", "placement", "calibration", "front", "stages",
    }  # fmt: skip
    settling = next(chart for chart in charts if chart["key"] == "calibration")
    assert [(trace["x"], trace["y"]) for trace in settling["traces"]] == [
        ([8, 16, 32], [0.4, 0.03, 0.0]),
        ([8, 16, 32], [0.1, 0.01, 0.0]),
    ]
    loss = next(chart for chart in charts if chart["key"] == "loss-0")
    assert [trace["name"] for trace in loss["traces"]] == ["box", "cls", "distillation"]
    assert len(loss["traces"][0]["x"]) == 200


def test_a_malicious_name_stays_text(page: Page, written: tuple[dict, str, str]) -> None:
    assert EVIL in page.texts["h3"]
    assert [image for image in page.all("img") if image.get("src") == "x"] == []
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert "alert(1)>" not in written[2].replace(EVIL.replace("<", "&lt;"), "")
    assert "<img" not in written[1]
    assert "<script" not in written[1]


def test_chart_data_cannot_end_its_script() -> None:
    traces = [{"name": EVIL + "&amp;"}]
    text = chart_json([Chart("time", "a", "title", "description", traces, {})])
    assert not set("<>&") & set(text)
    assert json.loads(text)[0]["traces"] == traces


def test_tables_are_accessible(page: Page) -> None:
    tables = page.all("table")
    assert len(tables) >= 6
    assert len(page.all("caption")) == len(tables)
    assert all(header.get("scope") in ("row", "col") for header in page.all("th"))
    assert all(image["alt"] for image in page.all("img"))
    assert page.all("html") == [{"lang": "en"}]


def test_pictures_are_inside(page: Page) -> None:
    (image,) = page.all("image")
    picture = Image.open(io.BytesIO(base64.b64decode(image["href"].split(",", 1)[1])))
    assert picture.size == (160, 120)
    assert [use["href"] for use in page.all("use")] == ["#picture-0"] * 3
    boxes = [rect for rect in page.all("rect") if rect.get("width") == "50.0"]
    assert [(box["x"], box["y"], box["height"]) for box in boxes] == [("10.0", "10.0", "60.0")] * 2
    assert [shape["points"] for shape in page.all("polygon")] == ["12.0 9.0 61.0 9.0 61.0 72.0"]


def test_report_json_gives_the_same_page_again(tmp_path: Path) -> None:
    paths = write_report(tmp_path, sample_data())
    first = paths.html.read_text(encoding="utf-8")
    paths.html.unlink()
    assert main([str(tmp_path)]) == 0
    assert paths.html.read_text(encoding="utf-8") == first


def test_a_report_json_without_a_part_gives_a_page_without_it(tmp_path: Path) -> None:
    paths = write_report(tmp_path, sample_data())
    content = json.loads(paths.json.read_text(encoding="utf-8"))
    del content["graph"]
    paths.json.write_text(json.dumps(content), encoding="utf-8")
    assert main([str(tmp_path)]) == 0
    text = paths.html.read_text(encoding="utf-8")
    assert "<li>What runs where: the stage export did not run.</li>" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not valid JSON"),
        ('{"rows": []}', "another version of Octet"),
        ('{"format": 2}', "is damaged"),
    ],
)
def test_an_unusable_report_json_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    assert main([str(tmp_path)]) == 3
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_an_empty_report_is_still_a_report(tmp_path: Path) -> None:
    text = write_report(tmp_path, ReportData("empty", None, 320, [])).html.read_text()
    assert Page(text).unbalanced == []
    assert len(text) < 20_000  # no chart, no plotly
    for part in (
        "Accuracy over latency",
        "Operating point",
        "Which layers matter",
        "What runs where",
        "Training",
    ):
        assert f"<li>{part}: " in text


def test_a_full_report_lacks_nothing(written: tuple[dict, str, str]) -> None:
    assert "Not in this report" not in written[2]
    assert "## What next" in written[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [make_row("float"), make_row("float")]}, "float appear twice"),
        ({"stages": [{"name": "float"}]}, "lacks seconds"),
        ({"model": {"parameters": 1, "macs": 2, "strides": [], "shares": {}}}, "lacks layers"),
        ({"sensitivity": [{"score": 1.0}]}, "lacks unit"),
        ({"detections": [DetectionPanel("cells", b"GIF89a", (9, 9))]}, "not a JPEG"),
        ({"class_names": ["cell"]}, "class 1: expected one of 1 class names"),
        ({"commands": [{"title": "Again"}]}, "lacks command"),
    ],
)
def test_bad_data_is_named_and_nothing_is_written(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ReportError, match=message):
        write_report(tmp_path, dataclasses.replace(sample_data(), **change))
    assert list(tmp_path.iterdir()) == []


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.json"
    write_text(target, "old")

    def full_disk(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("core.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_text(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_headline_figures() -> None:
    tiles = {tile["label"]: (tile["value"], tile["remark"]) for tile in headline(sample_rows())}
    assert tiles["Float AP"][0] == "0.5984"
    assert tiles["INT8 AP"] == ("0.5990", "+0.0006 against float, engine:openvino:int8")
    assert tiles["Speed"][0] == "2.00x"
    assert tiles["Size"] == ("2.00 MB", "25% of engine:openvino:f32")


def test_headline_shows_the_score_that_decides() -> None:
    rows = [
        ResultRow(FLOAT, ap=0.6, extras={"ap_mask": 0.5}),
        ResultRow(engine_key("openvino", "int8"), ap=0.6, extras={"ap_mask": 0.49}),
    ]
    tiles = {tile["label"]: (tile["value"], tile["remark"]) for tile in headline(rows)}
    assert tiles == {
        "Float Mask AP": ("0.5000", "the reference"),
        "INT8 Mask AP": ("0.4900", "-0.0100 against float, engine:openvino:int8"),
    }


def test_activations_that_were_measured_are_listed(written: tuple[dict, str, str], page: Page) -> None:
    assert written[0]["activation"]["candidates"][2] == {
        "activation": "hardswish", "ap": 0.6023, "milliseconds": 10.125, "is_chosen": True,
    }  # fmt: skip
    assert "| Activation | AP after calibration | Latency, median [ms] | Chosen |" in written[1]
    assert "| hardswish | 0.6023 | 10.12 | yes |" in written[1]
    assert "| relu | - | 9.00 |  |" in written[1]
    assert "AP after calibration" in page.texts["th"]
    assert "10.12" in page.texts["td"]
