"""The job: configuration, run directory, processes and device, handed from stage to stage."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import fx, nn

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
from quant import Placement
from quant.native.kernel import choose_kernel
from training.team import ALONE, Team


class Job:
    """What every stage is given. Data, models and evaluation are made of it by what needs them, on first use.

    Args:
        config: validated configuration.
        run: directory of artifacts.
        team: the processes that share the work.

    Attributes:
        stage_team: those that run the present stage together; this process alone outside of shared stages.
    """

    def __init__(self, config: Config, run: Run, team: Team = ALONE) -> None:
        self.config = config
        self.run = run
        self.team = team
        self.stage_team = ALONE
        self.device = choose_device(config.device, team)
        if config.threads:
            torch.set_num_threads(config.threads)
        choose_kernel(config.quant.kernel)
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
        config = self.config
        return Evaluator(
            config.evaluate, config.metric.factory, self.splits, self.device, lambda: self.stage_team
        )

    def predictor(self, network: nn.Module) -> Predict:
        """Images to detections through a torch network and the run's decode."""
        networks = self.networks
        return self.evaluator.predictor(network, networks.detector.decode, networks.memory_format)

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
        """Measure the model of a row on the validation images, and compare it with the float model.

        The processes of a shared stage do so together, and all get the figures.
        """
        if key == FLOAT:
            measured = self.evaluator.measure_row(predict, key.name, None, batch_size)
            vars(self)["float_detections"] = measured.detections
            return measured
        if not self.stage_team.share("float_detections" in vars(self)):
            vars(self).pop("float_detections", None)  # the processes find them together
        return self.evaluator.measure_row(predict, key.name, self.float_detections, batch_size)

    def record(self, key: RowKey, measured: Measured, **figures: Any) -> None:
        """Keep one row of the result table; the first process does."""
        if not self.team.first:
            return
        values = {**row_figures(measured.metrics), **figures}
        self.run.write_row(ResultRow.of(key, values, measured.operating_point, measured.draws))
        say(f"{key.name}: {measured.describe()}")

    def keep(self, model: fx.GraphModule, placement: Placement, key: RowKey) -> fx.GraphModule:
        """Keep the first process's quantized model in the run; returns it, in the other processes as it was kept."""
        if self.stage_team.first:
            self.networks.save(model, placement, key)
        self.stage_team.wait()
        return model if self.stage_team.first else self.networks.load(key)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let each process of a shared stage work for itself in the block."""
        team, self.stage_team = self.stage_team, ALONE
        try:
            yield
        finally:
            self.stage_team = team


def choose_device(name: str, team: Team = ALONE) -> torch.device:
    """Turn the `device` setting into a device that is there.

    Raises:
        ConfigError: no device's name, a GPU that this machine does not have, or one GPU for several processes.
    """
    problems = device_problems(name)
    if problems:
        raise ConfigError(problems[0])
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.index is not None and team.size > 1:
        raise ConfigError(
            f"device={name} for {team.size} processes: use device=cuda; each process takes the GPU of its local rank"
        )
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
