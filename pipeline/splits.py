"""The splits of a run's dataset: opened once, and served as batches for training, calibration and evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.data_schema import DataConfig
from data import (
    AugmentOptions,
    Batch,
    Dataset,
    DetectionLoader,
    build_loader,
    generate_synthetic,
    ground_truth,
    open_dataset,
    to_input,
)
from models import SegmentTargets
from pipeline.class_names import ClassNames, fit_classes
from pipeline.run.progress import say, track
from pipeline.user_code.dataset import open_own
from training.team import ALONE, Team

TRAIN, VAL = "train", "val"


class Splits:
    """Training and validation split of a dataset, each opened (and verified) on first use.

    Args:
        config: the section `data`.
        task: `detect`, or `segment` where masks are to be read.
        device: where batches go.
        seed: of shuffling and augmentation.
        find_names: gives the weights' class names, which the data's are brought in line with; None where there are
            none.
    """

    def __init__(
        self,
        config: DataConfig,
        task: str,
        device: torch.device,
        seed: int = 0,
        find_names: Callable[[], ClassNames | None] = lambda: None,
    ) -> None:
        self.config = config
        self.task = task
        self.device = device
        self.seed = seed
        self.find_names = find_names
        self.notes: list[str] = []  # sentences for console and report
        self._digests: dict[str, str] = {}

    @cached_property
    def root(self) -> Path:
        """Folder of the dataset; the synthetic set is drawn on first use."""
        config = self.config
        if config.kind == "synthetic":
            drawn = config.synthetic
            default = f"runs/synthetic/{drawn.size}px-{drawn.train}-{drawn.val}-{drawn.seed}"
            return generate_synthetic(
                Path(config.root or default), drawn.train, drawn.val, drawn.size, drawn.seed
            )
        assert config.root is not None
        return Path(config.root)

    @property
    def source(self) -> str:
        """Where the data comes from, for messages."""
        return self.config.factory or str(self.root)

    @cached_property
    def train(self) -> Dataset:
        """Images for training and calibration, with the classes of the weights, or of the validation split."""
        wanted = self._wanted or ClassNames(f"split {self.config.val_split!r}", tuple(self.val.names))
        train = self._fit(self._open(self.config.train_split), self.config.train_split, wanted)
        if "val" in vars(self):
            self._note_shared(train, self.val)
        return train

    @cached_property
    def val(self) -> Dataset:
        """Images for every reported figure, with the classes of the weights."""
        val = self._fit(self._open(self.config.val_split), self.config.val_split, self._wanted)
        if "train" in vars(self):
            self._note_shared(self.train, val)
        return val

    @cached_property
    def _wanted(self) -> ClassNames | None:
        return self.find_names()

    def _fit(self, dataset: Dataset, split: str, wanted: ClassNames | None) -> Dataset:
        if wanted is None:
            return dataset
        fitted, note = fit_classes(dataset, f"{self.source}, split {split!r}", wanted, self.config.class_map)
        if note is not None:
            self._note(note)
        return fitted

    def _note_shared(self, train: Dataset, val: Dataset) -> None:
        """Say how many images are in both splits: figures on images that were trained with flatter a model."""
        paths, others = ({record.path for record in getattr(split, "records", ())} for split in (train, val))
        shared = len(paths & others)
        if shared:
            self._note(f"{shared} of the {len(others)} validation images are also training images.")

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
            say(f"warning: {note}")

    @cached_property
    def truth(self) -> dict[str, Any]:
        """Ground truth of the validation split as a COCO dictionary."""
        return ground_truth(self.val)

    def _open(self, split: str) -> Dataset:
        config = self.config
        if config.factory is not None:
            return open_own(config.factory, split)
        return open_dataset(
            self.root,
            split,
            format=config.format,
            merge_classes=config.merge_classes or None,
            cache_dir=Path(config.cache_dir) if config.cache_dir else None,
            segments=self.task == "segment",
            links=config.dangling_links,
        )

    def digest(self, split: str) -> str:
        """Hash of what a split holds: class names, image ids, objects with crowd flags and areas (not the pixels)."""
        if split in self._digests:
            return self._digests[split]
        dataset = self.train if split == TRAIN else self.val
        digest = hashlib.sha256(repr((list(dataset.names), list(dataset.ids))).encode())
        for record in getattr(dataset, "records", ()):
            for values in (record.boxes, record.labels, record.crowd, record.areas):
                digest.update(values.tobytes())
        self._digests[split] = digest.hexdigest()
        return self._digests[split]

    def letterboxed(
        self,
        dataset: Dataset,
        batch_size: int,
        limit: int | None = None,
        team: Team = ALONE,
        masks: bool = False,
        whole_batches: bool = False,
    ) -> DetectionLoader:
        """Batches prepared as for inference, in a fixed order; of a team, each process gets its share of the images.

        With `masks` the objects' masks come along, where a loss needs them; with `whole_batches` the batches of one
        process are shared, in turn.
        """
        return build_loader(
            dataset,
            self.config.input_size,
            batch_size,
            self.config.workers,
            limit=limit,
            rank=team.rank,
            world_size=team.size,
            masks=masks,
            whole_batches=whole_batches,
        )

    def val_batches(self, batch_size: int, limit: int | None = None, team: Team = ALONE) -> DetectionLoader:
        """Validation batches, at most `limit` images of them, or `data.limit_val`; of a team, this process's share."""
        return self.letterboxed(
            self.val, batch_size, limit or self.config.limit_val, team, whole_batches=True
        )

    def train_batches(
        self, batch_size: int, augment: AugmentOptions | None, team: Team = ALONE
    ) -> DetectionLoader:
        """Shuffled training batches; `set_epoch` gives each epoch its own order and augmentation.

        The processes of a team share the images of each batch.

        An incomplete last batch is left out where there are two full ones; fewer images make smaller batches.
        """
        limit = self.config.limit_train
        num_images = min(len(self.train), limit or len(self.train))
        return build_loader(
            self.train,
            self.config.input_size,
            batch_size,
            self.config.workers,
            augment=augment,
            shuffle=True,
            seed=self.seed,
            limit=limit,
            drop_last=num_images >= 2 * batch_size,
            rank=team.rank,
            world_size=team.size,
            split_batches=team.size > 1,
            masks=self.task == "segment",
        )

    def images(
        self,
        loader: DetectionLoader,
        label: str | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Iterator[Tensor]:
        """The batches' images as float [B, 3, H, W] on the device; progress is shown under `label`."""
        for batch in loader if label is None else track(loader, label, len(loader)):
            yield to_input(batch.images, self.device).contiguous(memory_format=memory_format)

    def labelled(self, loader: DetectionLoader, label: str) -> Iterator[tuple[Tensor, Any]]:
        """The batches' images and targets, as a loss takes them, on the device; progress is shown under `label`."""
        for batch in track(loader, label, len(loader)):
            moved: Batch = batch.to(self.device)
            targets = moved.targets if moved.masks is None else SegmentTargets(moved.targets, moved.masks)
            yield to_input(moved.images, self.device), targets

    def epochs(
        self, loader: DetectionLoader, label: str, count: int
    ) -> Callable[[int, int], Iterator[tuple[Tensor, Any]]]:
        """(epoch, samples of it that are done) -> images and targets of the rest of the epoch."""

        def batches(epoch: int, samples: int) -> Iterator[tuple[Tensor, Any]]:
            loader.resume_epoch(epoch, samples)
            return self.labelled(loader, f"{label} epoch {epoch + 1}/{count}")

        return batches


def targets_of(targets: Any, begin: int, end: int) -> Any:
    """The targets of a batch's images begin..end, as those of a batch of their own; see `Splits.labelled`."""
    rows = targets.boxes if isinstance(targets, SegmentTargets) else targets
    chosen = (rows[:, 0] >= begin) & (rows[:, 0] < end)
    boxes = rows[chosen]
    boxes[:, 0] -= begin
    return SegmentTargets(boxes, targets.masks[chosen]) if isinstance(targets, SegmentTargets) else boxes
