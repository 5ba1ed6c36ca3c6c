"""Gates and the value that sweeps optimise look at the same rows: every INT8 engine."""

from __future__ import annotations

import math

import pytest

from configs.schema import Config
from core.errors import GateError
from core.rows import FLOAT, MIXED, PTQ, QAT, ResultRow, RowKey, engine_key, shipped_rows
from pipeline.gates import check_gates, shipped_value

GOOD, BAD = engine_key("openvino", "int8"), engine_key("onnxruntime", "int8")
FLOAT_ENGINE = engine_key("openvino", "fp32")


def rows(**aps: float) -> list[ResultRow]:
    keys: dict[str, RowKey] = {
        "float": FLOAT, "ptq": PTQ, "mixed": MIXED, "qat": QAT, "good": GOOD, "bad": BAD, "fp32": FLOAT_ENGINE,
    }  # fmt: skip
    return [ResultRow.of(keys[name], {"ap": ap}) for name, ap in aps.items()]


@pytest.mark.parametrize("order", [("good", "bad"), ("bad", "good")])
def test_every_int8_engine_has_to_pass(order: tuple[str, str]) -> None:
    aps = {"good": 0.60, "bad": 0.50}
    found = rows(float=0.60, qat=0.61, **{name: aps[name] for name in order})
    with pytest.raises(GateError, match=r"engine:onnxruntime:int8 reaches AP 0\.5000, below min_ap=0\.55"):
        check_gates(Config(experiment="x", min_ap=0.55), found, "detect")
    with pytest.raises(GateError, match=r"engine:onnxruntime:int8 loses 0\.1000 AP"):
        check_gates(Config(experiment="x", max_ap_drop=0.05), found, "detect")
    check_gates(Config(experiment="x", min_ap=0.5, max_ap_drop=0.11), found, "detect")
    assert shipped_value(found) == 0.50


def test_both_engines_are_named_where_both_miss() -> None:
    with pytest.raises(GateError, match=r"engine:openvino:int8 .*; engine:onnxruntime:int8 "):
        check_gates(Config(experiment="x", min_ap=0.9), rows(good=0.6, bad=0.5), "detect")


def test_without_engines_the_last_quantized_model_counts() -> None:
    assert shipped_value(rows(float=0.6, ptq=0.5, mixed=0.58, qat=0.59)) == 0.59
    assert shipped_value(rows(float=0.6, ptq=0.5, mixed=0.58)) == 0.58
    assert shipped_value(rows(float=0.6, ptq=0.5)) == 0.5
    assert shipped_value(rows(float=0.6)) == 0.6
    assert math.isnan(shipped_value([]))


def test_float_engines_are_not_shipped() -> None:
    found = rows(float=0.6, qat=0.59, fp32=0.1)
    assert [row.key for row in shipped_rows(found)] == [QAT]
    check_gates(Config(experiment="x", min_ap=0.5), found, "detect")
