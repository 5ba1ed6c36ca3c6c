"""The stage `finetune`: its gate, early stop, which weights are kept, and resuming, on a network of two layers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from configs.schema import Config, QatConfig
from configs.validation import validate
from core.errors import ConfigError, RunError
from core.rows import FLOAT, PTQ, ResultRow, RowKey
from pipeline.evaluation.measuring import CustomMetrics
from pipeline.networks import QUANTIZED
from pipeline.run.directory import Run
from pipeline.stages.finetuning import finetune_stage
from pipeline.stages.saved_training import SavedTraining
from quant import FineTuningOptions, QuantizationAware, calibrate, insert, place
from training.team import ALONE, Team

STEPS = 3


class Network(nn.Module):
    """Images [B, 3, H, W] to one map."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)
        self.act, self.output = nn.ReLU(), nn.Conv2d(16, 4, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.output(self.act(self.second(self.act(self.first(images)))))


class Loader(list[int]):
    """As long as an epoch."""

    @property
    def batch_sampler(self) -> SimpleNamespace:
        return SimpleNamespace(num_batches=lambda: len(self))


class SmallJob:
    """What the stage asks of a job and its parts; evaluations return the given values in turn."""

    task = "detect"
    calibrated_key = PTQ
    stage_team = ALONE

    def __init__(
        self, directory: Path, values: list[float], checkpoint_minutes: float = 60.0, **qat: Any
    ) -> None:
        settings = {"epochs": 4, "learning_rate": 1e-3, "layout": "contiguous", "precision": "float32", **qat}
        self.config = SimpleNamespace(
            qat=QatConfig(**settings),
            augment=Config(experiment="x").augment,
            metric=SimpleNamespace(factory="m:f"),
            quant=SimpleNamespace(recalibrate_scores=False),
            checkpoint_minutes=checkpoint_minutes,
            seed=0,
        )
        self.run, self.device = Run(directory), torch.device("cpu")
        torch.manual_seed(0)
        self.detector = SimpleNamespace(network=Network().eval())
        self.values, self.measured, self.rows = values, list[tuple[str, Any]](), dict[str, Any]()
        self.splits = self.networks = self
        self.evaluator = SimpleNamespace(measure=self.validate)

    def load(self, key: RowKey) -> nn.Module:
        network = self.detector.network
        model = insert(network, place(network)).eval()
        calibrate(model, [torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))])
        return model

    def train_batches(self, batch_size: int, augment: Any, team: Team) -> Loader:
        return Loader(range(STEPS))

    def epochs(self, loader: Loader, label: str, count: int) -> Any:
        def batches(epoch: int, samples: int) -> Any:
            for step in loader[samples // 2 :]:
                generator = torch.Generator().manual_seed(100 * epoch + step)
                yield torch.rand(2, 3, 8, 8, generator=generator), torch.zeros(1)

        return batches

    def loss(self) -> Any:
        return lambda raw, targets, size: {"error": raw.square().mean()}

    def predictor(self, model: nn.Module) -> nn.Module:
        return model

    def measure(self, key: RowKey, model: nn.Module) -> CustomMetrics:
        return self.validate(model, key.name)

    def validate(self, model: nn.Module, label: str, limit: int | None = None) -> CustomMetrics:
        self.measured.append((label, limit))
        return CustomMetrics(self.values[len(self.measured) - 1])

    def keep(self, model: nn.Module, placement: Any, key: RowKey) -> nn.Module:
        save_file(model.state_dict(), self.run.path(QUANTIZED[key]))
        return model

    def record(self, key: RowKey, metrics: CustomMetrics, **figures: Any) -> None:
        self.rows[key.name] = {"value": metrics.value, **figures}

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.run.path("qat.safetensors"))


def stage(job: SmallJob) -> SmallJob:
    finetune_stage(job)  # type: ignore[arg-type]
    return job


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_best_keeps_the_best_epoch_and_last_the_last(tmp_path: Path) -> None:
    values = [0.1, 0.2, 0.5, 0.3, 0.4, 0.9]
    jobs = {}
    for select in ("best", "last"):
        (tmp_path / select).mkdir()
        jobs[select] = stage(SmallJob(tmp_path / select, values, select=select))
    assert jobs["best"].rows["qat"] == {"value": 0.9, "kept": "epoch 2"}
    assert jobs["last"].rows["qat"] == {"value": 0.9, "kept": "epoch 4"}
    assert not same(jobs["best"].weights(), jobs["last"].weights())
    (tmp_path / "two").mkdir()
    two = stage(SmallJob(tmp_path / "two", values, select="last", patience=1))  # epoch 3 is worse: the last
    assert two.rows["qat"]["kept"] == "epoch 3"


def test_the_log_has_the_validation_of_every_epoch(tmp_path: Path) -> None:
    stage(SmallJob(tmp_path, [0.1, 0.2, 0.5, 0.3, 0.4, 0.9], validate_images=7))
    records = [json.loads(line) for line in (tmp_path / "qat.jsonl").read_text().splitlines()]
    assert {r["step"]: r["validation"] for r in records if "validation" in r} == {
        2: 0.2,
        5: 0.5,
        8: 0.3,
        11: 0.4,
    }
    assert all(0.0 <= r["share_oscillating"] <= 1.0 for r in records if "validation" in r)


def test_epochs_see_a_subset_and_the_row_sees_all(tmp_path: Path) -> None:
    job = stage(SmallJob(tmp_path, [0.1] * 9, validate_images=7, epochs=2))
    assert job.measured == [("before fine-tuning", 7), ("epoch 1", 7), ("epoch 2", 7), ("qat", None)]


def test_without_validation_only_the_row_is_measured(tmp_path: Path) -> None:
    job = stage(SmallJob(tmp_path, [0.7], validate_images=0, select="last"))
    assert job.measured == [("qat", None)]
    assert job.rows["qat"] == {"value": 0.7, "kept": "epoch 4"}


@pytest.mark.parametrize("qat", [{"select": "best"}, {"select": "last", "patience": 2}])
def test_a_choice_without_validation_is_refused(qat: dict[str, Any]) -> None:
    config = Config(experiment="x", weights="w.pt", qat=QatConfig(validate_images=0, **qat))
    config.data.root = "."
    with pytest.raises(ConfigError, match="validate_images=0"):
        validate(config)


def test_patience_ends_it(tmp_path: Path) -> None:
    job = stage(SmallJob(tmp_path, [0.1, 0.5, 0.4, 0.5, 0.8, 0.9], epochs=9, patience=2))
    assert job.measured[-2][0] == "epoch 3"
    assert job.rows["qat"]["kept"] == "epoch 1"
    assert json.loads((tmp_path / "qat.json").read_text())["epochs"] == 3


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_stopped_stage_goes_on_as_if_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int, validated: bool
) -> None:
    """Early stop included: its count of stale epochs and the weights that were best come from the file.

    An epoch that was stopped in its validation is validated first.
    """
    values = [0.1, 0.5, 0.4, 0.3, 0.9]
    settings = {"epochs": 9, "patience": 2, "oscillation": "freeze", "freeze_threshold": 0.001}
    (tmp_path / "straight").mkdir()
    straight = stage(SmallJob(tmp_path / "straight", values, **settings))
    (tmp_path / "stopped").mkdir()
    save = SavedTraining.save

    def save_and_die(saved: SavedTraining) -> None:
        save(saved)
        if saved.state.epoch == stop_after and (saved.kept.epoch == stop_after) == validated:  # type: ignore[union-attr]
            raise KeyboardInterrupt

    monkeypatch.setattr(SavedTraining, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        stage(SmallJob(tmp_path / "stopped", values, **settings))
    monkeypatch.undo()
    resumed = stage(SmallJob(tmp_path / "stopped", values[stop_after + validated :], **settings))
    assert resumed.rows["qat"] == straight.rows["qat"] == {"value": 0.9, "kept": "epoch 1"}
    assert same(resumed.weights(), straight.weights())
    logs = [(tmp_path / name / "qat.jsonl").read_text().splitlines() for name in ("stopped", "straight")]
    timeless = [[{**json.loads(line), "seconds": 0} for line in log] for log in logs]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_stage_stopped_after_any_step_goes_on_as_if_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    """The validation of whole epochs is not repeated; the log has every step once."""
    values = [0.1, 0.5, 0.4, 0.3, 0.9]
    settings = {"epochs": 3, "checkpoint_minutes": 0.0}
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    straight = stage(SmallJob(tmp_path / "straight", values, **settings))
    after_step = SavedTraining.after_step

    def save_and_die(saved: SavedTraining, state: Any) -> None:
        after_step(saved, state)
        if state.step == stop_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(SavedTraining, "after_step", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        stage(SmallJob(tmp_path / "stopped", values, **settings))
    monkeypatch.undo()
    measured = 1 if stop_at <= STEPS else 2
    resumed = stage(SmallJob(tmp_path / "stopped", values[measured:], **settings))
    assert resumed.rows["qat"] == straight.rows["qat"]
    assert same(resumed.weights(), straight.weights())
    logs = [(tmp_path / name / "qat.jsonl").read_text().splitlines() for name in ("stopped", "straight")]
    assert len(logs[0]) == 3 * STEPS
    timeless = [[{**json.loads(line), "seconds": 0} for line in log] for log in logs]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(
    ("calibrated", "skipped"), [(0.499, True), (0.6, True), (0.498, False), (0.4, False)]
)
def test_the_gate_compares_ptq_with_float(tmp_path: Path, calibrated: float, skipped: bool) -> None:
    job = SmallJob(tmp_path, [0.1] * 9, epochs=1, skip_if_drop_below=0.002)
    job.run.write_row(ResultRow.of(FLOAT, {"metric": 0.5}))
    job.run.write_row(ResultRow.of(PTQ, {"metric": calibrated}))
    stage(job)
    assert (tmp_path / "qat.safetensors").exists() != skipped
    assert ("qat" in job.rows) != skipped
    assert json.loads((tmp_path / "qat.json").read_text())["skipped"] is skipped


def test_the_gate_needs_both_rows(tmp_path: Path) -> None:
    job = SmallJob(tmp_path, [0.1] * 9, skip_if_drop_below=0.002)
    job.run.write_row(ResultRow.of(PTQ, {"metric": 0.5}))
    with pytest.raises(RunError, match="stage `float`"):
        stage(job)


@pytest.mark.parametrize(("settings", "share"), [({}, 0.25), ({"distill_images": 0.5}, 0.5)])
def test_distillation_compares_the_share_that_is_set(
    tmp_path: Path, settings: dict[str, float], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def noted(model: nn.Module, options: FineTuningOptions, teacher: nn.Module) -> QuantizationAware:
        found.append(options.distill_images)
        return QuantizationAware(model, options, teacher)

    monkeypatch.setattr("pipeline.stages.finetuning.QuantizationAware", noted)
    stage(SmallJob(tmp_path, [0.1] * 9, epochs=1, **settings))
    assert found == [share]
