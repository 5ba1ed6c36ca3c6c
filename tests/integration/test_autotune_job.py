"""The stage autotune in a run, and another run that takes the placement it wrote as it is."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from main_job import TINY, run_entry

rtx = pytest.mark.skipif(
    not importlib.util.find_spec("tensorrt_rtx"),
    reason="TensorRT for RTX is not installed: pip install 'octet[tensorrt-rtx]'",
)

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


FAST_FP8 = """
lab:
  title: a GPU that is slow in FP16
  capability: SM89
  gigabytes_per_second: 10000
  teraops: {fp32: 0.0005, fp16: 0.001, int8: 0.01, fp8: 1.0}
  kernel_microseconds: 0.001
  source: none
"""


@pytest.mark.slow
@rtx
def test_a_plan_of_int8_fp8_and_fp16_is_found_built_and_taken_by_another_run(tmp_path: Path) -> None:
    """FP8 is the fastest, but not for the layer that reads the image: that is INT8, and the last ones stay FP16."""
    (tmp_path / "small.py").write_text(FACTORY)
    (tmp_path / "gpus.yaml").write_text(FAST_FP8)
    common = (*TINY, "model=custom", "model.factory=small.py:build")
    tuned = run_entry(
        "train_qat.py", *common, "stages=[calibrate,autotune,report]", "autotune.gpu=lab",
        "autotune.gpu_file=gpus.yaml", "autotune.mixtures=1",
        "autotune.confirmed=1", "autotune.max_ap_loss=1", "run_dir=tuned", cwd=tmp_path,
    )  # fmt: skip
    assert tuned.code == 0, tuned.err
    result = json.loads((tmp_path / "tuned/autotune.json").read_text())
    assert result["precisions"] == ["float", "int8", "fp8"]
    plan = {unit["unit"]: unit["precision"] for unit in result["units"]}
    assert plan == {"input.images": "int8", "act_0": "fp8", "act_1": "fp8"}
    assert [(one["name"], one["layers"], one["layers_not_as_planned"]) for one in result["confirmed"]] == [
        ("all float", 5, []), ("all int8", 5, []), ("all fp8", 5, []), ("front", 5, []),
    ]  # fmt: skip
    times = {one["name"]: one["milliseconds"] for one in result["confirmed"]}
    assert times["front"] == min(times.values())
    report = json.loads((tmp_path / "tuned/report.json").read_text())["autotune"]
    assert report["confirmed"] == result["confirmed"]
    # the file as it is, exported and built by a run of its own
    taken = run_entry(
        "train_qat.py", *common, "stages=[place,calibrate,export,engine]",
        "quant.placement=tuned/autotune-placement.yaml", "deploy.target=tensorrt_rtx", "deploy.runtimes=[tensorrt_rtx]",
        "deploy.compute_capabilities=[SM89]", "run_dir=taken", cwd=tmp_path,
    )  # fmt: skip
    assert taken.code == 0, taken.err
    engine = json.loads((tmp_path / "taken/engines/tensorrt_rtx-int8-fp8/model.plan.json").read_text())
    built = {layer["name"]: layer["precision"] for layer in engine["compiled"][0]["layers"]}
    assert built == {"stem": "int8", "deep": "fp8", "wide": "fp8", "box": "fp16", "cls": "fp16"}
