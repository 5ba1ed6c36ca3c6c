"""A quantized checkpoint of another tool goes through the calibrate stage with the ranges it brought."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from main_job import TINY, run_entry
from safetensors.torch import load_file

from models import Detector, build_detector, fold_detector
from quant import Placement, load_placement
from tests.models.model_fixtures import quantized_model

NAMES = ("disc", "ring", "box", "star")
STAGE = (*TINY, "stages=[calibrate,report]")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Detector]:
    """Folder with the checkpoint, and its detector, folded."""
    folder = tmp_path_factory.mktemp("ranges")
    torch.manual_seed(0)
    detector = fold_detector(build_detector("yolov9t", 4, names=NAMES))
    model = quantized_model(detector)
    model.names = dict(enumerate(NAMES))
    torch.save({"model": model}, folder / "qat.pt")
    return folder, detector


def scales_of(run: Path) -> tuple[Placement, dict[str, torch.Tensor]]:
    return load_placement(run / "placement.yaml"), load_file(run / "ptq.safetensors")


@pytest.mark.slow
def test_ranges_become_scales_and_leftovers_are_listed(job: tuple[Path, Detector]) -> None:
    folder, detector = job
    outcome = run_entry("train_qat.py", *STAGE, "weights=qat.pt", "run_dir=used", cwd=folder)
    assert outcome.code == 0, outcome.err
    placement, state = scales_of(folder / "used")
    convolutions = [key for key, value in detector.network.state_dict().items() if key.endswith(".weight")]
    assert len(convolutions) == 179 + 6
    keys = list(detector.network.state_dict())
    amax = {key.removesuffix(".weight"): keys.index(key) + 0.5 for key in convolutions}
    joined, calibrated = 0, []
    for number, group in enumerate(placement.groups):
        found = [amax[layer] for layer in group.layers]
        joined += len(found) > 1
        if not found:  # read by a residual sum alone
            calibrated.append(group.name)
            continue
        scale = float(state[f"activation_quantizers.{number}.log_scale"].exp())
        assert scale == pytest.approx(max(found) / 127, rel=1e-5)
    assert joined > 10
    for site in placement.weights:
        weight = detector.network.get_parameter(f"{site.layer}.weight")
        expected = weight.abs().amax((1, 2, 3)) / 127
        assert torch.allclose(state[f"{site.layer}.weight_quantizer.log_scale"].exp(), expected, rtol=1e-5)
    record = json.loads((folder / "used/calibration.json").read_text())
    assert calibrated
    assert record["imported"]["groups_without"] == calibrated
    methods = {group["name"]: group["method"] for group in record["groups"]}
    assert {name for name, method in methods.items() if method != "imported"} == set(calibrated)
    floating = {f"{layer}.{role}" for layer in placement.kept_float for role in ("input", "weight")}
    assert set(record["imported"]["unused"]) == floating
    assert "no counterpart for 1 quantizers: model.4.cv2.0.m.0.repaddop._input0_quantizer" in outcome.err
    assert f"{joined} groups are read by several layers" in outcome.err
    assert "head.cls.0.output.weight (float: its result leaves the network)" in outcome.err


@pytest.mark.slow
def test_ranges_can_be_ignored_and_training_drops_them(job: tuple[Path, Detector]) -> None:
    folder, _ = job
    ignore = ("weights=qat.pt", "quant.imported_ranges=ignore", "run_dir=ignored")
    outcome = run_entry("train_qat.py", *STAGE, *ignore, cwd=folder)
    assert outcome.code == 0, outcome.err
    assert "ignored (quant.imported_ranges=ignore)" in outcome.err
    record = json.loads((folder / "ignored/calibration.json").read_text())
    assert record["num_images"] == 8
    assert "imported" not in record
    trained = ("weights=qat.pt", "stages=[train,calibrate]", "run_dir=trained")
    outcome = run_entry("train_qat.py", *TINY, *trained, cwd=folder)
    assert outcome.code == 0, outcome.err
    assert "dropped, because training changes the weights" in outcome.err
    assert "imported" not in json.loads((folder / "trained/calibration.json").read_text())
