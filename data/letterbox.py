"""The only preprocessing: letterbox, RGB, divided by 255.

Training, calibration, torch evaluation and every engine go through these functions, so that a difference between
two rows of the result is never a difference in their input.

Conventions (those of the YOLO family, so that published figures can be compared): one ratio for both axes, the
smaller of the two that fit; the resized side is rounded to the nearest pixel; bilinear interpolation, also when
shrinking; the padding is split evenly, and where it is odd the extra pixel goes to the right and to the bottom.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Boxes = TypeVar("Boxes", Tensor, NDArray[np.float32], NDArray[np.float64])

PAD_VALUE = 114


@dataclass(frozen=True)
class LetterboxInfo:
    """How an original image was placed on the network input: input = original * ratio + pad.

    Attributes:
        ratio: input pixels per original pixel.
        pad_x: columns of padding on the left, input pixels.
        pad_y: rows of padding on top, input pixels.
        height: of the original image, pixels.
        width: of the original image, pixels.
    """

    ratio: float
    pad_x: int
    pad_y: int
    height: int
    width: int


def letterbox(
    image: NDArray[np.uint8], size: tuple[int, int], pad_value: int = PAD_VALUE
) -> tuple[NDArray[np.uint8], LetterboxInfo]:
    """Fit an image into `size` without changing its proportions, and pad the rest.

    Example: 480x640 (height x width) into 320x320 has ratio 0.5, becomes 240x320, and gets 40 rows above and below.

    Args:
        image: uint8 [H, W, 3].
        size: (height, width) of the result, pixels. Small images are enlarged.
        pad_value: grey level of the padding, 0 to 255.

    Returns:
        uint8 [size[0], size[1], 3] and the placement.
    """
    height, width = image.shape[:2]
    ratio = min(size[0] / height, size[1] / width)
    new_height, new_width = max(round(height * ratio), 1), max(round(width * ratio), 1)
    if (new_height, new_width) != (height, width):
        image = np.asarray(
            cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_LINEAR), np.uint8
        )
    # An odd remainder gives a half: 0.1 less rounds it down for the first side, the other side takes the rest.
    top = round((size[0] - new_height) / 2 - 0.1)
    left = round((size[1] - new_width) / 2 - 0.1)
    canvas = np.full((size[0], size[1], 3), pad_value, np.uint8)
    canvas[top : top + new_height, left : left + new_width] = image
    return canvas, LetterboxInfo(ratio, left, top, height, width)


def letterbox_boxes(boxes: NDArray[np.float32], info: LetterboxInfo) -> NDArray[np.float32]:
    """Move boxes [N, 4] (xyxy) from original pixels to input pixels."""
    offset = np.array([info.pad_x, info.pad_y, info.pad_x, info.pad_y], np.float32)
    return np.asarray(boxes * np.float32(info.ratio) + offset, np.float32)


def unletterbox(boxes: Boxes, info: LetterboxInfo) -> Boxes:
    """Move boxes from input pixels back to original pixels and clip them to the original image.

    Args:
        boxes: [..., >= 4], x1 y1 x2 y2 first; further columns (score, class) are kept as they are. Tensor or array.
        info: what `letterbox` returned for this image.

    Returns:
        A new tensor or array of the same shape and type.
    """
    moved = boxes.copy() if isinstance(boxes, np.ndarray) else boxes.clone()
    moved[..., 0:4:2] = ((moved[..., 0:4:2] - info.pad_x) / info.ratio).clip(0, info.width)
    moved[..., 1:4:2] = ((moved[..., 1:4:2] - info.pad_y) / info.ratio).clip(0, info.height)
    return moved


def to_input(images: Tensor, device: torch.device | str) -> Tensor:
    """Turn loader images into network input.

    Args:
        images: uint8 [B, 3, H, W], RGB, 0 to 255.
        device: where the result is wanted. The copy is made in uint8, a quarter of the bytes.

    Returns:
        float32 [B, 3, H, W], 0 to 1, on `device`.
    """
    return images.to(device, non_blocking=True).float() / 255
