"""The stage `train`: float training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs.schema import AugmentConfig, QatConfig, TrainConfig
from data import AugmentOptions
from pipeline.job import Job
from pipeline.layout import Form, keep_inference_layout, layout_file, training_form
from pipeline.run.progress import say
from pipeline.splits import TRAIN, VAL, targets_of
from pipeline.stages.load import FLOAT_FILES
from pipeline.stages.saved_training import SavedTraining
from pipeline.stages.stage import Stage
from training import TrainingOptions, TrainingState

LOG, STATES = "train.jsonl", "train-state"
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
    detector = job.networks.initial().to(job.device)
    # with data.class_map=order the weights may call their classes otherwise
    detector.names = tuple(job.splits.val.names)
    if detector.amax:
        say(f"imported ranges: {len(detector.amax)} dropped, because training changes the weights")
        detector.amax = {}
    team = job.stage_team
    loader = job.splits.train_batches(config.batch_size, augmentation(job.config.augment), team)
    plain = job.splits.train_batches(config.batch_size, LIGHT, team)
    heavy_batches = job.splits.epochs(loader, "train", config.epochs)
    light_batches = job.splits.epochs(plain, "train", config.epochs)
    last_heavy = config.epochs - config.close_mosaic

    def batches(epoch: int, samples: int) -> Any:
        return (heavy_batches if epoch < last_heavy else light_batches)(epoch, samples)

    form = team.from_first(lambda: training_form(job, config, detector.network, "train"))
    options = loop_options(config, form)
    state = TrainingState(detector.network, options, team=team, targets_of=targets_of)
    saved = SavedTraining(job, STATES, LOG, state)
    saved.restore()
    num_steps = loader.batch_sampler.num_batches()
    for _ in saved.train(batches, num_steps, job.networks.loss(detector)):
        say(losses_of(state))
        saved.save()
    detector.network.load_state_dict(state.averaged.state_dict())
    if team.first:
        job.networks.keep(detector.eval())
        keep_inference_layout(job)


def loop_options(config: TrainConfig | QatConfig, form: Form, task_weight: float = 1.0) -> TrainingOptions:
    """The section `train` or `qat` as the training loop expects it, with what was chosen for the machine."""
    return TrainingOptions(
        epochs=config.epochs,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_fraction=config.warmup_fraction,
        ema_decay=config.ema_decay,
        clip_norm=config.clip_norm,
        task_weight=task_weight,
        autocast=form.autocast,
        channels_last=form.channels_last,
        micro_batch=config.micro_batch,
    )


def augmentation(config: AugmentConfig) -> AugmentOptions:
    """The section `augment` as the loader expects it."""
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


def losses_of(state: TrainingState) -> str:
    """Means of the loss terms over the last epoch, as one line."""
    records = [record for record in state.records if record.epoch == state.epoch - 1]
    if not records:
        return f"epoch {state.epoch}: every step was skipped"
    names = records[-1].losses
    means = {name: sum(record.losses[name] for record in records) / len(records) for name in names}
    text = f"epoch {state.epoch}: " + "  ".join(f"{name} {value:.4f}" for name, value in means.items())
    return (
        f"{text}; {speeds_of(records[-1].figures)}" if "scaling_efficiency" in records[-1].figures else text
    )


def speeds_of(figures: Mapping[str, float]) -> str:
    """Images per second of each process and of all, and the scaling efficiency, in words."""
    speeds = [value for name, value in figures.items() if name.startswith("images_per_second_")]
    shown = " + ".join(f"{speed:.1f}" for speed in speeds)
    return f"{shown} = {sum(speeds):.1f} images/s, scaling efficiency {figures['scaling_efficiency']:.2f}"


TRAIN_FLOAT = Stage(
    "train",
    train_stage,
    settings=(
        "model",
        "train",
        "augment",
        "seed",
        "data.image_size",
        "data.limit_train",
        "data.merge_classes",
    ),
    splits=(TRAIN, VAL),
    files=("weights",),
    is_shared=True,
    writes=(*FLOAT_FILES, LOG, layout_file("train")),
    partial=(f"{STATES}/*.pt", LOG, layout_file("train")),
    adjustable=("train.learning_rate", "train.clip_norm", "train.micro_batch"),
)
