"""The plain values that pass between datasets, loaders and metrics.

Everything downstream of a file format sees only these types, so a user's own dataset takes part as soon as
its items are `Sample`s: no base class is needed (see `Dataset`).

Boxes are xyxy throughout. `Sample` and `ImageRecord` hold them in pixels of the original image, `Batch` in
pixels of the network input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from data.letterbox import LetterboxInfo
from data.masks import Segmentation

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One image with its objects.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        boxes: float32 [N, 4], x1 y1 x2 y2 in pixels of `image`.
        labels: int64 [N], class indices from 0.
        image_id: unique within the dataset, not negative.
        size: (height, width) of `image`.
        crowd: bool [N], True for a region of many objects (COCO `iscrowd`): left out of training, and
            handled by the COCO rules in evaluation. None means that there are none.
        areas: float64 [N], object areas in square pixels for the COCO size ranges. None means the box areas.
        segments: N masks, in pixels of `image`: for each object polygons or a run-length code (`data.masks`). None
            means that the dataset has none, or was opened without them.
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    image_id: int
    size: tuple[int, int]
    crowd: NDArray[np.bool_] | None = None
    areas: NDArray[np.float64] | None = None
    segments: Sequence[Segmentation] | None = None


@runtime_checkable
class Dataset(Protocol):
    """What the loader and the metrics need from a dataset; any object of this shape takes part.

    Attributes:
        names: class names, by class index.
        ids: image ids, in the order of the items.
    """

    names: tuple[str, ...]
    ids: Sequence[int]

    def __len__(self) -> int:
        """Number of images."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """The image at `index`, 0 <= index < len(self), with its objects. Called from several worker processes."""
        ...


@dataclass(frozen=True)
class ImageRecord:
    """Where one image lies and what is in it, as read from annotation files, without its pixels.

    Attributes:
        path: the image file.
        image_id: unique within the split.
        size: (height, width) in pixels, in the orientation in which it will be decoded.
        boxes: float64 [N, 4], x1 y1 x2 y2 in pixels.
        labels: int64 [N].
        crowd: bool [N].
        areas: float64 [N], square pixels.
        apply_orientation: decode with the EXIF orientation applied (False where annotations refer to raw pixels).
        segments: N masks, or None where they were not asked for.
        version: of the image file that was verified (`data.images.file_version`); None where none was.
    """

    path: Path
    image_id: int
    size: tuple[int, int]
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    areas: NDArray[np.float64]
    apply_orientation: bool = True
    segments: Sequence[Segmentation] | None = None
    version: tuple[int, int] | None = None


@dataclass
class Batch:
    """Images of one step, ready for a network, with their objects.

    Attributes:
        images: uint8 [B, 3, H, W], RGB.
        targets: float32 [T, 6], one row per object: index into the batch, class, x1, y1, x2, y2 in input pixels.
            Crowd regions are not among them.
        image_ids: dataset ids, one per image.
        infos: how each image was letterboxed; the identity for augmented images.
        masks: uint8 [T, H / 4, W / 4], the share of each cell that the object covers, 0 to 255; None where the loader
            was not asked for masks.
        skipped: training images that could no longer be read, with the reason; others are used instead.
    """

    images: Tensor
    targets: Tensor
    image_ids: list[int] = field(default_factory=list)
    infos: list[LetterboxInfo] = field(default_factory=list)
    masks: Tensor | None = None
    skipped: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.images.shape[0])

    def pin_memory(self) -> Batch:
        """Copy to page-locked memory; called by the DataLoader where CUDA is present."""
        masks = None if self.masks is None else self.masks.pin_memory()
        return Batch(
            self.images.pin_memory(),
            self.targets.pin_memory(),
            self.image_ids,
            self.infos,
            masks,
            self.skipped,
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        return Batch(
            self.images.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            self.image_ids,
            self.infos,
            None if self.masks is None else self.masks.to(device, non_blocking=True),
            self.skipped,
        )


@dataclass(frozen=True)
class Instances:
    """What an instance segmentation network found in one image.

    Attributes:
        detections: [N, 6]: x1 y1 x2 y2 in input pixels, score, class.
        masks: [N, h, w], 0 to 1, on a coarser grid over the whole network input; not cut to the boxes.
    """

    detections: Tensor
    masks: Tensor
