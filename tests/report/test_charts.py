"""Charts of the report as data: honest axes, intervals, and what a unit costs in float."""

from __future__ import annotations

import pytest

from report.charts import LEAST_SPAN, accuracy_chart, sensitivity_chart
from report.histograms import histogram_charts
from report.verdict import class_table, gains
from tests.report.sample import make_row, sample_draws, sample_histograms


def timed(name: str, value: float, milliseconds: float, **named: object):  # type: ignore[no-untyped-def]
    return make_row(name, value, latency_ms_median=milliseconds, **named)


def test_a_tiny_difference_is_not_stretched_over_the_axis() -> None:
    rows = [timed("engine:openvino:fp32", 0.5634, 20), timed("engine:openvino:int8", 0.5619, 10)]
    chart = accuracy_chart(rows)
    assert chart is not None
    low, high = chart.layout["yaxis"]["range"]
    assert high - low == pytest.approx(LEAST_SPAN)
    assert low < 0.5619 < 0.5634 < high
    assert not chart.traces[0]["error_y"]["visible"]


def test_intervals_are_drawn_and_inside_the_axis() -> None:
    draws = sample_draws(0.56, 0.06)
    rows = [timed("engine:openvino:fp32", 0.56, 20, draws=draws), timed("engine:openvino:int8", 0.55, 10)]
    chart = accuracy_chart(rows)
    assert chart is not None
    bar = chart.traces[0]["error_y"]
    assert bar["visible"]
    low, high = chart.layout["yaxis"]["range"]
    ordered = sorted(draws)
    assert 0.56 - bar["arrayminus"][0] == pytest.approx(ordered[4] + 0.975 * (ordered[5] - ordered[4]))
    assert low < 0.56 - bar["arrayminus"][0] < 0.56 + bar["array"][0] < high


def test_the_hover_of_a_unit_counts_the_macs_of_its_layers() -> None:
    model = {
        "macs": 400,
        "layers": [{"name": "a", "macs": 100}, {"name": "b", "macs": 20}, {"name": "c", "macs": 280}],
    }
    placement = [{"name": "unit", "kind": "activation", "layers": ["a", "b"]}]
    chart = sensitivity_chart([{"unit": "unit", "score": 0.5, "weights": 0.1}], placement, model)
    assert chart is not None
    assert chart.traces[0]["text"] == [
        "unit<br>score: 0.5<br>weights: 0.1<br>layers: a, b<br>kept float: 120 MACs, 30.00% of the network, leave INT8"
    ]


def test_gains_are_told_for_each_engine_and_batch() -> None:
    rows = [
        timed("engine:openvino:fp32", 0.5, 20.0, size_bytes=8_000_000, extras={"batch": 4}),
        timed("engine:openvino:int8", 0.5, 8.0, size_bytes=2_000_000, extras={"batch": 4}),
        timed("engine:onnxruntime:int8", 0.5, 5.0),
        make_row("engine:tensorrt:int8", 0.5),
    ]
    assert gains(rows) == [
        "engine:openvino:int8 takes 8.00 ms for a batch of 4: 2.50 times as fast as engine:openvino:fp32 (20.00 ms). "
        "Its size is 2.00 MB, 25% of 8.00 MB.",
        "engine:onnxruntime:int8 takes 5.00 ms for a batch of 1.",
    ]


def test_ap_by_class_has_a_column_per_row() -> None:
    rows = [
        make_row("float", 0.5, extras={"per_class_ap": {"cat": 0.5, "dog": 0.25}}),
        make_row("ptq", 0.5, extras={"per_class_ap": {"dog": 0.2}}),
        make_row("qat", 0.5),
    ]
    assert class_table(rows) == {
        "keys": ("Class", "float", "ptq"), "lines": [["cat", "0.5000", "-"], ["dog", "0.2500", "0.2000"]],
    }  # fmt: skip


def test_histograms_show_the_grid_and_both_states() -> None:
    weights, inputs = histogram_charts(sample_histograms())
    assert [shape["x0"] for shape in weights.layout["shapes"]] == list(range(-7, 8))
    assert [shape["x0"] for shape in inputs.layout["shapes"]] == [-128, 127]
    assert [trace["name"] for trace in weights.traces] == ["calibrated", "fine-tuned"]
    assert weights.traces[0]["x"] == [-6.5, -2, 2, 6.5]
    assert weights.traces[0]["y"] == [0.1, None, 0.5, 0.4]
    assert len(inputs.traces) == 1
