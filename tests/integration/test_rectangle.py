"""The main job with a rectangular input: every file, parity, the commands on its engine, and resume."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from main_job import TINY, untrained_weights
from torch import Tensor, nn

from configs import compose
from core.errors import RunError
from deploy import EngineRequest, open_engine
from deploy.benchmark.__main__ import main as benchmark
from pipeline import CustomDetector, evaluate, predict
from pipeline.job import Job as RunningJob
from pipeline.main import run_job
from pipeline.run.directory import Run

RECTANGLE = (
    *(setting for setting in TINY if "image_size" not in setting),
    "data.image_size=[64,96]",
    "data.synthetic.train=8",
    "data.synthetic.val=4",
    "qat.epochs=1",
    "qat.augment=heavy",
    "augment.mosaic=1",
    "deploy.fixed_point_images=1",
    "evaluate.user_confidence=0.001",
    "stages=[float,calibrate,finetune,export,engine,report]",
)


def convolution(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.SiLU())


class Small(nn.Module):
    """Three levels in Octet's map format, the finest joined with the next one, which is enlarged."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(convolution(3, 16, 4), convolution(16, 16, 2))
        self.down = nn.ModuleList([convolution(16, 16, 2), convolution(16, 16, 2)])
        self.enlarge = nn.Upsample(scale_factor=2)
        self.box = nn.ModuleList([nn.Conv2d(channels, 64, 1) for channels in (32, 16, 16)])
        self.cls = nn.ModuleList([nn.Conv2d(channels, classes, 1) for channels in (32, 16, 16)])

    def forward(self, images: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        fine = self.stem(images)
        middle = self.down[0](fine)
        levels = (torch.cat([fine, self.enlarge(middle)], dim=1), middle, self.down[1](middle))
        return tuple((box(x), cls(x)) for box, cls, x in zip(self.box, self.cls, levels, strict=True))


def small(names: Sequence[str]) -> CustomDetector:
    torch.manual_seed(0)
    return CustomDetector(Small(len(names)), strides=(8, 16, 32))


def settings(folder: Path, *more: str):
    return compose([*RECTANGLE, f"run_dir={folder / 'run'}", f"data.root={folder / 'data'}", *more])


Job = tuple[Path, tuple[str, ...]]


@pytest.fixture(scope="module", params=["small", pytest.param("yolov9t", marks=pytest.mark.exhaustive)])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Folder with the data, the weights and the finished run, and the settings of its model."""
    folder = tmp_path_factory.mktemp("rectangle")
    own = request.param == "small"
    model = ("model=custom", f"model.factory={__name__}:small") if own else (untrained_weights(folder),)
    run_job(settings(folder, *model))
    return folder, model


def test_every_file_tells_height_and_width(job: Job) -> None:
    run = job[0] / "run"
    report = json.loads((run / "report.json").read_text())
    assert report["image_size"] == [64, 96]
    assert "Input: 64x96 pixels" in (run / "report.md").read_text()
    assert "input 64 &times; 96 pixels" in (run / "report.html").read_text(encoding="utf-8")
    first, stride = report["model"]["layers"][0], 2 if job[1][0].startswith("weights") else 4
    assert first["output"] == [16, 64 // stride, 96 // stride]
    assert first["macs"] == 16 * 3 * 9 * first["output"][1] * first["output"][2]
    for name in ("model.onnx", "float.onnx"):
        metadata = {entry.key: entry.value for entry in onnx.load(run / name).metadata_props}
        assert (metadata["octet.image_size"], metadata["imgsz"]) == ("64x96", "[64, 96]")


ENGINES = [("openvino", "engines/float.xml"), ("onnxruntime", "float.onnx")]


@pytest.mark.parametrize(("runtime", "file"), ENGINES)
def test_engines_give_what_torch_gives(job: Job, runtime: str, file: str) -> None:
    """Every box and score of an image of noise; a height and a width that change places move boxes by many pixels."""
    folder, model = job
    run = RunningJob(settings(folder, *model, "resume=true"), Run.open(folder / "run"))
    detector = run.networks.detector.eval()
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = detector.decode(detector.network(images)).numpy()
    assert wanted.shape[2] == (64 * 96) // 64 + (64 * 96) // 256 + (64 * 96) // 1024
    assert 88 < wanted[0, 0].max() < 96
    assert 56 < wanted[0, 1].max() < 64
    engine = open_engine(runtime, folder / "run" / file, EngineRequest(batch=1, image_size=(64, 96)))
    found = next(iter(engine.infer_outputs(images.numpy()).values()))
    engine.close()
    np.testing.assert_allclose(found[:, :4], wanted[:, :4], atol=0.01)
    np.testing.assert_allclose(found[:, 4:], wanted[:, 4:], atol=1e-5)


def test_the_commands_take_the_size_from_the_engine(job: Job, tmp_path: Path) -> None:
    folder, run = job[0], job[0] / "run"
    row = json.loads((run / "rows/engine-openvino-int8.json").read_text())
    assert (
        evaluate.main([str(run), "--trust", "--compare", "float", "--json", str(tmp_path / "figures.json")])
        == 0
    )
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["ap"] == row["ap"]
    mine, kept = (found["operating_point"]["overall"]["agreement"] for found in (figures, row))
    assert mine["reference"] == kept["reference"] > 0
    assert mine["matched"] == pytest.approx(kept["matched"], abs=0.05), "float in batches of another size"
    pictures = next((folder / "data").rglob("*.png")).parent
    chosen = [str(pictures), "--size", "64x96", "--out", str(tmp_path / "shown")]
    assert predict.main([str(run / "model.onnx"), *chosen]) == 0
    assert json.loads((tmp_path / "shown/detections.json").read_text())["info"]["image_size"] == [64, 96]
    timed = ["--time", "0.1", "--warmup", "0", "--json", str(tmp_path / "timed.json")]
    assert benchmark([str(run / "engines/model.xml"), *timed]) == 0
    assert {entry["size"] for entry in json.loads((tmp_path / "timed.json").read_text())["rows"]} == {"64x96"}


def test_resume_knows_the_rectangle_and_refuses_another(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = job
    run_job(settings(folder, *model, "resume=true", "stages=[float,calibrate]"))
    assert "calibrate: done before" in capsys.readouterr().err
    turned = ("data.image_size=[96,64]", "resume=true", "stages=[finetune]")
    with pytest.raises(RunError, match=r"data\.image_size is \[96, 64\], was \[64, 96\]"):
        run_job(settings(folder, *model, *turned))
