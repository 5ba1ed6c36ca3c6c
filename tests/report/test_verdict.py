"""The sentence about accuracy: what it says of noise, against percentiles taken by NumPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from core.rows import ResultRow
from report import ReportData
from report.html import render_html
from report.verdict import verdicts
from tests.report.sample import make_row, sample_rows


def drawn(name: str, value: float, draws: np.ndarray) -> ResultRow:
    return make_row(name, value, draws=tuple(draws.tolist()), extras={"images": 73})


def test_a_difference_inside_its_interval_is_noise_and_one_outside_is_not() -> None:
    generator = np.random.default_rng(0)
    base, own = generator.normal(0.56, 0.02, 500), generator.normal(0, 0.004, 500)
    rows = [
        drawn("float", 0.56, base),
        drawn("engine:openvino:int8", 0.558, base - 0.002 + own),
        drawn("engine:onnxruntime:int8", 0.53, base - 0.03 + own),
        drawn("engine:tensorrt:int8", 0.59, base + 0.03 + own),
    ]
    found = {verdict.row: verdict for verdict in verdicts(rows, {})}
    assert [found[row.name].state for row in rows[1:]] == ["noise", "worse", "better"]
    low, high = np.percentile(own - 0.002, [2.5, 97.5])
    assert found["engine:openvino:int8"].text == (
        "engine:openvino:int8 reaches AP 0.5580, 0.0020 below the float model (0.5600). 95% interval of the "
        f"difference: {low:+.4f} to {high:+.4f} (paired bootstrap over 73 images). The difference is within the noise "
        "of these images."
    )
    assert "larger than the noise" in found["engine:tensorrt:int8"].text


def test_rows_without_draws_have_no_interval() -> None:
    rows = [make_row("float", 0.56), make_row("ptq", 0.56)]
    (verdict,) = verdicts(rows, {"ptq": "Chosen."})
    assert (verdict.state, verdict.remark) == ("unknown", "Chosen.")
    assert verdict.text.startswith("ptq reaches AP 0.5600, the same as the float model (0.5600).")
    assert verdicts(rows[1:], {}) == []


def test_a_metric_of_the_users_own_is_named() -> None:
    rows = [make_row(name, extras={"metric": value}) for name, value in (("float", 0.5), ("qat", 0.4))]
    assert "reaches Metric 0.4000, 0.1000 below" in verdicts(rows, {})[0].text


@pytest.mark.parametrize("gates", [None, [], ["engine:openvino:int8 loses 0.2 AP, <more> than max_ap_drop"]])
def test_missed_limits_come_first(gates: list[str] | None) -> None:
    data = dataclasses.replace(ReportData("x", None, 320, sample_rows()), gates=gates)
    page = render_html(data)
    assert ("The run misses a limit" in page) == bool(gates)
    if gates:
        assert page.index("&lt;more&gt;") < page.index("Did I lose accuracy")
