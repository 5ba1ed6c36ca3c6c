"""The option quant.recalibrate_scores in the job: AP stays, scores come closer to float, the graph has the lines."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rectangle import Small, settings
from torch import Tensor, nn

from core.errors import ConfigError
from core.rows import PTQ
from data import Detections, collect, compute_metrics
from models import Decode
from pipeline import CustomDetector
from pipeline.job import Job
from pipeline.main import run_job
from pipeline.run.directory import Run
from pipeline.stages.recalibration import class_layers, take_back
from quant import recalibrate_scores

MODEL = ("model=custom", f"model.factory={__name__}:sharp", "evaluate.user_confidence=0.25")
COARSE = "quant=w4a4"  # scores are visibly off
LAYERS = ["cls.0", "cls.1", "cls.2"]


def sharp(names: Sequence[str]) -> CustomDetector:
    """With logits of all sizes, as a trained network has them."""
    torch.manual_seed(0)
    network = Small(len(names))
    with torch.no_grad():
        for level in network.cls:
            level.weight.mul_(60)
            level.bias.sub_(1)
        for level in network.box:
            level.weight.mul_(20)
    return CustomDetector(network, strides=(8, 16, 32))


class OwnDecode(nn.Module):
    """The usual decode in a module of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.decode = Decode((8, 16, 32))

    def forward(self, maps: Any) -> Tensor:
        return self.decode(maps)


def own(names: Sequence[str]) -> CustomDetector:
    return CustomDetector(
        Small(len(names)), OwnDecode(), lambda maps, targets, size: {"all": maps[0][0].mean()}
    )


def open_job(folder: Path, *more: str) -> Job:
    return Job(settings(folder, *MODEL, "resume=true", *more), Run.open(folder / "run"))


def test_class_ap_stays_and_scores_come_closer(tmp_path: Path) -> None:
    """The truth is what the float model finds, so that every class has an AP to lose."""
    run_job(settings(tmp_path, *MODEL, COARSE, "stages=[float,calibrate]"))
    job = open_job(tmp_path, COARSE, "evaluate.confidence=0", "evaluate.max_detections=30000")
    loader = job.splits.val_batches(4)
    found: dict[str, Detections] = {"float": collect(job.predictor(job.networks.detector.network), loader)}
    model = job.networks.load(PTQ)
    assert class_layers(model, job.networks.detector) == LAYERS
    plain = copy.deepcopy(model)
    found["before"] = collect(job.predictor(plain), loader)
    images = list(job.splits.images(job.splits.letterboxed(job.splits.train, 4)))
    recalibrate_scores(model, job.networks.detector.network, images, LAYERS, 0.25)
    found["after"] = collect(job.predictor(model), loader)
    truth = truth_of(job, found["float"])
    before, after = (
        compute_metrics(found[name].rows, found[name].image_ids, truth).per_class_ap
        for name in ("before", "after")
    )
    assert len(before) == job.networks.detector.num_classes
    assert min(before.values()) > 0.02
    assert min(before.values()) < 0.98
    assert after == pytest.approx(before, abs=1e-3)
    networks = (job.networks.detector.network, plain, model)
    wanted, old, new = (scores_of(job, network, torch.cat(images)) for network in networks)
    seen = wanted >= 0.25
    errors = [float((scores - wanted)[seen].square().mean()) for scores in (old, new)]
    assert errors[1] < 0.8 * errors[0]


def scores_of(job: Job, network: nn.Module, images: Tensor) -> Tensor:
    """Class scores of every anchor, [B, K, A]."""
    with torch.no_grad():
        return job.networks.detector.decode(network(images))[:, 4:]


def truth_of(job: Job, found: Detections) -> dict[str, Any]:
    """The surest detections of each image and class as a COCO dictionary."""
    annotations = []
    for image_id, rows in zip(found.image_ids, found.rows, strict=True):
        for label in range(job.networks.detector.num_classes):
            for x1, y1, x2, y2, *_ in rows[rows[:, 5] == label][:6].tolist():
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": image_id, "category_id": label + 1, **box}
                )
    return {**job.splits.truth, "annotations": annotations}


def test_the_job_folds_the_lines_into_every_model_and_graph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_job(settings(tmp_path, *MODEL, "stages=[float,calibrate]"))
    plain = open_job(tmp_path).networks.load(PTQ)
    more = ("quant.recalibrate_scores=true", "resume=true", "stages=[calibrate,finetune,export]")
    run_job(settings(tmp_path, *MODEL, *more))
    told = capsys.readouterr().err
    assert "calibrate again: quant.recalibrate_scores is True, was False" in told
    assert "parity engine:onnxruntime" in told, "the exported graph gives what torch gives"
    model = open_job(tmp_path, "quant.recalibrate_scores=true").networks.load(PTQ)
    for key in ("ptq", "qat"):
        content = json.loads((tmp_path / f"run/recalibration-{key}.json").read_text())
        assert content["layers"] == LAYERS
        assert all(0.5 <= line["slope"] <= 2 for line in content["classes"].values())
    lines = list(json.loads((tmp_path / "run/recalibration-ptq.json").read_text())["classes"].values())
    slopes, offsets = (torch.tensor([line[name] for line in lines]) for name in ("slope", "offset"))
    assert float((slopes - 1).abs().max()) > 0.001
    for name in LAYERS:
        old, new = plain.get_submodule(name), model.get_submodule(name)
        torch.testing.assert_close(new.weight, old.weight * slopes[:, None, None, None])
        torch.testing.assert_close(new.bias, old.bias * slopes + offsets)
    take_back(open_job(tmp_path, "quant.recalibrate_scores=true"), model, PTQ)  # as fine-tuning starts
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=1e-5, rtol=1e-5)


def test_a_decode_of_the_users_own_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    chosen = ("model=custom", f"model.factory={__name__}:own", "quant.recalibrate_scores=true")
    with pytest.raises(ConfigError, match=r"recalibrate_scores=true with a decode of your own"):
        run_job(settings(tmp_path, *chosen, "stages=[float,calibrate]"))
    assert not (tmp_path / "run").exists()
