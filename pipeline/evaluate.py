"""Measure any engine, run or checkpoint on a dataset, with the suppression and the metric of a report's rows.

    python -m pipeline.evaluate MODEL [--data FOLDER] [--compare float|MODEL] [--size SIZE] [--limit N] [--json FILE]

MODEL is what `python -m pipeline.predict` takes. Dataset, thresholds and metric are those of the run that MODEL lies
in, outside a run the defaults of `data` and `evaluate` (docs/configuration.md). `--compare` says how many detections of
the run's float model, or of another model, are found again. The last line of stdout is the AP, or the value of the
run's own metric. Exit code 2: wrong arguments. 3: a model or data that cannot be used.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from configs.compose import read
from configs.data_schema import DataConfig
from configs.evaluate_schema import EvaluateConfig
from core.command import path_argument, reports_errors, run_command, size_argument
from core.errors import DataError
from core.files import write_json
from core.runtimes import RUNTIMES
from data import LINKS, Detections
from pipeline.class_names import BY_NAME, BY_ORDER, ClassNames, is_unnamed
from pipeline.evaluation.evaluator import Evaluator, Measured
from pipeline.evaluation.measuring import row_figures, value_of
from pipeline.prediction.predictors import (
    TORCH,
    Options,
    Predictor,
    find_run,
    open_other,
    open_predictor,
    partner_classes,
)
from pipeline.run.directory import CONFIG
from pipeline.run.progress import say, show_package_logs
from pipeline.splits import Splits


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parser().parse_args(arguments)
    show_package_logs()
    data, thresholds, metric = _settings(options)
    wanted = Options(
        confidence=thresholds.confidence,
        iou=thresholds.iou,
        max_detections=thresholds.max_detections,
        runtime=options.runtime,
        size=options.size,
        threads=options.threads,
        device="cpu",
    )
    opened = [open_predictor(options.model, wanted)]
    try:
        if options.compare is not None:
            opened.append(open_other(options.model, options.compare, wanted))
        measured = _measure(opened, data, thresholds, metric, options.limit)
    finally:
        for predictor in opened:
            predictor.close()
    say(f"{opened[0].label}: {measured.describe()}")
    if options.json is not None:
        point = measured.operating_point
        content = {"model": str(options.model), **row_figures(measured.metrics)}
        write_json(options.json, content | ({} if point is None else {"operating_point": point.as_dict()}))
    print(f"{value_of(measured.metrics):.4f}")
    return 0


def _measure(
    opened: Sequence[Predictor],
    data: DataConfig,
    thresholds: EvaluateConfig,
    metric: str | None,
    limit: int | None,
) -> Measured:
    """Figures of the first model, beside the detections of the second where there is one.

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
        say(f"{names.owner} names no classes: its class 0 is taken for class 0 of the data, and so on")
    sized = replace(data, image_size=predictor.size.plain)
    splits = Splits(sized, predictor.task, torch.device("cpu"), find_names=lambda: names)
    return Evaluator(thresholds, metric, splits, torch.device("cpu"))


def _settings(options: argparse.Namespace) -> tuple[DataConfig, EvaluateConfig, str | None]:
    """Data, thresholds and metric: those of the run that the model lies in, changed by the options."""
    data, thresholds, metric = DataConfig(), EvaluateConfig(), None
    run = find_run(options.model)
    if run is not None:
        config = read(run / CONFIG)
        data, thresholds, metric = config.data, config.evaluate, config.metric.factory
    if options.data is not None:
        data.kind, data.root, data.factory = "folder", str(options.data), None
    elif run is None:
        raise DataError(f"{options.model} lies in no run directory: name the dataset with --data FOLDER.")
    if options.class_map is not None:
        data.class_map = options.class_map
    if options.dangling_links is not None:
        data.dangling_links = options.dangling_links
    if options.split is not None:
        data.val_split = options.split
    return data, thresholds, metric


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.evaluate", description="Measure a model on a dataset."
    )
    parser.add_argument(
        "model", type=path_argument, help="run directory, engine, .onnx file, or float checkpoint"
    )
    parser.add_argument("--data", type=Path, help="dataset: YOLO data.yaml tree or COCO JSON folder")
    parser.add_argument(
        "--size", type=size_argument, help="of the input: PIXELS or HEIGHTxWIDTH; default: the model's"
    )
    parser.add_argument(
        "--class-map", choices=(BY_NAME, BY_ORDER), help="default: the run's data.class_map, or names"
    )
    parser.add_argument(
        "--dangling-links", choices=LINKS, help="default: the run's data.dangling_links, or error"
    )
    parser.add_argument(
        "--compare", metavar="float|MODEL", help="how many detections of this model are found again"
    )
    parser.add_argument("--split", help="default: the run's data.val_split, or val")
    parser.add_argument("--limit", type=int, help="images to use; default: all")
    parser.add_argument("--runtime", choices=(TORCH, *RUNTIMES), help="default: the run's, or the file's own")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


if __name__ == "__main__":
    run_command(main)
