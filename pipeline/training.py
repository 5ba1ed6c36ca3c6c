"""Stages that train: float training and quantization-aware fine-tuning, over the same loop."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from configs.schema import AugmentConfig
from data import AugmentOptions
from pipeline.job import Job
from pipeline.measuring import describe, value_of
from pipeline.progress import say
from quant import TrainingOptions, TrainingState, new_state, train_epochs

LIGHT = AugmentOptions(
    mosaic=0.0,
    degrees=0.0,
    translate=0.05,
    scale=0.1,
    shear=0.0,
    flip_lr=0.5,
    hsv_h=0.015,
    hsv_s=0.3,
    hsv_v=0.2,
)


def train_stage(job: Job) -> None:
    """Train the float detector, from scratch or from weights, and keep its average as the run's float model."""
    config = job.config.train
    detector = job.initial_detector().to(job.device)
    options = TrainingOptions(
        epochs=config.epochs,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_fraction=config.warmup_fraction,
        ema_decay=config.ema_decay,
        clip_norm=config.clip_norm,
        distill_weight=0.0,
        amp=config.amp,
    )
    loader = job.train_loader(config.batch_size, augmentation(job.config.augment))
    plain = job.train_loader(config.batch_size, LIGHT)
    heavy_batches = job.epoch_batches(loader, "train", config.epochs)
    light_batches = job.epoch_batches(plain, "train", config.epochs)
    last_heavy = config.epochs - config.close_mosaic

    def batches(epoch: int) -> Any:
        return heavy_batches(epoch) if epoch < last_heavy else light_batches(epoch)

    loss = job.loss(detector)
    network = detector.network
    state: TrainingState | None = None
    for state in train_epochs(network, batches, len(loader), loss, options):
        say(_progress(state))
        job.run.write_lines("train.jsonl", (record.as_dict() for record in state.records))
    assert state is not None
    if state.average is not None:
        network.load_state_dict(state.average.model.state_dict())
    job.keep_detector(detector.eval())


def finetune_stage(job: Job) -> None:
    """Fine-tune the calibrated model with the detection loss and its float copy as teacher; record the row `qat`.

    The weights kept are those of the best epoch on the validation images, the calibrated model itself included,
    so that fine-tuning never ends below its start. A stopped stage goes on after its last whole epoch.
    """
    config = job.config.qat
    model = job.load_quantized("ptq.safetensors", "calibrate")
    options = TrainingOptions(
        epochs=config.epochs,
        learning_rate=config.learning_rate,
        scale_learning_rate=config.scale_learning_rate,
        weight_decay=config.weight_decay,
        warmup_fraction=config.warmup_fraction,
        ema_decay=config.ema_decay,
        clip_norm=config.clip_norm,
        task_weight=config.task_weight,
        distill_weight=config.distill_output,
        amp=config.amp,
    )
    augments = {"none": None, "light": LIGHT, "heavy": augmentation(job.config.augment)}
    loader = job.train_loader(config.batch_size, augments[config.augment])
    state = new_state(model, options)
    best = Best(job)
    earlier: list[dict[str, Any]] = []
    if job.run.path("qat-state.pt").exists():
        best.restore(_load_state(job, model, state))
        earlier = [record for record in job.run.read_lines("qat.jsonl") if record["epoch"] < state.epoch]
    else:
        best.offer(model, "before fine-tuning")
    batches = job.epoch_batches(loader, "finetune", config.epochs)
    teacher = copy.deepcopy(job.detector.network)
    epochs = train_epochs(model, batches, len(loader), job.loss(), options, teacher, state)
    for _ in epochs:
        averaged = state.average.model if state.average is not None else model
        say(_progress(state))
        best.offer(averaged, f"epoch {state.epoch}")
        job.run.write_lines("qat.jsonl", [*earlier, *(record.as_dict() for record in state.records)])
        _save_state(job, model, state, best)
    model.load_state_dict(best.weights)
    job.save_quantized(model, "qat.safetensors")
    job.run.path("qat-state.pt").unlink(missing_ok=True)
    metrics = job.measure(job.predictor(model.eval()), "qat")
    job.record_row("qat", metrics, kept=best.label)


class Best:
    """The best weights so far, by AP (or the user's metric) on the validation images."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.value = -math.inf
        self.label = ""
        self.weights: dict[str, torch.Tensor] = {}

    def offer(self, model: nn.Module, label: str) -> None:
        """Measure a model and keep its weights where it is better."""
        limit = self.job.config.qat.validate_images
        metrics = self.job.measure(self.job.predictor(model), label, limit=limit)
        say(f"{label}: {describe(metrics)}")
        if value_of(metrics) > self.value:
            self.value, self.label = value_of(metrics), label
            self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a saved best."""
        self.value, self.label, self.weights = saved["best_value"], saved["best_label"], saved["best"]


def augmentation(config: AugmentConfig) -> AugmentOptions:
    """The data room's options from the `augment` section."""
    return AugmentOptions(
        mosaic=config.mosaic,
        degrees=config.degrees,
        translate=config.translate,
        scale=config.scale,
        shear=config.shear,
        flip_lr=config.flip,
        hsv_h=config.hsv_h,
        hsv_s=config.hsv_s,
        hsv_v=config.hsv_v,
    )


def _progress(state: TrainingState) -> str:
    records = [record for record in state.records if record.epoch == state.epoch - 1]
    names = records[-1].losses
    means = {name: sum(record.losses[name] for record in records) / len(records) for name in names}
    return f"epoch {state.epoch}: " + "  ".join(f"{name} {value:.4f}" for name, value in means.items())


def _save_state(job: Job, model: nn.Module, state: TrainingState, best: Best) -> None:
    """Keep all that the next epoch depends on; tensors and plain data only."""
    content = {
        "model": model.state_dict(),
        "average": state.average.model.state_dict() if state.average is not None else None,
        "updates": state.average.updates if state.average is not None else 0,
        "optimizer": state.optimizer.state_dict(),
        "step": state.step,
        "epoch": state.epoch,
        "best": best.weights,
        "best_value": best.value,
        "best_label": best.label,
    }
    temporary = job.run.path(".qat-state.partial")
    torch.save(content, temporary)
    temporary.replace(job.run.path("qat-state.pt"))


def _load_state(job: Job, model: nn.Module, state: TrainingState) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(
        job.run.path("qat-state.pt"), map_location=job.device, weights_only=True
    )
    model.load_state_dict(saved["model"])
    state.optimizer.load_state_dict(saved["optimizer"])
    if state.average is not None:
        state.average.model.load_state_dict(saved["average"])
        state.average.updates = saved["updates"]
    state.step, state.epoch = saved["step"], saved["epoch"]
    say(f"fine-tuning goes on after epoch {state.epoch}")
    return saved
