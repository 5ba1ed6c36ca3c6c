"""Layout and precision of a stage: as set, measured once per machine and network, and kept for a run that goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from pipeline.layout import Form, keep_inference_layout, training_form
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


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Says whether the processor computes in bfloat16; it does not until then."""

    def set_to(value: bool) -> None:
        monkeypatch.setattr(layout, "computes_in_bfloat16", lambda: value)

    set_to(False)
    return set_to


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Size, bool]]:
    """Shapes and autocast of every measurement; channels-last wins, and bfloat16 gains most in contiguous layout."""
    found: list[tuple[torch.Size, bool]] = []

    def measure(network: nn.Module, images: torch.Tensor, autocast: bool, backward: bool) -> dict[str, float]:
        found.append((images.shape, autocast))
        return {"contiguous": 0.6 if autocast else 1.0, "channels_last": 0.48 if autocast else 0.5}

    monkeypatch.setattr(layout, "measure_layouts", measure)
    return found


SHAPE = torch.Size((2, 3, 32, 32))
Measured = list[tuple[torch.Size, bool]]


def test_it_is_measured_once_per_network(tmp_path: Path, measured: Measured, capsys: Any) -> None:
    config, cache = QatConfig(batch_size=2), tmp_path / "cache"
    for number in range(2):
        found = training_form(job_in(tmp_path / f"run{number}", cache), config, NETWORK, "finetune")
        assert found == Form(channels_last=True, autocast=False)
        text = capsys.readouterr().err
        assert (
            "finetune: forward and backward of 2 images in float32: contiguous 1000 ms, channels_last 500"
            in text
        )
        assert "finetune: trains in channels_last, float32" in text
    assert measured == [(SHAPE, False)]
    training_form(job_in(tmp_path / "other", cache), config, nn.Conv2d(3, 5, 1), "finetune")
    assert len(measured) == 2


@pytest.mark.parametrize(
    ("layout_set", "expected"),
    [
        ("auto", Form(channels_last=True, autocast=False)),  # 0.48 s instead of 0.50 is no reason to round
        ("contiguous", Form(channels_last=False, autocast=True)),  # 0.6 s instead of 1.0 is
        ("channels_last", Form(channels_last=True, autocast=False)),
    ],
)
def test_a_processor_with_bfloat16_uses_it_where_it_gains(
    layout_set: str, expected: Form, tmp_path: Path, measured: Measured, processor: Callable[[bool], None]
) -> None:
    processor(True)
    config = QatConfig(batch_size=2, layout=layout_set)
    assert training_form(job_in(tmp_path / "run", tmp_path), config, NETWORK, "finetune") == expected
    assert measured == [(SHAPE, False), (SHAPE, True)]
    kept = json.loads((tmp_path / "run" / "finetune-layout.json").read_text())
    assert kept["precision"] == ("bfloat16" if expected.autocast else "float32")
    assert training_form(job_in(tmp_path / "run", None), config, NETWORK, "finetune") == expected
    assert len(measured) == 2  # a run that goes on measures nothing


def test_a_run_that_goes_on_keeps_its_form(
    tmp_path: Path, measured: Measured, processor: Callable[[bool], None]
) -> None:
    processor(True)
    job = job_in(tmp_path / "run", None)
    text = '{"layout": "contiguous", "precision": "bfloat16"}'
    (tmp_path / "run" / "finetune-layout.json").write_text(text)
    assert training_form(job, QatConfig(), NETWORK, "finetune") == Form(channels_last=False, autocast=True)
    assert measured == []


@pytest.mark.parametrize("wanted", ["contiguous", "channels_last"])
def test_a_layout_that_is_set_is_taken(wanted: str, tmp_path: Path, measured: Measured) -> None:
    job = job_in(tmp_path / "run", tmp_path)
    found = training_form(job, QatConfig(layout=wanted), NETWORK, "finetune")
    assert found == Form(channels_last=wanted == "channels_last", autocast=False)
    assert measured == []


@pytest.mark.parametrize(
    ("precision", "device", "expected"),
    [("auto", "cpu", False), ("auto", "cuda", True), ("bfloat16", "cpu", True), ("float32", "cuda", False)],
)
def test_a_precision_that_is_set_is_taken(
    precision: str, device: str, expected: bool, tmp_path: Path, measured: Measured
) -> None:
    job = job_in(tmp_path / "run", tmp_path)
    job.device = torch.device(device)
    config = QatConfig(precision=precision, layout="contiguous")
    assert training_form(job, config, NETWORK, "finetune").autocast is expected
    assert measured == []


def test_a_damaged_cache_is_measured_again(tmp_path: Path, measured: Measured) -> None:
    (tmp_path / "layouts.json").write_text("{")
    assert training_form(job_in(tmp_path / "run", tmp_path), QatConfig(), NETWORK, "finetune").channels_last
    assert len(measured) == 1
    assert len(json.loads((tmp_path / "layouts.json").read_text())) == 1


def format_of(job: Job) -> torch.memory_format:
    return Networks(job.config, job.run, job.splits, job.device).memory_format


def test_the_layout_of_evaluation_is_measured_once_and_kept(
    tmp_path: Path, measured: Measured, capsys: Any
) -> None:
    for number in range(2):
        job = job_in(tmp_path / f"run{number}", tmp_path / "cache")
        assert format_of(job) is torch.contiguous_format  # a run of before
        keep_inference_layout(job)
        assert "evaluation: layout channels_last" in capsys.readouterr().err
        assert format_of(job) is torch.channels_last
    assert measured == [(torch.Size((4, 3, 32, 32)), False)]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)],
)
def test_a_layout_of_evaluation_that_is_set_is_taken(
    wanted: str, expected: torch.memory_format, tmp_path: Path, measured: Measured
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
