"""Sensitivity in a job: the exhaustive sweep ranks units by how far AP moves; what `fisher` is given and keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import SegmentTargets
from pipeline.run.sweep import Sweep
from pipeline.stages import sensitivity
from pipeline.stages.sensitivity import fisher_products, score_map, targets_by_image

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


def test_each_image_gets_its_own_targets_as_a_batch_of_one() -> None:
    boxes = torch.tensor([[1.0, 2, 0, 0, 5, 5], [0, 1, 1, 1, 4, 4], [1, 0, 2, 2, 3, 3]])
    masks = torch.arange(3, dtype=torch.uint8)[:, None, None].expand(3, 2, 2)
    first, second, third = targets_by_image(boxes, 3)
    assert torch.equal(torch.as_tensor(first), torch.tensor([[0.0, 1, 1, 1, 4, 4]]))
    assert torch.equal(torch.as_tensor(second), torch.tensor([[0.0, 2, 0, 0, 5, 5], [0, 0, 2, 2, 3, 3]]))
    assert third.shape == (0, 6)
    assert boxes[0, 0] == 1  # the batch's own targets stay
    segments = targets_by_image(SegmentTargets(boxes, masks), 2)
    assert [found.masks[:, 0, 0].tolist() for found in segments] == [[1], [0, 2]]
    assert torch.equal(segments[1].boxes, torch.as_tensor(second))


def test_gradients_are_multiplied_in_bfloat16_where_the_processor_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for has_bfloat16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(sensitivity, "computes_in_bfloat16", lambda value=has_bfloat16: value)
        assert fisher_products("auto", cpu) == expected
        assert fisher_products("auto", gpu) == torch.float32
        assert fisher_products("float32", cpu) == torch.float32
        assert fisher_products("bfloat16", cpu) == torch.bfloat16


def test_figures_of_a_batch_are_kept_to_the_last_digit(tmp_path: Path) -> None:
    figures = torch.rand(2, 3, dtype=torch.float64).tolist()
    Sweep(tmp_path).keep("fisher:0", figures)
    assert Sweep(tmp_path).read("fisher:0") == figures
    assert Sweep(tmp_path).read("fisher:1") is None
    (tmp_path / "fisher%3a0.json").write_text("{")
    assert Sweep(tmp_path).read("fisher:0") is None
