"""Masks: how annotations store them, how training images carry them, and how predicted ones get back to their image.

Coordinates are continuous: pixel (0, 0) covers 0 to 1 in x and in y, its centre is at (0.5, 0.5). OpenCV counts from
the centre of the first pixel, so half a pixel is taken off wherever its functions are called.

A run-length code (`Rle`) is COCO's: lengths of alternating runs of 0 and 1, column by column, beginning with 0. Its
compressed form stores each length as the difference to the one two places before, in groups of five bits of which the
sixth bit says that another group follows, as characters from `0` (code 48) on.

Shapes: N objects, P points, H and W rows and columns of an image, h and w of a coarser grid over it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from core.image_size import ImageSize
from data.letterbox import LetterboxInfo

Outlines = list[NDArray[np.float64]]  # [P, 2] each: x, y; several where an object has several parts

MASK_STRIDE = 4  # input pixels per cell of the masks that training compares with
_SUBPIXEL_BITS = 4
_FIRST_CHARACTER = 48
_GROUP_BITS = 5
_MAX_GROUPS = 7  # 35 bits: more than any image has pixels


class Rle(NamedTuple):
    """A compressed run-length code.

    Attributes:
        size: (height, width) of the mask, pixels.
        counts: characters of the code.
    """

    size: tuple[int, int]
    counts: bytes


Segmentation = Outlines | Rle


def encode_mask(mask: NDArray[np.bool_], left: int = 0, width: int | None = None) -> Rle:
    """Compress a mask.

    Args:
        mask: [H, W], or only some of its columns, all others being empty.
        left: number of the first column given.
        width: W, where only some columns are given.
    """
    height, given = mask.shape
    width = given if width is None else width
    flat = np.zeros(height * given + 2, bool)  # a border of zeros, so that every run has two ends
    flat[1:-1] = mask.T.reshape(-1)
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + left * height
    edges = np.concatenate([[0], ends, [height * width]])
    counts = np.diff(edges)
    return Rle((height, width), _compress(counts if counts[-1] or len(counts) == 1 else counts[:-1]))


def decode_mask(rle: Rle) -> NDArray[np.bool_]:
    """The mask [H, W] of a code; pycocotools' gives uninitialised pixels where the runs do not fill the mask.

    Raises:
        ValueError: the runs do not fill the mask.
    """
    counts = _decompress(rle.counts)
    if (counts < 0).any() or counts.sum() != rle.size[0] * rle.size[1]:
        raise ValueError(f"runs of {int(counts.sum())} pixels for a mask of {rle.size[0]} x {rle.size[1]}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(rle.size[1], rle.size[0]).T


def _compress(counts: NDArray[np.int64]) -> bytes:
    rest = counts.astype(np.int64)
    rest[3:] -= counts[1:-2]
    groups = np.zeros((len(rest), _MAX_GROUPS), np.uint8)
    used = np.zeros((len(rest), _MAX_GROUPS), bool)
    active = np.ones(len(rest), bool)
    for position in range(_MAX_GROUPS):
        group = rest & 31
        rest = rest >> _GROUP_BITS
        more = rest != np.where(group & 16, -1, 0)
        groups[:, position] = group + np.where(more, 32, 0) + _FIRST_CHARACTER
        used[:, position] = active
        active = active & more
    return groups[used].tobytes()


def _decompress(code: bytes) -> NDArray[np.int64]:
    groups = np.frombuffer(code, np.uint8).astype(np.int64) - _FIRST_CHARACTER
    if not len(groups) or groups.min() < 0 or groups.max() > 63 or groups[-1] & 32:
        raise ValueError(f"{code[:20]!r} is not a run-length code")
    last = groups & 32 == 0
    first = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    position = np.arange(len(groups)) - np.repeat(first, np.diff(np.append(first, len(groups))))
    if position.max() >= _MAX_GROUPS:
        raise ValueError(f"{code[:20]!r} is not a run-length code")
    values = np.add.reduceat((groups & 31) << (_GROUP_BITS * position), first)
    negative = groups[last] & 16 != 0
    values[negative] -= np.int64(1) << (_GROUP_BITS * (position[last][negative] + 1))
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values


def parse_segmentation(value: Any, size: tuple[int, int]) -> Segmentation:
    """Read the `segmentation` of a COCO annotation: polygons, or a run-length code, compressed or as a list of runs.

    Args:
        value: as in the JSON file.
        size: (height, width) of the image, which a run-length code must have.

    Raises:
        ValueError: it is neither, or does not fit the image; the message says how.
    """
    if isinstance(value, dict):
        counts = value.get("counts")
        if list(value.get("size") or ()) != list(size):
            raise ValueError(f"a mask of size {value.get('size')!r} in an image of {list(size)}")
        if isinstance(counts, list) and counts and all(isinstance(run, int) and run >= 0 for run in counts):
            rle = Rle(size, _compress(np.array(counts, np.int64)))
        elif isinstance(counts, str) and counts.isascii():
            rle = Rle(size, counts.encode("ascii"))
        else:
            raise ValueError(f"counts {str(counts)[:40]!r}, expected a list of runs or a compressed string")
        decode_mask(rle)
        return rle
    if not isinstance(value, list) or not value:
        raise ValueError(f"{str(value)[:40]!r}, expected polygons or a run-length code")
    try:
        parts = [np.array(part, np.float64).reshape(-1, 2) for part in value]
    except (TypeError, ValueError) as error:
        raise ValueError(f"polygons that are not lists of x, y, x, y ...: {error}") from error
    if any(len(part) < 3 or not np.isfinite(part).all() for part in parts):
        raise ValueError("a polygon with fewer than three points, or with points that are not finite")
    return parts


def coco_segmentation(segmentation: Segmentation) -> Any:
    """The same as COCO's libraries take it: lists of x, y, x, y ..., or a dictionary with size and counts."""
    if isinstance(segmentation, Rle):
        return {"size": list(segmentation.size), "counts": segmentation.counts.decode("ascii")}
    return [part.reshape(-1).tolist() for part in segmentation]


def outlines_of(segmentation: Segmentation) -> Outlines:
    """Polygons of an object; those of a run-length code are traced (inner ones are holes)."""
    if not isinstance(segmentation, Rle):
        return segmentation
    found, _ = cv2.findContours(
        decode_mask(segmentation).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE
    )
    return [contour.reshape(-1, 2).astype(np.float64) + 0.5 for contour in found]


def polygon_area(outlines: Outlines) -> float:
    """Area of polygons that do not overlap, square pixels (shoelace formula)."""
    total = 0.0
    for part in outlines:
        x, y = part[:, 0], part[:, 1]
        total += abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
    return total


def draw_masks(
    outlines: Sequence[Outlines], boxes: NDArray[np.float32], size: ImageSize, stride: int = MASK_STRIDE
) -> NDArray[np.uint8]:
    """Masks of one training image's objects on a coarser grid.

    Args:
        outlines: of each object, input pixels; they may leave the image.
        boxes: [N, 4], xyxy, input pixels, inside the image; nothing is drawn outside of them.
        size: of the input; both sides are multiples of `stride`.
        stride: input pixels per cell.

    Returns:
        [N, height / stride, width / stride]: the share of each cell that the object covers, 0 to 255. A point that
        several parts of an object cover counts where their number is odd, so that inner parts are holes.
    """
    rows, columns = size.height // stride, size.width // stride
    result = np.zeros((len(boxes), rows, columns), np.uint8)
    for mask, parts, box in zip(result, outlines, boxes, strict=True):
        x1, y1 = np.floor(box[:2] / stride).astype(int)
        x2, y2 = np.minimum(np.ceil(box[2:] / stride).astype(int), (columns, rows))
        fine = np.zeros(((y2 - y1) * stride, (x2 - x1) * stride), np.uint8)
        shift = np.array([x1 * stride + 0.5, y1 * stride + 0.5])
        fixed = [np.round((part - shift) * 2**_SUBPIXEL_BITS).astype(np.int32) for part in parts]
        if fine.size and fixed:
            cv2.fillPoly(fine, fixed, (255,), cv2.LINE_8, _SUBPIXEL_BITS)
            mask[y1:y2, x1:x2] = cv2.resize(fine, (x2 - x1, y2 - y1), interpolation=cv2.INTER_AREA)
    return result


def restore_masks(
    soft: NDArray[np.float32],
    boxes: NDArray[np.float64],
    info: LetterboxInfo,
    input_size: tuple[int, int],
    threshold: float = 0.5,
) -> list[Rle]:
    """Bring predicted masks to the pixels of the original image.

    Each is enlarged bilinearly at the centres of those pixels of the original image that lie in its box, and cut at
    the threshold. Nothing else of the image is touched, so the cost goes with the area of the boxes.

    Args:
        soft: [N, h, w], 0 to 1, over the whole network input.
        boxes: [N, 4], xyxy, pixels of the original image.
        info: how the image was letterboxed.
        input_size: (height, width) of the network input, pixels.
        threshold: a pixel belongs to the mask above it.

    Returns:
        One code per mask, of the original image's size.
    """
    cell_y, cell_x = input_size[0] / soft.shape[1], input_size[1] / soft.shape[2]
    limit = np.array([info.width, info.height, info.width, info.height])
    corners = (
        np.ceil(boxes - 0.5).clip(0, limit).astype(int)
    )  # first pixel whose centre is inside, first after
    codes = []
    for mask, (x1, y1, x2, y2) in zip(soft, corners.tolist(), strict=True):
        columns = np.zeros((info.height, max(x2 - x1, 0)), bool)
        if x2 > x1 and y2 > y1:
            origin_x = ((x1 + 0.5) * info.ratio + info.pad_x) / cell_x - 0.5
            origin_y = ((y1 + 0.5) * info.ratio + info.pad_y) / cell_y - 0.5
            matrix = np.array([[info.ratio / cell_x, 0, origin_x], [0, info.ratio / cell_y, origin_y]])
            large = cv2.warpAffine(
                np.ascontiguousarray(mask, np.float32),
                matrix,
                (x2 - x1, y2 - y1),
                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                borderMode=cv2.BORDER_REPLICATE,
            )
            columns[y1:y2] = large > threshold
        codes.append(encode_mask(columns, x1, info.width))
    return codes
