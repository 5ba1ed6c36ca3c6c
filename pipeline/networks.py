"""The models of a run: the float detector that it starts from, and the quantized models that its stages leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from configs.schema import Config
from core.choices import AUTO, CONTIGUOUS, ONE2MANY
from core.errors import CheckpointError, ConfigError, RunError, StateError
from core.families import ARCHITECTURES, SEGMENTERS
from core.files import written_atomically
from core.names import listing
from core.processes import num_processes
from core.rows import MIXED, PTQ, QAT, RowKey
from core.types import TaskLoss
from models import (
    Detector,
    build_detector,
    detector_loss,
    find_head,
    find_names,
    find_task,
    fold_detector,
    load_detector,
    save_detector,
    select_head,
    swap_activation,
)
from pipeline.class_names import ClassNames, is_unnamed
from pipeline.run.directory import Run
from pipeline.run.progress import say
from pipeline.splits import Splits
from pipeline.user_code.network import CustomModel, OwnDetector
from quant import Mode, Placement, dump_placement, insert, parse_placement, set_mode
from training.layout import FORMATS

FLOAT_MODEL = "float.safetensors"
INFERENCE_LAYOUT = "evaluation-layout.json"
SWAPPED = "activation.json"  # what `quant.swap_activation=auto` has chosen
QUANTIZED = {QAT: "qat.safetensors", MIXED: "mixed.safetensors", PTQ: "ptq.safetensors"}  # the best one first
STAGE_OF = {QAT: "finetune", MIXED: "sensitivity", PTQ: "calibrate"}
PLACEMENT_KEY = (
    "octet-quantized-2"  # in the file's metadata; the only one, since safetensors writes keys in any order
)


def _weights_of(config: Config, run: Run | None) -> str | Path | None:
    """The run's float model where it has one, else the weights that the configuration names."""
    kept = None if run is None else run.path(FLOAT_MODEL)
    return kept if kept is not None and kept.exists() else config.weights


def task_of(config: Config, run: Run | None = None) -> str:
    """`detect`, or `segment` for networks with masks: by `model.name`, else by what the weights hold."""
    if config.model.name != "auto":
        return "segment" if config.model.name in SEGMENTERS else "detect"
    weights = _weights_of(config, run)
    return "detect" if weights is None else find_task(weights)


def head_of(config: Config, run: Run) -> str:
    """The head that the run deploys: `model.head`, else what the weights or the architecture deploy."""
    weights = _weights_of(config, run)
    if config.model.head is not None or config.model.factory is not None:
        return config.model.head or ONE2MANY
    if weights is not None:
        return find_head(weights)
    return build_detector(config.model.name, 1).deployed_head


def names_of(config: Config, run: Run) -> ClassNames | None:
    """Class names that the run's float model or its weights state.

    None for a user's own network, which gets the data's.
    """
    weights = _weights_of(config, run)
    names = None if weights is None or config.model.factory is not None else find_names(weights)
    return None if names is None else ClassNames(str(weights), names)


class Networks:
    """The float detector and the quantized models of one run.

    Args:
        config: the configuration; the sections `model` and `qat` and the weights are read.
        run: the run directory that keeps them.
        splits: the data, whose class names the detector must fit.
        device: where models go.
    """

    def __init__(self, config: Config, run: Run, splits: Splits, device: torch.device) -> None:
        self.config = config
        self.run = run
        self.splits = splits
        self.device = device

    @cached_property
    def custom(self) -> CustomModel | None:
        """The user's own network, where `model.factory` names one."""
        reference = self.config.model.factory
        if reference is None:
            return None
        return CustomModel(reference, self.splits.val.names, self.splits.config.input_size)

    def initial(self) -> Detector:
        """The detector that the user brought, or one with random weights to train; fits the data's classes.

        Raises:
            CheckpointError: the file cannot be used, or its class count is not the data's.
            ConfigError: nothing says which architecture to build, or `model.factory` does not do as it should.
        """
        config, weights = self.config.model, self.config.weights
        if self.custom is not None:
            return self.custom.initial(Path(weights) if weights else None)
        names = self.splits.val.names
        architecture = None if config.name == "auto" else config.name
        if weights is None:
            if architecture not in ARCHITECTURES:
                raise ConfigError(
                    f"model.name={config.name} has no weights to recognise it by: add weights=FILE or model=yolov9t"
                )
            detector = build_detector(architecture, len(names), config.activation or "silu", names)
            self._choose_head(detector, architecture)
            return detector
        detector = load_detector(Path(weights), architecture, config.num_classes, config.activation)
        self._choose_head(detector, str(weights))
        if detector.num_classes != len(names):
            raise CheckpointError(
                f"{weights} predicts {detector.num_classes} classes ({listing(detector.names, 5)}), but "
                f"{self.splits.source} has {len(names)} ({listing(names, 5)}): give the weights trained on this "
                "data, or map its classes with data.merge_classes"
            )
        if is_unnamed(detector.names):
            say(
                f"{weights} has no class names: class 0 of the weights is matched with class 0 of the data, and so on "
                f"({listing(names, 5)})"
            )
            detector.names = tuple(names)
        return detector

    def _choose_head(self, detector: Detector, source: str) -> None:
        """Deploy the head that `model.head` names, or the checkpoint's own.

        Raises:
            ConfigError: there is no such head.
        """
        wanted = self.config.model.head
        if wanted is None or wanted == detector.deployed_head:
            return
        if wanted not in detector.heads:
            raise ConfigError(
                f"model.head={wanted}: {source} has the head {', '.join(detector.heads)} only; leave model.head out"
            )
        detector.deploy_head(wanted)

    @cached_property
    def whole(self) -> Detector:
        """The float detector, folded, with every head that it has.

        Raises:
            RunError: neither `load` nor `train` has run.
        """
        path = self.run.need(FLOAT_MODEL, "load")
        detector = load_detector(path) if self.custom is None else self.custom.restore(path)
        return detector.to(self.device).eval()

    @cached_property
    def detector(self) -> Detector:
        """The float detector, folded and with its deployed head alone, that every later stage starts from.

        Raises:
            RunError: neither `load` nor `train` has run.
        """
        return self.whole if self.custom is not None else select_head(self.whole, self.whole.deployed_head)

    @cached_property
    def student(self) -> nn.Module:
        """The float network that is quantized: the detector's, or a copy with `swap` instead of SiLU."""
        return self._student(self.swap)

    def _student(self, activation: str | None) -> nn.Module:
        network = self.detector.network
        return network if activation is None else swap_activation(network, activation)

    @property
    def swap(self) -> str | None:
        """What replaces SiLU in the network that is quantized: as set, or as chosen with `auto`; None for nothing.

        Raises:
            RunError: `auto`, and the stage `place` has not run.
        """
        wanted = self.config.quant.swap_activation
        if wanted == AUTO:
            self.run.need(SWAPPED, "place")
            chosen: str | None = self.run.read_json(SWAPPED)["activation"]
            return chosen
        return wanted

    @contextmanager
    def swapped(self, activation: str | None) -> Iterator[None]:
        """Let `student` be the network with another activation in the block; None for the detector's own."""
        vars(self)["student"] = self._student(activation)
        try:
            yield
        finally:
            vars(self).pop("student", None)

    @property
    def memory_format(self) -> torch.memory_format:
        """Of the images wherever a network runs without training: as set, or as was measured with the float model."""
        layout = self.config.evaluate.layout
        if layout == "auto":
            is_kept = self.run.path(INFERENCE_LAYOUT).exists()
            layout = self.run.read_json(INFERENCE_LAYOUT)["layout"] if is_kept else CONTIGUOUS
        return FORMATS[layout]

    def keep(self, detector: Detector) -> None:
        """Keep a float detector as this run's float model: folded, or a user's own network as it is."""
        for name in ("detector", "whole", "student"):
            vars(self).pop(name, None)
        if self.custom is not None:
            self.custom.keep(detector, self.run.path(FLOAT_MODEL))
        else:
            save_detector(fold_detector(detector), self.run.path(FLOAT_MODEL))

    def insert(self, placement: Placement) -> fx.GraphModule:
        """The network to quantize with quantizers by a placement, on the device, in evaluation mode."""
        model = insert(self.student, placement, self.config.qat.learn_scales)
        return model.to(self.device).eval()

    def save(self, model: fx.GraphModule, placement: Placement, key: RowKey) -> None:
        """Keep a quantized model: weights, scales and placement in one file, so that they always fit."""
        state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        with written_atomically(self.run.path(QUANTIZED[key])) as (part,):
            save_file(state, part, metadata={PLACEMENT_KEY: dump_placement(placement)})

    def load(self, key: RowKey) -> fx.GraphModule:
        """A quantized model of this run, quantizers on, in evaluation mode.

        Raises:
            RunError: the stage that makes it has not run, or the file is of another version.
            StateError: the file is damaged.
        """
        path = self.run.need(QUANTIZED[key], STAGE_OF[key])
        try:
            with safe_open(path, "pt") as stream:
                metadata = stream.metadata() or {}
                state = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise StateError(f"{path} is damaged ({error}): run the stage `{STAGE_OF[key]}` again") from error
        if PLACEMENT_KEY not in metadata:
            raise RunError(f"{path} was written by another version of Octet: start a new run")
        model = self.insert(parse_placement(metadata[PLACEMENT_KEY], str(path)))
        model.load_state_dict(state)
        set_mode(model, Mode.QUANTIZE)
        return model.eval()

    @property
    def best_key(self) -> RowKey:
        """The fine-tuned model where there is one, else the calibrated one within its accuracy budget, else `ptq`."""
        return next((key for key, name in QUANTIZED.items() if self.run.path(name).exists()), PTQ)

    @property
    def calibrated_key(self) -> RowKey:
        """The calibrated model that fine-tuning starts from: within its accuracy budget, where there is one."""
        return MIXED if self.run.path(QUANTIZED[MIXED]).exists() else PTQ

    def best(self) -> tuple[fx.GraphModule, RowKey]:
        """The best quantized model so far, and its row."""
        return self.load(self.best_key), self.best_key

    def loss(self, detector: Detector | None = None) -> TaskLoss:
        """The task loss for a detector, the run's float one when None."""
        detector = self.detector if detector is None else detector
        if isinstance(detector, OwnDetector):
            return mean_over_processes(detector.loss)
        return detector_loss(detector)


def mean_over_processes(loss: TaskLoss) -> TaskLoss:
    """A user's loss as processes take it that share a batch: their parts add up to the mean of their losses."""

    def part(raw: Any, targets: Any, size: tuple[int, int]) -> dict[str, Tensor]:
        terms = loss(raw, targets, size)
        return (
            terms if num_processes() == 1 else {name: term / num_processes() for name, term in terms.items()}
        )

    return part
