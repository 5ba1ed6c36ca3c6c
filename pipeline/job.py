"""The job: one run's configuration, data and models, opened once and handed from stage to stage."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from configs.schema import Config
from core.errors import CheckpointError, ConfigError
from core.files import written_atomically
from core.types import TaskLoss
from data import (
    AugmentOptions,
    Batch,
    Dataset,
    DetectionLoader,
    Found,
    Predict,
    build_loader,
    evaluate,
    generate_synthetic,
    ground_truth,
    open_dataset,
    to_input,
)
from models import (
    ARCHITECTURES,
    SEGMENTATION_ARCHITECTURES,
    DetectionLoss,
    Detector,
    SegmentationLoss,
    SegmentTargets,
    build_detector,
    find_task,
    fold_detector,
    load_detector,
    placeholder_names,
    save_detector,
)
from pipeline.evaluation.measuring import Metrics, describe, measure_custom, row_figures
from pipeline.evaluation.suppression import suppress_overlaps
from pipeline.run.directory import Run
from pipeline.run.progress import say, track
from pipeline.user_code.dataset import open_own
from pipeline.user_code.network import CustomModel, OwnDetector
from quant import Mode, insert, load_placement, set_mode
from training.team import Team

FLOAT_MODEL = "float.safetensors"
ALONE = Team()


class Job:
    """What every stage needs.

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

    # -- data

    @cached_property
    def task(self) -> str:
        """`detect`, or `segment` for networks with masks: by `model.name`, else by what the weights hold."""
        name = self.config.model.name
        if name != "auto":
            return "segment" if name in SEGMENTATION_ARCHITECTURES else "detect"
        kept = self.run.path(FLOAT_MODEL)
        weights = kept if kept.exists() else self.config.weights
        return "detect" if weights is None else find_task(weights)

    @cached_property
    def data_root(self) -> Path:
        """Folder of the dataset; the synthetic set is drawn on first use."""
        config = self.config.data
        if config.kind == "synthetic":
            synthetic = config.synthetic
            root = Path(
                config.root
                or f"runs/synthetic/{synthetic.size}px-{synthetic.train}-{synthetic.val}-{synthetic.seed}"
            )
            return generate_synthetic(root, synthetic.train, synthetic.val, synthetic.size, synthetic.seed)
        assert config.root is not None
        return Path(config.root)

    @cached_property
    def train_set(self) -> Dataset:
        """Images for training and calibration."""
        return self._open(self.config.data.train_split)

    @cached_property
    def val_set(self) -> Dataset:
        """Images for every reported figure."""
        return self._open(self.config.data.val_split)

    @cached_property
    def truth(self) -> dict[str, Any]:
        """Ground truth of the validation split as a COCO dictionary."""
        return ground_truth(self.val_set)

    def _open(self, split: str) -> Dataset:
        config = self.config.data
        if config.factory is not None:
            return open_own(config.factory, split)
        merged = config.merge_classes or None
        cache = Path(config.cache_dir) if config.cache_dir else None
        return open_dataset(
            self.data_root,
            split,
            format=config.format,
            merge_classes=merged,
            cache_dir=cache,
            segments=self.task == "segment",
        )

    def letterboxed(
        self,
        dataset: Dataset,
        batch_size: int,
        limit: int | None,
        team: Team = ALONE,
        masks: bool = False,
    ) -> DetectionLoader:
        """Batches prepared as for inference, in a fixed order; of a team, each process gets its share.

        With `masks` the objects' masks come along, where a loss needs them.
        """
        config = self.config.data
        return build_loader(
            dataset,
            config.image_size,
            batch_size,
            config.workers,
            limit=limit,
            rank=team.rank,
            world_size=team.size,
            masks=masks,
        )

    def targets(self, batch: Batch) -> Any:
        """What the loss compares with: boxes, or for segmentation boxes and masks."""
        return batch.targets if batch.masks is None else SegmentTargets(batch.targets, batch.masks)

    def val_loader(self, batch_size: int | None = None, limit: int | None = None) -> DetectionLoader:
        """Validation batches."""
        limit = limit or self.config.data.limit_val
        return self.letterboxed(self.val_set, batch_size or self.config.evaluate.batch_size, limit)

    def calibration_images(self, team: Team = ALONE) -> Iterator[Tensor]:
        """Letterboxed training images on the device, spread evenly over the split; of a team, this process's share."""
        config = self.config.quant
        size, limit = config.calibration_batch_size, config.calibration_images
        loader = self.letterboxed(self.train_set, size, limit, team)
        for batch in track(loader, "calibrate", len(loader)):
            yield to_input(batch.images, self.device)

    def few_calibration_images(self, count: int) -> list[Tensor]:
        """At most `count` of the calibration images, spread evenly over the split, held on the device as batches."""
        config = self.config.quant
        limit = min(count, config.calibration_images)
        loader = self.letterboxed(self.train_set, config.calibration_batch_size, limit)
        return [to_input(batch.images, self.device) for batch in loader]

    def train_loader(self, batch_size: int, augment: AugmentOptions | None) -> DetectionLoader:
        """Shuffled training batches; `set_epoch` gives each epoch its own order and augmentation."""
        config = self.config
        return build_loader(
            self.train_set,
            config.data.image_size,
            batch_size,
            config.data.workers,
            augment=augment,
            shuffle=True,
            seed=config.seed,
            limit=config.data.limit_train,
            drop_last=len(self.train_set) >= 2 * batch_size,
            masks=self.task == "segment",
        )

    def epoch_batches(
        self, loader: DetectionLoader, label: str, epochs: int
    ) -> Callable[[int], Iterator[tuple[Tensor, Any]]]:
        """Epoch number -> that epoch's (images, targets) on the device, with progress shown."""

        def batches(epoch: int) -> Iterator[tuple[Tensor, Any]]:
            loader.set_epoch(epoch)
            for batch in track(loader, f"{label} epoch {epoch + 1}/{epochs}", len(loader)):
                moved: Batch = batch.to(self.device)
                yield to_input(moved.images, self.device), self.targets(moved)

        return batches

    # -- models

    @cached_property
    def custom(self) -> CustomModel | None:
        """The user's own network, where `model.factory` names one."""
        reference = self.config.model.factory
        if reference is None:
            return None
        return CustomModel(reference, self.val_set.names, self.config.data.image_size)

    def initial_detector(self) -> Detector:
        """The detector that the user brought, or one with random weights; fits the data's classes.

        Raises:
            CheckpointError: the file cannot be used, or its class count is not the data's.
            ConfigError: nothing says which architecture to build, or `model.factory` does not do as it should.
        """
        if self.custom is not None:
            return self.custom.initial(Path(self.config.weights) if self.config.weights else None)
        config = self.config.model
        names = self.val_set.names
        architecture = None if config.name == "auto" else config.name
        if self.config.weights is None:
            if architecture not in {*ARCHITECTURES, *SEGMENTATION_ARCHITECTURES}:
                raise ConfigError(
                    f"model.name={config.name} has no weights to recognise it by: add weights=FILE or model=yolov9t"
                )
            return build_detector(architecture, len(names), config.activation or "silu", names)
        detector = load_detector(
            Path(self.config.weights), architecture, config.num_classes, config.activation
        )
        if detector.num_classes != len(names):
            where = self.config.data.factory or self.data_root
            raise CheckpointError(
                f"{self.config.weights} predicts {detector.num_classes} classes ({first(detector.names)}), but "
                f"{where} has {len(names)} ({first(names)}): give the weights trained on this data, or map "
                "its classes with data.merge_classes"
            )
        if detector.names == placeholder_names(len(names)):
            detector.names = tuple(names)
        if tuple(name.lower() for name in detector.names) != tuple(name.lower() for name in names):
            say(
                f"class names differ: weights {first(detector.names)}, data {first(names)}; the order must be the same"
            )
        return detector

    @cached_property
    def detector(self) -> Detector:
        """The float detector, folded, that every later stage starts from; kept in the run directory."""
        path = self.run.path(FLOAT_MODEL)
        if not path.exists():
            self.keep_detector(self.initial_detector())
        detector = load_detector(path) if self.custom is None else self.custom.restore(path)
        return detector.to(self.device).eval()

    def keep_detector(self, detector: Detector) -> None:
        """Keep a float detector as this run's float model: folded, or a user's own network as it is."""
        if self.custom is not None:
            self.custom.keep(detector, self.run.path(FLOAT_MODEL))
            return
        save_detector(fold_detector(detector), self.run.path(FLOAT_MODEL))

    def save_quantized(self, model: fx.GraphModule, name: str) -> None:
        """Keep weights and scales of a quantized model."""
        state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        with written_atomically(self.run.path(name)) as (part,):
            save_file(state, part, metadata={"format": "octet-quantized"})

    def load_quantized(self, name: str, stage: str) -> fx.GraphModule:
        """The quantized model of a stage, quantizers on, in evaluation mode."""
        path = self.run.need(name, stage)
        placement = load_placement(self.run.need("placement.yaml", "calibrate"))
        model = insert(self.detector.network, placement, self.config.qat.learn_scales).to(self.device)
        model.load_state_dict(load_file(path))
        set_mode(model, Mode.QUANTIZE)
        return model.eval()

    def best_quantized(self) -> tuple[fx.GraphModule, str]:
        """The fine-tuned model where there is one, else the calibrated one; and its row name."""
        if self.run.path("qat.safetensors").exists():
            return self.load_quantized("qat.safetensors", "finetune"), "qat"
        return self.load_quantized("ptq.safetensors", "calibrate"), "ptq"

    def loss(self, detector: Detector | None = None) -> TaskLoss:
        """The task loss for a detector, the run's float one when None."""
        detector = self.detector if detector is None else detector
        if isinstance(detector, OwnDetector):
            return detector.loss
        if detector.task == "segment":
            return SegmentationLoss(detector.num_classes, detector.strides)
        return DetectionLoss(detector.num_classes, detector.strides)

    # -- evaluation

    def detections(self, decoded: Any, confidence: float | None = None) -> Sequence[Found]:
        """Suppress overlaps in decoded outputs, as every row of the table does.

        Args:
            decoded: what the decode returns: [B, 4 + K, A], or with coefficients and prototypes for segmentation.
            confidence: lowest score kept; the configured one when None.
        """
        config = self.config.evaluate
        confidence = config.confidence if confidence is None else confidence
        return suppress_overlaps(decoded, confidence, config.iou, config.max_detections)

    def predictor(self, network: nn.Module) -> Predict:
        """Images to detections through a torch network and this detector's decode."""
        decode = self.detector.decode

        def predict(images: Tensor) -> Sequence[Found]:
            return self.detections(decode(network(images)))

        return predict

    def measure(
        self, predict: Predict, label: str, batch_size: int | None = None, limit: int | None = None
    ) -> Metrics:
        """COCO figures, or the user's metric, on the validation split; the same path for torch and every engine."""
        loader = self.val_loader(batch_size, limit)
        return self.evaluate_batches(predict, track(loader, f"evaluate {label}", len(loader)))

    def evaluate_batches(self, predict: Predict, batches: Iterable[Batch]) -> Metrics:
        """COCO figures, or the user's metric, over validation batches, without a word."""
        if self.config.metric.factory is not None:
            return measure_custom(self.config.metric.factory, predict, batches, self.device)
        return evaluate(predict, batches, self.truth, self.config.evaluate.engine, self.device)

    def record_row(self, name: str, metrics: Metrics, **figures: Any) -> None:
        """Keep one row of the result table."""
        self.run.write_row(name, **{**row_figures(metrics), **figures})
        say(f"{name}: {describe(metrics)}")


def first(names: Sequence[str], count: int = 5) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def choose_device(name: str) -> torch.device:
    """Turn the `device` setting into a device that is there.

    Raises:
        ConfigError: a GPU was asked for that this machine does not have.
    """
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
