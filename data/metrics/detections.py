"""What a detector found in the images of a split: collected batch by batch, and joined over batches and processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import DataError
from data.letterbox import LetterboxInfo, to_input, unletterbox
from data.masks import Rle, restore_masks
from data.metrics.precision_recall import Boxes
from data.samples import Batch, Instances

Found = Tensor | Instances
Predict = Callable[[Tensor], Sequence[Found]]


def to_picture(
    found: Found, info: LetterboxInfo, input_size: tuple[int, int]
) -> tuple[NDArray[np.float64], list[Rle] | None]:
    """What was found in a network's input, in the pixels of the original image.

    Args:
        found: of one image.
        info: how it was letterboxed.
        input_size: (height, width) of the input, pixels.

    Returns:
        Detections [N, 6] (x1, y1, x2, y2, score, class), and their masks where the network gives any.
    """
    boxes = found.detections if isinstance(found, Instances) else found
    moved = unletterbox(boxes.detach().double().cpu(), info).numpy()
    if not isinstance(found, Instances):
        return moved, None
    return moved, restore_masks(found.masks.float().cpu().numpy(), moved[:, :4], info, input_size)


@dataclass(frozen=True)
class Detections:
    """What a detector found in the images of a split.

    Attributes:
        rows: float64 [N, 6] for each image: x1 y1 x2 y2 in pixels of the original image, score, class index.
        image_ids: of the images, in that order; also those without detections.
        masks: one per detection, image by image, in pixels of the original image; None for a detector without.
    """

    rows: Sequence[NDArray[np.float64]]
    image_ids: Sequence[int]
    masks: Sequence[Rle] | None = None

    def above(self, confidence: float) -> Detections:
        """Only detections with a greater score, without masks."""
        return Detections([rows[rows[:, 4] > confidence] for rows in self.rows], self.image_ids)

    def in_classes(self, order: NDArray[np.int64]) -> Detections:
        """With class `order[k]` instead of class k, without masks."""
        rows = [np.concatenate([r[:, :5], order[r[:, 5:].astype(np.int64)]], axis=1) for r in self.rows]
        return Detections(rows, self.image_ids)

    def boxes(self, number_of: Mapping[int, int]) -> Boxes:
        """All of them, with numbers instead of the image ids."""
        rows = np.concatenate([np.zeros((0, 6)), *self.rows])
        numbers = [number_of[image_id] for image_id in self.image_ids]
        images = np.repeat(np.array(numbers, np.int64), list(map(len, self.rows)))
        return Boxes(rows[:, :4], images, rows[:, 5].astype(np.int64), rows[:, 4])


def join_shares(shares: Sequence[Detections], batch_size: int) -> Detections:
    """Detections of several processes that took the batches of a split in turn, in the order of one process.

    Args:
        shares: of each process, in the order of ranks; some may be empty.
        batch_size: images per batch; only the last batch of all may have fewer.
    """
    masks = [_per_image(share) for share in shares]
    order = sorted(
        (index // batch_size, rank, index)
        for rank, share in enumerate(shares)
        for index in range(len(share.image_ids))
    )
    joined = [mask for _, rank, index in order for mask in masks[rank][index]]
    return Detections(
        [shares[rank].rows[index] for _, rank, index in order],
        [shares[rank].image_ids[index] for _, rank, index in order],
        joined if any(share.masks is not None for share in shares) else None,
    )


def _per_image(found: Detections) -> list[list[Rle]]:
    """The masks of each image; none for a detector without."""
    ends = itertools.accumulate(map(len, found.rows), initial=0)
    return [list((found.masks or [])[start:end]) for start, end in itertools.pairwise(ends)]


def collect(predict: Predict, batches: Iterable[Batch], device: torch.device | str = "cpu") -> Detections:
    """Detections in all images of `batches`, which may be none; arguments as for `evaluate`.

    Raises:
        DataError: not as many results as images.
    """
    parts = []
    for batch in batches:
        with torch.inference_mode():
            found = predict(to_input(batch.images, device))
        parts.append(in_pictures(found, batch))
    return join_batches(parts)


def in_pictures(detections: Sequence[Found], batch: Batch) -> Detections:
    """What was found in the images of a batch, moved to the original images.

    Raises:
        DataError: not as many results as images.
    """
    if len(detections) != len(batch.image_ids):
        raise DataError(
            f"predict returned {len(detections)} results for a batch of {len(batch.image_ids)} images."
        )
    size = (int(batch.images.shape[2]), int(batch.images.shape[3]))
    moved = [to_picture(found, info, size) for found, info in zip(detections, batch.infos, strict=True)]
    masks = [code for _, codes in moved for code in codes or ()]
    segmented = any(codes is not None for _, codes in moved)
    return Detections([rows for rows, _ in moved], list(batch.image_ids), masks if segmented else None)


def join_batches(parts: Sequence[Detections]) -> Detections:
    """Detections of batches, one after the other."""
    masks = [mask for part in parts for mask in part.masks or ()]
    return Detections(
        [rows for part in parts for rows in part.rows],
        [image_id for part in parts for image_id in part.image_ids],
        masks if any(part.masks is not None for part in parts) else None,
    )
