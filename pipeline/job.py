"""The job: configuration, run directory, processes and device, handed from stage to stage."""

from __future__ import annotations

import random
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from configs.schema import Config
from configs.validation import device_problems
from core.errors import ConfigError
from core.rows import FLOAT, ResultRow, RowKey
from data import Detections, Predict
from pipeline.evaluation.evaluator import Evaluator, Measured
from pipeline.evaluation.measuring import row_figures
from pipeline.networks import Networks, names_of, task_of
from pipeline.run.directory import Run
from pipeline.run.progress import say
from pipeline.splits import Splits
from training.team import ALONE, Team


class Job:
    """What every stage is given. Data, models and evaluation are made of it by what needs them, on first use.

    Args:
        config: validated configuration.
        run: directory of artifacts.
        team: the processes that share the work.
    """

    def __init__(self, config: Config, run: Run, team: Team = ALONE) -> None:
        self.config = config
        self.run = run
        self.team = team
        self.device = choose_device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        seed_everything(config.seed)

    @cached_property
    def splits(self) -> Splits:
        """The dataset."""
        return Splits(
            self.config.data,
            task_of(self.config, self.run),
            self.device,
            self.config.seed,
            lambda: names_of(self.config, self.run),
        )

    @cached_property
    def networks(self) -> Networks:
        """Float and quantized models."""
        return Networks(self.config, self.run, self.splits, self.device)

    @cached_property
    def evaluator(self) -> Evaluator:
        """Measures models and engines."""
        return Evaluator(self.config.evaluate, self.config.metric.factory, self.splits, self.device)

    def predictor(self, network: nn.Module) -> Predict:
        """Images to detections through a torch network and the run's decode."""
        return self.evaluator.predictor(network, self.networks.detector.decode)

    @cached_property
    def float_detections(self) -> Detections | None:
        """What the float model finds in the validation images, above the user's threshold.

        None under a metric of the user's own, which may look at anything.
        """
        if self.evaluator.metric is not None:
            return None
        predict = self.predictor(self.networks.detector.network)
        return self.evaluator.collect(predict, "float").above(self.config.evaluate.operating_confidence)

    def measure(self, key: RowKey, predict: Predict, batch_size: int | None = None) -> Measured:
        """Measure the model of a row on the validation images, and compare it with the float model."""
        if key == FLOAT:
            measured = self.evaluator.measure_row(predict, key.name, None, batch_size)
            vars(self)["float_detections"] = measured.detections
            return measured
        return self.evaluator.measure_row(predict, key.name, self.float_detections, batch_size)

    def record(self, key: RowKey, measured: Measured, **figures: Any) -> None:
        """Keep one row of the result table."""
        values = {**row_figures(measured.metrics), **figures}
        self.run.write_row(ResultRow.of(key, values, measured.operating_point, measured.draws))
        say(f"{key.name}: {measured.describe()}")


def choose_device(name: str) -> torch.device:
    """Turn the `device` setting into a device that is there.

    Raises:
        ConfigError: no device's name, or a GPU that this machine does not have.
    """
    problems = device_problems(name)
    if problems:
        raise ConfigError(problems[0])
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={name}: torch sees {torch.cuda.device_count()} GPUs here; use device=auto or device=cpu"
        )
    return device


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
