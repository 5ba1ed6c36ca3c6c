"""The stage `finetune`: quantization-aware fine-tuning of the calibrated model, its gate, and the choice of weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from configs.schema import Config, QatConfig
from core.rows import FLOAT, MIXED, PTQ, QAT
from pipeline.evaluation.measuring import describe, measure_name, value_of
from pipeline.job import Job, seed_everything
from pipeline.layout import layout_file, training_form
from pipeline.networks import QUANTIZED, STAGE_OF
from pipeline.run.progress import say
from pipeline.splits import TRAIN, VAL, targets_of
from pipeline.stages.both_heads import with_other_head, without_other_head
from pipeline.stages.load import FLOAT_FILES, MEASURED_BY
from pipeline.stages.recalibration import recalibrate, recalibration_file, take_back
from pipeline.stages.saved_training import SavedTraining
from pipeline.stages.stage import Stage
from pipeline.stages.training import LIGHT, augmentation, loop_options, losses_of
from quant import FineTuningOptions, QuantizationAware, placement_of
from training import TrainingState

OUTCOME, LOG, STATES = "qat.json", "qat.jsonl", "qat-state"


def finetune_stage(job: Job) -> None:
    """Fine-tune the calibrated model with the detection loss and its float copy as teacher; record the row `qat`.

    Where calibration alone is good enough for `qat.skip_if_drop_below`, nothing is trained and later stages take the
    calibrated model. Which epoch's weights are kept says `qat.select`. A stopped stage continues after the step of its
    last saved state.
    """
    if _calibration_suffices(job):
        return
    config = job.config.qat
    calibrated = job.networks.load(job.networks.calibrated_key)
    take_back(job, calibrated, job.networks.calibrated_key)
    model, teacher, loss = calibrated, copy.deepcopy(job.networks.detector.network), job.networks.loss()
    if config.both_heads:
        model, teacher, loss = with_other_head(job.networks, calibrated)
    augments = {"none": None, "light": LIGHT, "heavy": augmentation(job.config.augment)}
    loader = job.splits.train_batches(config.batch_size, augments[config.augment], job.stage_team)
    extension = QuantizationAware(model, fine_tuning_options(config), teacher)
    team = job.stage_team
    form = team.from_first(lambda: training_form(job, config, model, "finetune"))
    options = loop_options(config, form, config.task_weight)
    state = TrainingState(model, options, extension, team, targets_of)
    seed_everything(job.config.seed)  # whatever stages ran before in this process
    kept = Kept(job)
    saved = SavedTraining(job, STATES, LOG, state, kept)
    if not saved.restore():
        kept.offer(model, "before fine-tuning")
    elif kept.epoch < state.epoch:  # stopped before the end of its validation
        kept.offer_epoch(state)
        saved.save()
    batches = job.splits.epochs(loader, "finetune", config.epochs)
    if not kept.exhausted:
        for _ in saved.train(batches, loader.batch_sampler.num_batches(), loss):
            say(losses_of(state))
            saved.save()
            kept.offer_epoch(state)
            saved.save()
            if kept.exhausted:
                say(f"no improvement in {config.patience}: fine-tuning stops")
                break
    model.load_state_dict(kept.weights)
    if config.both_heads:
        model = without_other_head(model, calibrated)
    if job.stage_team.first:
        recalibrate(job, model, QAT)
        job.run.write_json(
            OUTCOME, {"skipped": False, "epochs": state.epoch, "select": config.select, "kept": kept.label}
        )
    model = job.keep(model, placement_of(model), QAT)
    measured = job.measure(QAT, job.predictor(model.eval()))
    job.record(QAT, measured, kept=kept.label)


def fine_tuning_options(config: QatConfig) -> FineTuningOptions:
    """The section `qat` as quantization-aware fine-tuning expects it."""
    return FineTuningOptions(
        scale_learning_rate=config.scale_learning_rate,
        distill_weight=config.distill_output,
        feature_weight=config.distill_features,
        distill_images=config.distill_images,
        feature_patterns=tuple(config.distill_feature_names),
        dampen_weight=config.dampen_weight if config.oscillation == "dampen" else 0.0,
        freeze_threshold=config.freeze_threshold if config.oscillation == "freeze" else None,
    )


class Kept:
    """The weights that the stage will keep, chosen among those offered after each epoch.

    With `qat.select=best` they are the best by AP (or the user's metric) on the validation images, the calibrated
    model included, so that fine-tuning never ends below its start; with `last` they are the latest.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.best = -math.inf
        self.epoch = 0  # of the last one offered
        self.stale = 0  # epochs since the best one
        self.label = ""
        self.weights: dict[str, torch.Tensor] = {}

    @property
    def exhausted(self) -> bool:
        """Whether `qat.patience` epochs have brought nothing better."""
        patience = self.job.config.qat.patience
        return patience is not None and self.stale >= patience

    def offer(self, model: nn.Module, label: str) -> dict[str, float]:
        """Measure a model, keep its weights where they are the choice, and return the figure for the log."""
        config = self.job.config.qat
        figures = {}
        better = config.select == "last"
        if config.validate_images != 0:
            predict = self.job.predictor(model)
            metrics = self.job.evaluator.measure(predict, label, limit=config.validate_images)
            say(f"{label}: {describe(metrics)}")
            value = value_of(metrics)
            figures = {"validation": value}
            self.stale = 0 if value > self.best else self.stale + 1
            better = better or value > self.best
            self.best = max(self.best, value)
        if better:
            self.label = label
            self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        return figures

    def offer_epoch(self, state: TrainingState) -> None:
        """Offer the model of a whole epoch; the figure goes to the last step's record."""
        figures = self.offer(state.averaged, f"epoch {state.epoch}")
        if state.records:
            state.records[-1].figures |= figures
        self.epoch = state.epoch

    def as_dict(self) -> dict[str, Any]:
        """Tensors and plain data, for a file."""
        names = ("best", "epoch", "stale", "label", "weights")
        return {name: getattr(self, name) for name in names}

    def restore(self, saved: dict[str, Any]) -> None:
        """Restore what `as_dict` returned."""
        for name, value in saved.items():
            setattr(self, name, value)


def _calibration_suffices(job: Job) -> bool:
    """Whether the row `ptq` is as close to `float` as the user asked; says so, and leaves a record."""
    limit = job.config.qat.skip_if_drop_below
    if limit is None:
        return False
    key = job.networks.calibrated_key
    for stage, needed in (("float", FLOAT), (STAGE_OF[key], key)):
        job.run.need(needed.path, stage)
    values = {row.key: row.value for row in job.run.rows()}
    reference, calibrated = values[FLOAT], values[key]
    assert reference is not None
    assert calibrated is not None
    drop = reference - calibrated
    measure = measure_name(job.config.metric.factory, job.splits.task)
    if not drop < limit:
        say(f"{key.name} loses {drop:.4f} {measure}, {limit:g} or more (qat.skip_if_drop_below): fine-tuning")
        return False
    say(f"{key.name} loses {drop:.4f} {measure}, less than qat.skip_if_drop_below={limit:g}: not fine-tuned")
    if job.stage_team.first:
        job.run.write_json(OUTCOME, {"skipped": True, "drop": drop, "limit": limit})
    return True


def needed_stages(config: Config) -> tuple[str, ...]:
    """The stages whose results fine-tuning reads."""
    return ("calibrate",) if config.qat.skip_if_drop_below is None else ("float", "calibrate")


FINETUNE = Stage(
    "finetune",
    finetune_stage,
    needs=needed_stages,
    settings=("qat", "augment", "seed", "data.limit_train", *MEASURED_BY),
    splits=(TRAIN, VAL),
    reads=(
        *FLOAT_FILES,
        QUANTIZED[PTQ],
        QUANTIZED[MIXED],
        FLOAT.path,
        PTQ.path,
        MIXED.path,
        recalibration_file(PTQ),
        recalibration_file(MIXED),
    ),
    writes=(QUANTIZED[QAT], OUTCOME, LOG, layout_file("finetune"), recalibration_file(QAT), QAT.path),
    partial=(f"{STATES}/*.pt", LOG, layout_file("finetune")),
    is_shared=True,
    adjustable=("qat.learning_rate", "qat.scale_learning_rate", "qat.clip_norm", "qat.micro_batch"),
)
