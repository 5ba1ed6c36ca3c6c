"""The evaluate command gives the figures that the same network gets in torch, with the settings of its run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_predict import Detector

from configs import compose
from configs.compose import dump
from data import build_loader, evaluate, generate_synthetic, open_dataset
from deploy import export_onnx
from models import non_max_suppression
from pipeline import evaluate as command

SIZE = 64


def detections(predict, batches):
    """A user's metric: the number of detections."""
    return float(sum(len(found) for batch in batches for found in predict(batch.images)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_synthetic(tmp_path_factory.mktemp("evaluate") / "data", 1, 6, 96, 0)


def by_hand(data: Path, module: torch.nn.Module, confidence: float) -> dict[str, object]:
    """COCO figures of a module in torch, and the number of its detections."""
    dataset = open_dataset(data, "val")
    numbers = []

    def predict(images):
        found = non_max_suppression(module(images), confidence, 0.7, 300)
        numbers.extend(map(len, found))
        return found

    metrics = evaluate(predict, build_loader(dataset, SIZE, 2), dataset)
    return {**metrics.as_dict(), "number": sum(numbers)}


def module_for(data: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    names = len(open_dataset(data, "val").names)
    return Wide(names)


class Wide(Detector):
    """The detector of `test_predict` with as many class scores as the data has classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = super().forward(images)
        scores = rows[:, 4:6].repeat(1, self.classes, 1)[:, : self.classes]
        return torch.cat([rows[:, :4], scores], 1)


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_figures_are_those_of_torch(data, tmp_path, capsys, runtime):
    module = module_for(data)
    path = export_onnx(module, tmp_path / "m.onnx", (SIZE, SIZE), runtime, quantized=False).path
    assert command.main([str(path), "--data", str(data), "--json", str(tmp_path / "f.json")]) == 0
    wanted = by_hand(data, module, 0.001)
    assert wanted["number"] > 100
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["model"] == str(path)
    for name in ("ap", "ap50", "precision", "recall"):
        assert figures[name] == pytest.approx(wanted[name], abs=1e-4)
    assert capsys.readouterr().out.splitlines()[-1] == f"{figures['ap']:.4f}"


class Dimmed(Wide):
    """The same boxes with lower scores, so that some fall below the threshold."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = super().forward(images)
        return torch.cat([rows[:, :4], rows[:, 4:] * 0.9], 1)


def test_agreement_with_another_model_is_counted(data, tmp_path, capsys):
    """Each detection of the reference is there with 0.9 of its score: found again where that is above 0.25."""
    classes = len(open_dataset(data, "val").names)
    paths = [
        export_onnx(module, tmp_path / name, (SIZE, SIZE), "openvino", quantized=False).path
        for module, name in ((Dimmed(classes), "dim.onnx"), (Wide(classes), "bright.onnx"))
    ]
    arguments = [
        str(paths[0]),
        "--compare",
        str(paths[1]),
        "--data",
        str(data),
        "--json",
        str(tmp_path / "f"),
    ]
    assert command.main(arguments) == 0
    scores = []
    for batch in build_loader(open_dataset(data, "val"), SIZE, 1):
        (found,) = non_max_suppression(Wide(classes)(batch.images.float() / 255), 0.25, 0.7, 300)
        scores += found[:, 4].tolist()
    kept = [score for score in scores if 0.9 * score > 0.25]
    agreement = json.loads((tmp_path / "f").read_text())["operating_point"]["overall"]["agreement"]
    assert agreement["reference"] == len(scores)
    assert 0 < len(kept) < len(scores)
    assert agreement["matched"] == pytest.approx(len(kept) / len(scores), abs=1e-9)
    assert agreement["faded"] == pytest.approx(1 - len(kept) / len(scores), abs=1e-9)
    assert agreement["score_shift"] == pytest.approx(-0.1 * sum(kept) / len(kept), abs=1e-5)
    assert agreement["drop_in"] is False
    assert "not drop-in" in capsys.readouterr().err


def test_a_model_in_a_run_is_measured_with_the_settings_of_the_run(data, tmp_path, capsys):
    module = module_for(data)
    settings = [
        "+experiment=detector",
        "weights=w.safetensors",
        f"data.root={data}",
        "data=folder",
        f"metric.factory={__name__}:detections",
        "evaluate.confidence=0.6",
    ]
    (tmp_path / "config.yaml").write_text(dump(compose(settings)))
    path = export_onnx(module, tmp_path / "export" / "m.onnx", (SIZE, SIZE), "openvino", quantized=False).path
    assert command.main([str(path), "--trust"]) == 0
    number = by_hand(data, module, 0.6)["number"]
    assert 0 < number < by_hand(data, module, 0.001)["number"]
    assert capsys.readouterr().out.splitlines()[-1] == f"{number:.4f}"


def test_what_is_missing_is_told(data, tmp_path, capsys):
    path = export_onnx(module_for(data), tmp_path / "m.onnx", (SIZE, SIZE), "openvino", quantized=False).path
    for arguments, words in (
        ([str(path)], "--data FOLDER"),
        ([str(path), "--data", str(tmp_path / "none")], "none"),
        ([str(tmp_path / "none.engine"), "--data", str(data)], "No model at"),
    ):
        assert command.main(arguments) == 3
        assert words in capsys.readouterr().err
