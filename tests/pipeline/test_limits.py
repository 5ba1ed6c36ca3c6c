"""Limits of images: calibration keeps to those of the training split."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.schema import Config
from pipeline.stages.calibration import calibration_images
from training.team import ALONE


@pytest.mark.parametrize(
    ("calibration", "train", "limit", "expected"),
    [(256, None, None, 256), (256, 64, None, 64), (32, 64, None, 32), (256, 64, 16, 16), (256, 8, 16, 8)],
)
def test_calibration_uses_no_more_than_the_training_images(
    calibration: int, train: int | None, limit: int | None, expected: int
) -> None:
    config = Config(experiment="x")
    config.quant.calibration_images, config.data.limit_train = calibration, train
    asked: list[Any] = []
    splits = SimpleNamespace(
        train="the split",
        letterboxed=lambda dataset, batch, count, team, whole_batches: asked.append(count),
        images=lambda loader, label, layout: iter(()),
    )
    networks = SimpleNamespace(memory_format=torch.contiguous_format)
    job: Any = SimpleNamespace(config=config, splits=splits, stage_team=ALONE, networks=networks)
    calibration_images(job, limit)
    assert asked == [expected]
