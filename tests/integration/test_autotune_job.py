"""The stage autotune in a run, and another run that takes the placement it wrote as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from main_job import TINY, run_entry

FACTORY = """
import torch
from torch import nn
from pipeline import CustomDetector


class Network(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.deep = nn.Conv2d(3, 32, 3, 4, 1), nn.Conv2d(32, 64, 3, 2, 1)
        self.wide, self.act = nn.Conv2d(64, 64, 3, 1, 1), nn.SiLU()
        self.box, self.cls = nn.Conv2d(64, 64, 1), nn.Conv2d(64, num_classes, 1)

    def forward(self, images):
        x = self.act(self.wide(self.act(self.deep(self.act(self.stem(images))))))
        return ((self.box(x), self.cls(x)),)


def build(names):
    return CustomDetector(Network(len(names)), strides=(8,))
"""


@pytest.mark.slow
def test_the_placement_that_autotune_writes_is_what_another_run_takes(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(FACTORY)
    common = (*TINY, "model=custom", "model.factory=small.py:build")
    tuned = run_entry(
        "train_qat.py", *common, "stages=[calibrate,autotune,report]", "autotune.seconds=0.1", "autotune.mixtures=2",
        "autotune.quantize_slower=true", "autotune.max_ap_loss=1", "run_dir=tuned", cwd=tmp_path,
    )  # fmt: skip
    assert tuned.code == 0, tuned.err
    result = json.loads((tmp_path / "tuned/autotune.json").read_text())
    assert result["latency"] == "measured"
    assert result["subject"] == "OpenVINO on this machine"
    (chosen,) = [one for one in result["confirmed"] if one["is_chosen"]]
    assert {"all float", "all int8"} <= {one["name"] for one in result["confirmed"]}
    assert all(one["milliseconds"] > 0 for one in result["confirmed"])
    front = [(point["milliseconds"], point["estimated_ap_loss"]) for point in result["front"]]
    assert front == sorted(front)
    assert [loss for _, loss in front] == sorted((loss for _, loss in front), reverse=True)
    precisions = {unit["unit"]: unit["precision"] for unit in result["units"]}
    assert list(precisions.values()).count("int8") == chosen["units"]["int8"] > 0
    # the file as it is, in a run of its own
    taken = run_entry(
        "train_qat.py", *common, "stages=[place,calibrate]", "quant.placement=tuned/autotune-placement.yaml",
        "run_dir=taken", cwd=tmp_path,
    )  # fmt: skip
    assert taken.code == 0, taken.err
    placement = yaml.safe_load((tmp_path / "taken/placement.yaml").read_text())
    assert placement == yaml.safe_load((tmp_path / "tuned/autotune-placement.yaml").read_text())
    assert {group["name"] for group in placement["groups"]} == {
        unit for unit, precision in precisions.items() if precision == "int8"
    }
    row = json.loads((tmp_path / "taken/rows/ptq.json").read_text())
    assert row["ap"] == pytest.approx(chosen["ap"], abs=0.02)
