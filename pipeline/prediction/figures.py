"""Figures of any engine, run or checkpoint on a dataset: what `pipeline.evaluate` measures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from configs.compose import read
from configs.data_schema import DataConfig
from configs.evaluate_schema import EvaluateConfig
from core.choices import BY_ORDER
from core.errors import DataError
from data import Detections
from pipeline.class_names import ClassNames, is_unnamed
from pipeline.evaluation.evaluator import Evaluator, Measured
from pipeline.prediction.predictors import (
    Options,
    Predictor,
    find_run,
    open_other,
    open_predictor,
    partner_classes,
)
from pipeline.run.directory import CONFIG
from pipeline.run.progress import say
from pipeline.splits import Splits


def measure_model(options: argparse.Namespace) -> tuple[str, Measured]:
    """What the model is, and its figures, for the options of `python -m pipeline.evaluate`.

    Raises:
        DataError, DeployError, RunError, CheckpointError: data or a model that cannot be used.
    """
    data, thresholds, metric = _settings(options)
    wanted = Options(
        confidence=thresholds.confidence,
        iou=thresholds.iou,
        max_detections=thresholds.max_detections,
        runtime=options.runtime,
        trust=options.trust,
        size=options.size,
        threads=options.threads,
        device="cpu",
    )
    opened = [open_predictor(options.model, wanted)]
    try:
        if options.compare is not None:
            opened.append(open_other(options.model, options.compare, wanted))
        return opened[0].label, _measure(opened, data, thresholds, metric, options.limit)
    finally:
        for predictor in opened:
            predictor.close()


def _measure(
    opened: Sequence[Predictor],
    data: DataConfig,
    thresholds: EvaluateConfig,
    metric: str | None,
    limit: int | None,
) -> Measured:
    """Figures of the first model, compared with the detections of the second if there is one.

    Raises:
        DataError: two models of different classes.
    """
    model, *others = opened
    reference: Detections | None = None
    for other in others:
        order = None if data.class_map == BY_ORDER else partner_classes(model, other)
        evaluator = _evaluator(other, data, thresholds, metric)
        found = evaluator.collect(other.function, other.label, 1, limit)
        reference = found if order is None else found.in_classes(order.numpy())
    evaluator = _evaluator(model, data, thresholds, metric)
    return evaluator.measure_row(model.function, model.label, reference, 1, limit)


def _evaluator(
    predictor: Predictor, data: DataConfig, thresholds: EvaluateConfig, metric: str | None
) -> Evaluator:
    """Measures a model on the data at the model's size, with the data's classes in the model's order."""
    names = ClassNames(predictor.label, predictor.names)
    if is_unnamed(names.names):
        say(f"{names.owner} has no class names: its class 0 is matched with class 0 of the data, and so on")
    sized = replace(data, image_size=predictor.size.plain)
    splits = Splits(sized, predictor.task, torch.device("cpu"), find_names=lambda: names)
    return Evaluator(thresholds, metric, splits, torch.device("cpu"))


def _settings(options: argparse.Namespace) -> tuple[DataConfig, EvaluateConfig, str | None]:
    """Data, thresholds and metric: those of the run that contains the model, changed by the options."""
    data, thresholds, metric = DataConfig(), EvaluateConfig(), None
    run = find_run(options.model)
    if run is not None:
        config = read(run / CONFIG, trust=options.trust)
        data, thresholds, metric = config.data, config.evaluate, config.metric.factory
    if options.data is not None:
        data.kind, data.root, data.factory = "folder", str(options.data), None
    elif run is None:
        raise DataError(f"{options.model} is not in a run directory: give the dataset with --data FOLDER.")
    if options.class_map is not None:
        data.class_map = options.class_map
    if options.dangling_links is not None:
        data.dangling_links = options.dangling_links
    if options.split is not None:
        data.val_split = options.split
    return data, thresholds, metric
