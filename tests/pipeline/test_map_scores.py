"""The exhaustive sweep ranks units by how far AP moves, whatever the direction."""

from __future__ import annotations

import pytest

from pipeline.stages.sensitivity import score_map

AP = {
    "none": 0.60,
    "all": 0.40,
    "on:calm": 0.601,
    "off:calm": 0.402,
    "on:lucky": 0.62,  # rounding this unit raises AP on these images: it is not harmless
    "off:lucky": 0.39,
    "on:bad": 0.55,
    "off:bad": 0.45,
}


def test_score_is_the_mean_magnitude_and_the_signs_are_kept() -> None:
    scores = {score.unit: score for score in score_map(AP, ["calm", "lucky", "bad"])}
    assert scores["bad"].score == pytest.approx(0.05)
    assert scores["lucky"].score == pytest.approx(0.015)
    assert scores["calm"].score == pytest.approx(0.0015)
    assert scores["lucky"].as_dict() == {
        "unit": "lucky",
        "score": pytest.approx(0.015),
        "lost_when_quantized_alone": pytest.approx(-0.02),
        "gained_when_left_float": pytest.approx(-0.01),
    }
