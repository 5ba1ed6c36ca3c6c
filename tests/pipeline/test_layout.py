"""The layout of a stage: as set, measured once per machine and network, and kept for a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from configs.evaluate_schema import EvaluateConfig
from configs.schema import QatConfig
from core.image_size import ImageSize
from data import Batch
from data.letterbox import LetterboxInfo
from pipeline import layout
from pipeline.evaluation.evaluator import Evaluator
from pipeline.job import Job
from pipeline.layout import in_channels_last, keep_inference_layout, uses_autocast
from pipeline.networks import Networks

NETWORK = nn.Conv2d(3, 4, 1)


def job_in(folder: Path, cache: Path | None) -> Job:
    """What the choice reads of a job."""
    folder.mkdir(exist_ok=True)
    run = SimpleNamespace(
        path=lambda name: folder / name,
        write_json=lambda name, content: (folder / name).write_text(json.dumps(content)),
        read_json=lambda name: json.loads((folder / name).read_text()),
    )
    config = SimpleNamespace(
        data=SimpleNamespace(cache_dir=None if cache is None else str(cache)), evaluate=EvaluateConfig()
    )
    splits = SimpleNamespace(config=SimpleNamespace(input_size=ImageSize(32, 32)))
    networks = SimpleNamespace(detector=SimpleNamespace(network=NETWORK))
    return cast(
        Job,
        SimpleNamespace(run=run, config=config, splits=splits, networks=networks, device=torch.device("cpu")),
    )


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the images of every measurement; channels-last wins."""
    shapes: list[torch.Size] = []

    def measure(network: nn.Module, images: torch.Tensor, autocast: bool, backward: bool) -> dict[str, float]:
        shapes.append(images.shape)
        return {"contiguous": 1.0, "channels_last": 0.5}

    monkeypatch.setattr(layout, "measure_layouts", measure)
    return shapes


def test_it_is_measured_once_per_network(tmp_path: Path, measured: list[torch.Size], capsys: Any) -> None:
    config, cache = QatConfig(batch_size=2), tmp_path / "cache"
    for number in range(2):
        assert in_channels_last(job_in(tmp_path / f"run{number}", cache), config, NETWORK, "finetune")
        assert "layout channels_last" in capsys.readouterr().err
    assert measured == [(2, 3, 32, 32)]
    assert in_channels_last(job_in(tmp_path / "other", cache), config, nn.Conv2d(3, 5, 1), "finetune")
    assert len(measured) == 2


def test_a_run_that_goes_on_keeps_its_layout(tmp_path: Path, measured: list[torch.Size]) -> None:
    job = job_in(tmp_path / "run", None)
    (tmp_path / "run" / "finetune-layout.json").write_text('{"layout": "contiguous"}')
    assert not in_channels_last(job, QatConfig(), NETWORK, "finetune")
    assert measured == []


@pytest.mark.parametrize("wanted", ["contiguous", "channels_last"])
def test_a_layout_that_is_set_is_taken(wanted: str, tmp_path: Path, measured: list[torch.Size]) -> None:
    job = job_in(tmp_path / "run", tmp_path)
    assert in_channels_last(job, QatConfig(layout=wanted), NETWORK, "finetune") == (wanted == "channels_last")
    assert measured == []


def test_a_damaged_cache_is_measured_again(tmp_path: Path, measured: list[torch.Size]) -> None:
    (tmp_path / "layouts.json").write_text("{")
    assert in_channels_last(job_in(tmp_path / "run", tmp_path), QatConfig(), NETWORK, "finetune")
    assert len(measured) == 1
    assert len(json.loads((tmp_path / "layouts.json").read_text())) == 1


def format_of(job: Job) -> torch.memory_format:
    return Networks(job.config, job.run, job.splits, job.device).memory_format


def test_the_layout_of_evaluation_is_measured_once_and_kept(
    tmp_path: Path, measured: list[torch.Size], capsys: Any
) -> None:
    for number in range(2):
        job = job_in(tmp_path / f"run{number}", tmp_path / "cache")
        assert format_of(job) is torch.contiguous_format  # a run of before
        keep_inference_layout(job)
        assert "evaluation: layout channels_last (forward of 4 images" in capsys.readouterr().err
        assert format_of(job) is torch.channels_last
    assert measured == [(4, 3, 32, 32)]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)],
)
def test_a_layout_of_evaluation_that_is_set_is_taken(
    wanted: str, expected: torch.memory_format, tmp_path: Path, measured: list[torch.Size]
) -> None:
    job = job_in(tmp_path / "run", tmp_path)
    job.config.evaluate.layout = wanted
    keep_inference_layout(job)
    assert format_of(job) is expected
    assert measured == []


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_images_are_laid_out_for_the_network_and_its_outputs_for_the_decode(
    memory_format: torch.memory_format,
) -> None:
    seen: list[bool] = []

    class Decode(nn.Module):
        def forward(self, raw: list[torch.Tensor]) -> torch.Tensor:
            return raw[0].view(2, -1).view(2, 5, -1)  # the first view fails for channels-last

    class Network(nn.Conv2d):
        def forward(self, input: torch.Tensor) -> Any:
            seen.append(input.is_contiguous(memory_format=memory_format))
            return [super().forward(input)]

    images = torch.rand(2, 3, 16, 16)
    network = Network(3, 5, 1).requires_grad_(False)
    evaluator = Evaluator(EvaluateConfig(confidence=0.0), None, cast(Any, None), torch.device("cpu"))
    found = evaluator.predictor(network, Decode(), memory_format)(images)
    assert len(found) == 2
    assert seen == [True]


def test_several_networks_at_once_find_what_each_finds_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Decode(nn.Module):
        def forward(self, raw: torch.Tensor) -> torch.Tensor:
            return raw.sigmoid().flatten(2)

    infos = [LetterboxInfo(1.0, 0, 0, 16, 16)] * 5
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    parts = [slice(0, 3), slice(3, 5)]
    batches = [Batch(images[p], torch.zeros(0, 6), list(range(5))[p], infos[p]) for p in parts]
    splits = cast(Any, SimpleNamespace(val_batches=lambda *arguments: batches))
    evaluator = Evaluator(EvaluateConfig(confidence=0.3), None, splits, torch.device("cpu"))
    monkeypatch.setattr(evaluator, "_coco", lambda found: found)
    networks = [nn.Conv2d(3, 6, 1).requires_grad_(False) for _ in range(2)]
    together = evaluator.measure_each(lambda images: (network(images) for network in networks), 2, Decode())
    for network, found in zip(networks, cast(Any, together), strict=True):
        alone = evaluator.collect(evaluator.predictor(network, Decode()), None)
        assert list(found.image_ids) == list(alone.image_ids) == list(range(5))
        assert sum(map(len, alone.rows)) > 0
        for own, other in zip(found.rows, alone.rows, strict=True):
            assert (own == other).all()


@pytest.mark.parametrize(
    ("precision", "device", "expected"),
    [("auto", "cpu", False), ("auto", "cuda", True), ("bfloat16", "cpu", True), ("float32", "cuda", False)],
)
def test_precision(precision: str, device: str, expected: bool) -> None:
    assert uses_autocast(QatConfig(precision=precision), torch.device(device)) is expected
