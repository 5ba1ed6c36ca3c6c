"""Training augmentation: mosaic, affine warp, colour jitter and flip, all in OpenCV on uint8.

Every draw comes from one generator that the loader seeds with (seed, epoch, index), so that an image's augmentation
does not depend on how many workers there are or which of them had the image.

Mosaic: Bochkovskiy et al., YOLOv4, arXiv:2004.10934, section 3.3.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from core.errors import DataError
from core.image_size import ImageSize
from data.letterbox import PAD_VALUE
from data.masks import Outlines, outlines_of
from data.samples import Sample

Image = NDArray[np.uint8]


class Objects(NamedTuple):
    """Boxes [N, 4] (xyxy, pixels), labels [N], and the outlines where masks are wanted."""

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    outlines: list[Outlines] | None = None


class Fitted(NamedTuple):
    """An image with its objects; see `Objects`."""

    image: Image
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    outlines: list[Outlines] | None = None

    @property
    def objects(self) -> Objects:
        """Without the image."""
        return Objects(self.boxes, self.labels, self.outlines)


MIN_SIDE = 2.0  # pixels; a box whose side falls below is dropped
MIN_VISIBLE = 0.1  # share of a box's area that must stay inside the frame


@dataclass(frozen=True)
class AugmentOptions:
    """Ranges of the random changes. A range r means a uniform draw from -r to r; 0 switches the change off.

    Attributes:
        mosaic: probability, 0 to 1, that four images are put together into one.
        degrees: rotation range.
        translate: shift range, as a share of the image's width and height.
        scale: range of the zoom around 1, below 1.
        shear: range of the shear angles, degrees.
        flip_lr: probability of a mirror image, left for right.
        hsv_h: range of the hue's relative change.
        hsv_s: range of the saturation's relative change.
        hsv_v: range of the brightness's relative change.
    """

    mosaic: float = 1.0
    degrees: float = 0.0
    translate: float = 0.1
    scale: float = 0.5
    shear: float = 0.0
    flip_lr: float = 0.5
    hsv_h: float = 0.015
    hsv_s: float = 0.7
    hsv_v: float = 0.4

    def __post_init__(self) -> None:
        for name in ("mosaic", "flip_lr", "hsv_h", "hsv_s", "hsv_v", "translate"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, expected 0 to 1.")
        if not 0 <= self.scale < 1:
            raise ValueError(f"scale is {self.scale}, expected 0 to below 1.")
        if not 0 <= self.degrees <= 180 or not 0 <= self.shear < 90:
            raise ValueError(f"degrees is {self.degrees} (0 to 180), shear is {self.shear} (0 to below 90).")


def augment(
    first: int,
    read: Callable[[int], Fitted],
    candidates: Sequence[int],
    size: ImageSize,
    options: AugmentOptions,
    random: np.random.Generator,
) -> Fitted:
    """Make one training image.

    Args:
        first: index of the image to augment.
        read: returns the image at an index, as `fit` made it for `size`; it is not changed.
        candidates: indices from which the mosaic's other images are drawn.
        size: of the result.
        options: ranges of the changes.
        random: the only source of randomness.

    Returns:
        Image uint8 [height, width, 3], boxes float32 [N, 4] in its pixels, labels int64 [N], and outlines where the
        images that were read have some. Crowd regions are left out.
    """
    if random.random() < options.mosaic:
        others = [candidates[position] for position in random.integers(0, len(candidates), 3).tolist()]
        fitted = _mosaic([read(index) for index in (first, *others)], size, random)
    else:
        fitted = read(first)
    image = fitted.image
    matrix = _draw_affine((image.shape[1], image.shape[0]), size, options, random)
    image = np.asarray(
        cv2.warpAffine(
            image, matrix[:2], (size.width, size.height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT,
            borderValue=(PAD_VALUE,) * 3,
        ),
        np.uint8,
    )  # fmt: skip
    boxes, labels, outlines = warp_objects(fitted.objects, matrix, size)
    image = jitter_color(image, (options.hsv_h, options.hsv_s, options.hsv_v), random)
    if random.random() < options.flip_lr:
        image = np.asarray(cv2.flip(image, 1), np.uint8)
        boxes = np.stack(
            [size.width - boxes[:, 2], boxes[:, 1], size.width - boxes[:, 0], boxes[:, 3]], axis=1
        )
        outlines = move_outlines(outlines, np.array([[-1, 0, size.width], [0, 1, 0]], np.float64))
    return Fitted(image, boxes, labels, outlines)


def objects_of(sample: Sample, with_outlines: bool = False) -> Objects:
    """Objects of a sample that training may use: all but crowd regions; outlines only where they are asked for."""
    kept = np.arange(len(sample.labels)) if sample.crowd is None else np.flatnonzero(~sample.crowd)
    outlines = None
    if with_outlines:
        if sample.segments is None:
            raise DataError(
                f"Image {sample.image_id} has no masks, which a segmentation network learns from: open the dataset "
                "with segments=True, or give its samples `segments`."
            )
        outlines = [outlines_of(sample.segments[row]) for row in kept.tolist()]
    if len(kept) == len(sample.labels):
        return Objects(sample.boxes, sample.labels, outlines)
    return Objects(sample.boxes[kept], sample.labels[kept], outlines)


def move_outlines(outlines: list[Outlines] | None, matrix: NDArray[np.float64]) -> list[Outlines] | None:
    """Move every point by an affine map, [2, 3] or [3, 3]; None stays None."""
    if outlines is None:
        return None
    return [[part @ matrix[:2, :2].T + matrix[:2, 2] for part in parts] for parts in outlines]


def warp_objects(objects: Objects, matrix: NDArray[np.float64], size: ImageSize) -> Objects:
    """Move objects by an affine map, clip their boxes, and drop those of which too little is left.

    Args:
        objects: boxes [N, 4], xyxy, source pixels, with labels and perhaps outlines.
        matrix: [3, 3], source to result.
        size: of the result.

    Returns:
        The axis-aligned hulls of the moved corners, clipped to the result, their labels, and the moved outlines, which
        are not clipped. A box stays if both sides are at least `MIN_SIDE` pixels and at least `MIN_VISIBLE` of its
        moved area lies inside.
    """
    boxes, labels, outlines = objects
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2).astype(np.float64)
    moved = corners @ matrix[:2, :2].T + matrix[:2, 2]
    hull = np.concatenate([moved.min(axis=1), moved.max(axis=1)], axis=1)
    clipped = hull.clip(0, np.array([size.width, size.height] * 2, np.float64))
    sides = clipped[:, 2:] - clipped[:, :2]
    whole = (hull[:, 2:] - hull[:, :2]).prod(axis=1)
    keep = (sides >= MIN_SIDE).all(axis=1) & (sides.prod(axis=1) >= MIN_VISIBLE * whole)
    if outlines is not None:
        outlines = move_outlines([outlines[row] for row in np.flatnonzero(keep).tolist()], matrix)
    return Objects(clipped[keep].astype(np.float32), labels[keep], outlines)


def jitter_color(image: Image, ranges: tuple[float, float, float], random: np.random.Generator) -> Image:
    """Multiply hue, saturation and value by factors drawn from 1 - range to 1 + range.

    Args:
        image: uint8 [H, W, 3], RGB.
        ranges: for hue, saturation and value, 0 to 1.
        random: draws the three factors.
    """
    gains = 1 + random.uniform(-1, 1, 3) * ranges
    if not any(ranges):
        return image
    levels = np.arange(256, dtype=np.float64)
    table = np.stack(
        [(levels * gains[0]) % 180, (levels * gains[1]).clip(0, 255), (levels * gains[2]).clip(0, 255)],
        axis=1,
    )
    planes = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))  # a table is looked up faster in single planes
    columns = np.ascontiguousarray(table.astype(np.uint8).T)
    hsv = cv2.merge([cv2.LUT(plane, column) for plane, column in zip(planes, columns, strict=True)])
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)


def fit(sample: Sample, size: ImageSize, with_outlines: bool = False) -> Fitted:
    """Resize a sample to the largest that fits into `size`; objects follow. Without padding or crowd regions."""
    boxes, labels, outlines = objects_of(sample, with_outlines)
    height, width = sample.size
    ratio = min(size.height / height, size.width / width)
    image = sample.image
    if ratio != 1:
        shape = (max(round(width * ratio), 1), max(round(height * ratio), 1))
        image = np.asarray(cv2.resize(image, shape, interpolation=cv2.INTER_LINEAR), np.uint8)
    scaled = move_outlines(outlines, np.diag([ratio, ratio, 1.0]))
    return Fitted(image, boxes * np.float32(ratio), labels, scaled)


def _mosaic(parts: list[Fitted], size: ImageSize, random: np.random.Generator) -> Fitted:
    """Put four images around a random centre of a canvas of twice the size; each touches the centre by a corner."""
    frame = ImageSize(2 * size.height, 2 * size.width)
    canvas = np.full((*frame, 3), PAD_VALUE, np.uint8)
    center_x, center_y = (
        int(random.integers(side // 2, side + side // 2 + 1)) for side in (size.width, size.height)
    )
    placed = []
    for quadrant, part in enumerate(parts):
        image = part.image
        height, width = image.shape[:2]
        left = center_x - width if quadrant % 2 == 0 else center_x
        top = center_y - height if quadrant < 2 else center_y
        x1, y1 = max(left, 0), max(top, 0)
        x2, y2 = min(left + width, frame.width), min(top + height, frame.height)
        canvas[y1:y2, x1:x2] = image[y1 - top : y2 - top, x1 - left : x2 - left]
        shift = np.array([[1, 0, left], [0, 1, top], [0, 0, 1]], np.float64)
        placed.append(warp_objects(part.objects, shift, frame))
    outlines = [outline for item in placed for outline in item.outlines or ()]
    return Fitted(
        canvas,
        np.concatenate([item.boxes for item in placed]),
        np.concatenate([item.labels for item in placed]),
        None if placed[0].outlines is None else outlines,
    )


def _draw_affine(
    source: tuple[int, int], size: ImageSize, options: AugmentOptions, random: np.random.Generator
) -> NDArray[np.float64]:
    """A random map [3, 3] from source pixels to a result of `size`: centre, shear, rotate and zoom, then shift.

    `source` is (width, height). Without any range the source's centre lands on the centre of the result.
    """
    angle, zoom, shear_x, shear_y, shift_x, shift_y = random.uniform(-1, 1, 6).tolist()
    angle = math.radians(angle * options.degrees)
    zoom = 1 + zoom * options.scale
    centre = np.array([[1, 0, -source[0] / 2], [0, 1, -source[1] / 2], [0, 0, 1]], np.float64)
    shear = np.eye(3)
    shear[0, 1] = math.tan(math.radians(shear_x * options.shear))
    shear[1, 0] = math.tan(math.radians(shear_y * options.shear))
    cosine, sine = zoom * math.cos(angle), zoom * math.sin(angle)
    rotate = np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]], np.float64)
    shift = np.eye(3)
    shift[0, 2] = (0.5 + shift_x * options.translate) * size.width
    shift[1, 2] = (0.5 + shift_y * options.translate) * size.height
    return np.asarray(shift @ rotate @ shear @ centre, np.float64)
