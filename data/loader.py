"""Turns a dataset into batches: in worker processes, in an order that depends on nothing but seed and epoch.

Workers learn the epoch with every item (data/sampler.py), and augmentation is seeded by it. So a run that stopped
inside an epoch continues at any batch with the batches that it would have had.
"""

import logging
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from core.errors import DataError, OctetError
from core.image_size import ImageSize, SizeLike
from core.names import listing
from data.augment import AugmentOptions, Fitted, augment, fit, move_outlines, objects_of
from data.delivery import PREFETCH, TICK, Packed, Pulse, choose_transport, delivered, hand_over
from data.letterbox import LetterboxInfo, letterbox, letterbox_boxes
from data.masks import MASK_STRIDE, draw_masks
from data.sampler import EpochSampler, Key
from data.samples import Batch, Dataset
from data.worker_signals import holding_signals, leave_signals_to_parent

SKIPPED_SHARE = 0.01  # of the training images that may become unreadable in a run; one may in any case
MOST_TRIED = 10  # images instead of one
KEPT_BYTES = 256 * 2**20  # memory of each worker for decoded training images

_log = logging.getLogger(__name__)

# Image [3, H, W]; class and box [N, 5]; image id; placement; masks [N, H / 4, W / 4] where they are wanted; images that
# could not be read, with the reason.
Item = tuple[
    NDArray[np.uint8], NDArray[np.float32], int, LetterboxInfo, NDArray[np.uint8] | None, dict[str, str]
]


class DetectionLoader(DataLoader[Batch]):
    """A DataLoader of `Batch`es that knows epochs. Made by `build_loader`."""

    batch_sampler: EpochSampler
    dataset: "_Prepared"

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """The batches of the chosen epoch.

        Raises:
            DataError: see `data.delivery.delivered`; or more training images than `SKIPPED_SHARE` cannot be read.
        """
        with holding_signals():
            batches = super().__iter__()
        for batch in delivered(batches, self.dataset.pulse):
            self.dataset.account(batch.skipped)
            yield batch

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose what the next iteration yields.

        Args:
            epoch: from 0; sets order and augmentation. Without a call every iteration repeats epoch 0.
            first_batch: batches to skip at the beginning, without decoding them: for a resumed run.
        """
        self.batch_sampler.epoch = epoch
        self.batch_sampler.first_batch = first_batch

    def resume_epoch(self, epoch: int, samples: int) -> None:
        """Let the next iteration yield what is left of an epoch when `samples` of it, over all ranks, are done."""
        sampler = self.batch_sampler
        together = sampler.batch_size * (1 if sampler.split_batches else sampler.world_size)
        self.set_epoch(epoch, -(-samples // together))


class _Prepared(torch.utils.data.Dataset[Any]):
    """Samples letterboxed or augmented to network input size."""

    def __init__(
        self,
        dataset: Dataset,
        indices: list[int],
        size: ImageSize,
        options: AugmentOptions | None,
        seed: int,
        masks: bool,
        pulse: Pulse,
    ):
        self.dataset = dataset
        self.indices = indices
        self.size = size
        self.options = options
        self.seed = seed
        self.masks = masks
        self.pulse = pulse
        self.skipped: dict[str, str] = {}  # training images that cannot be read, with the reason
        self._unread: dict[str, str] = {}  # of the item that is being made
        self._kept: dict[int, Fitted] = {}
        self._room = KEPT_BYTES

    def __len__(self) -> int:
        return len(self.indices)

    def account(self, skipped: dict[str, str]) -> None:
        """Name each image that was skipped once; stop above the limit."""
        for name in (name for name in skipped if name not in self.skipped):
            self.skipped[name] = skipped[name]
            _log.warning("Skipped a training image and used another one instead. %s", skipped[name])
        limit = max(1, int(SKIPPED_SHARE * len(self.indices)))
        if len(self.skipped) > limit:
            raise DataError(
                f"{len(self.skipped)} of {len(self.indices)} training images can no longer be read, more than "
                f"{limit}: {listing(self.skipped.values(), 3)} Restore them and resume."
            )

    def _read_or_skip(self, index: int) -> Fitted:
        """The image, or the next one that can be read instead of one that cannot."""
        start = self._positions[index]
        for offset in range(min(MOST_TRIED, len(self.indices))):
            chosen = self.indices[(start + offset) % len(self.indices)]
            try:
                return self._read_fitted(chosen)
            except DataError as error:
                failure = error
                self._unread[str(chosen)] = str(error)
        raise failure

    @cached_property
    def _positions(self) -> dict[int, int]:
        return {index: position for position, index in enumerate(self.indices)}

    def _read_fitted(self, index: int) -> Fitted:
        """The image at input size, kept for later mosaics as long as the cache is not full."""
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        fitted = fit(self.dataset[index], self.size, self.masks)
        if fitted[0].nbytes <= self._room:
            self._room -= fitted[0].nbytes
            self._kept[index] = fitted
        return fitted

    def __getitem__(self, key: Key) -> Item | OctetError:
        """One prepared image; a worker returns its error, so that it arrives without the worker's traceback."""
        try:
            return self._item(*key)
        except OctetError as error:
            if torch.utils.data.get_worker_info() is None:
                raise
            return error
        finally:
            self.pulse.beat()

    def _item(self, epoch: int, index: int) -> Item:
        self._unread = {}
        if self.options is None:
            sample = self.dataset[index]
            boxes, labels, outlines = objects_of(sample, self.masks)
            image, info = letterbox(sample.image, self.size)
            boxes = letterbox_boxes(boxes, info)
            placement = np.array([[info.ratio, 0, info.pad_x], [0, info.ratio, info.pad_y]], np.float64)
            outlines = move_outlines(outlines, placement)
            image_id = sample.image_id
        else:
            random = np.random.default_rng((self.seed, epoch, index))
            image, boxes, labels, outlines = augment(
                index,
                self._read_or_skip,
                self.indices,
                self.size,
                self.options,
                random,
            )
            image_id = int(self.dataset.ids[index])
            info = LetterboxInfo(1.0, 0, 0, self.size.height, self.size.width)
        objects = np.concatenate([labels[:, None].astype(np.float32), boxes], axis=1)
        masks = None if outlines is None else draw_masks(outlines, boxes, self.size)
        return channels_first(image), objects, image_id, info, masks, self._unread


def channels_first(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Copy an image [H, W, 3] to [3, H, W]: by OpenCV in a seventh of NumPy's time."""
    planes = np.empty((3, *image.shape[:2]), np.uint8)
    cv2.split(image, list(planes))
    return planes


def collate(items: list[Item]) -> Batch:
    """Stack prepared images to one batch."""
    images = torch.from_numpy(np.stack([item[0] for item in items]))
    rows = [
        np.concatenate([np.full((len(objects), 1), position, np.float32), objects], axis=1)
        for position, (_, objects, *_) in enumerate(items)
    ]
    targets: Tensor = torch.from_numpy(np.concatenate(rows).astype(np.float32, copy=False))
    drawn = [item[4] for item in items if item[4] is not None]
    masks = torch.from_numpy(np.concatenate(drawn)) if drawn else None
    skipped = {name: reason for item in items for name, reason in item[5].items()}
    return Batch(images, targets, [item[2] for item in items], [item[3] for item in items], masks, skipped)


class _Collate:
    """Makes batches in a worker, and passes them on as the loader's transport has it."""

    def __init__(self, shares: bool) -> None:
        self.shares = shares

    def __call__(self, items: list[Item | OctetError]) -> Batch | Packed | OctetError:
        good = [item for item in items if not isinstance(item, OctetError)]
        if len(good) < len(items):
            return next(item for item in items if isinstance(item, OctetError))
        return hand_over(collate(good), self.shares)


def choose_subset(num_images: int, limit: int | None) -> list[int]:
    """Positions of at most `limit` images, spread evenly over the dataset.

    Example: `choose_subset(10, 4)` is `[0, 2, 5, 7]`.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}, expected at least 1, or none for all {num_images} images.")
    if limit is None or limit >= num_images:
        return list(range(num_images))
    return [position * num_images // limit for position in range(limit)]


def build_loader(
    dataset: Dataset,
    image_size: SizeLike,
    batch_size: int,
    workers: int = 0,
    augment: AugmentOptions | None = None,
    shuffle: bool = False,
    seed: int = 0,
    limit: int | None = None,
    drop_last: bool = False,
    rank: int = 0,
    world_size: int = 1,
    masks: bool = False,
    whole_batches: bool = False,
    split_batches: bool = False,
) -> DetectionLoader:
    """Make batches of network inputs of one size.

    Args:
        dataset: a `DetectionDataset`, or any object that fulfils `Dataset`.
        image_size: of the input, pixels: one number for a square, or (height, width).
        batch_size: images per batch.
        workers: processes that decode and augment; 0 works in this one.
        augment: ranges of the training augmentation. None letterboxes only, as evaluation and calibration need it.
        shuffle: a new order each epoch (see `DetectionLoader.set_epoch`).
        seed: of order and augmentation. The batches are the same for any number of workers.
        limit: use only so many images, spread evenly over the dataset.
        drop_last: leave out an incomplete last batch.
        rank: number of this process among `world_size`.
        world_size: number of processes that share the dataset.
        masks: draw the objects' masks, too (`Batch.masks`); the dataset's samples then need `segments`.
        whole_batches: share batches instead of images, see `EpochSampler`; not with `shuffle` or `drop_last`.
        split_batches: share the images of each batch instead, see `EpochSampler`; only with `shuffle`.

    Returns:
        A loader whose length is its number of batches.

    Raises:
        DataError: an empty dataset, or a number out of range.
    """
    size = ImageSize.of(image_size)
    _check_numbers(dataset, size, batch_size, workers, masks)
    indices = choose_subset(len(dataset), limit)
    sampler = EpochSampler(
        indices, batch_size, shuffle, seed, drop_last, rank, world_size, whole_batches, split_batches
    )
    _check_shares(sampler)
    transport = choose_transport(workers, batch_size * size.height * size.width * (4 if masks else 3))
    is_parallel = transport.workers > 0
    return DetectionLoader(
        _Prepared(dataset, indices, size, augment, seed, masks, Pulse(transport.workers)),
        batch_sampler=sampler,
        num_workers=transport.workers,
        collate_fn=_Collate(transport.shares),
        worker_init_fn=_start_worker,
        persistent_workers=is_parallel,
        prefetch_factor=PREFETCH if is_parallel else None,
        timeout=TICK if is_parallel else 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),  # an iteration draws nothing from torch's own
    )


def _check_numbers(dataset: Dataset, size: ImageSize, batch_size: int, workers: int, masks: bool) -> None:
    for name, value, smallest, least in (
        ("image_size", size.plain, min(size), 1),
        ("batch_size", batch_size, batch_size, 1),
        ("workers", workers, workers, 0),
    ):
        if smallest < least:
            raise DataError(f"{name} is {value}, expected at least {least}.")
    if masks and any(side % MASK_STRIDE for side in size):
        raise DataError(f"image_size is {size.plain}, expected a multiple of {MASK_STRIDE} for masks.")
    if len(dataset) == 0:
        raise DataError("The dataset has no images; a loader needs at least one.")


def _check_shares(sampler: EpochSampler) -> None:
    """Every process needs images, of each batch or in all, unless whole batches are shared."""
    num_images, batch_size, num_processes = len(sampler.indices), sampler.batch_size, sampler.world_size
    smallest = batch_size if sampler.drop_last else num_images % batch_size or batch_size
    if sampler.split_batches and smallest < num_processes:
        raise DataError(
            f"A batch of {smallest} images cannot be shared by {num_processes} processes: use larger batches, another "
            f"number of images than {num_images}, or at most {smallest} processes."
        )
    if sampler.num_batches() == 0 and not sampler.whole_batches:
        remedy = "smaller batches" if sampler.drop_last else f"at most {num_images} processes"
        raise DataError(
            f"{num_images} images over {num_processes} processes make no full batch of {batch_size} for process "
            f"{sampler.rank}: use more images, or {remedy}."
        )


def _start_worker(worker: int) -> None:
    info = torch.utils.data.get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, _Prepared)
    leave_signals_to_parent()
    info.dataset.pulse.start(worker)
    cv2.setNumThreads(0)  # OpenCV's thread pool does not survive a fork, and workers are parallel already
