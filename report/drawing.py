"""Draw detections on a picture, so that a reader sees at a glance what an INT8 engine finds and misses."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from core.errors import ReportError

MIN_SIDE = 320  # pixels
_TINT = 0.45  # share of the class colour inside a mask

# Distinct on photographs and for colour-blind readers (after Okabe and Ito, 2008), RGB.
_COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
_WHITE = (255, 255, 255)


def draw_detections(
    image: NDArray[np.uint8],
    detections: ArrayLike,
    names: Sequence[str],
    masks: Sequence[NDArray[np.bool_]] = (),
) -> bytes:
    """Return `paint_detections` of the same arguments as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(paint_detections(image, detections, names, masks)).save(
        buffer, format="PNG", optimize=True
    )
    return buffer.getvalue()


def paint_detections(
    image: NDArray[np.uint8],
    detections: ArrayLike,
    names: Sequence[str],
    masks: Sequence[NDArray[np.bool_]] = (),
) -> NDArray[np.uint8]:
    """Return the picture with its masks, boxes, class names and scores, uint8 [H, W, 3], RGB.

    A picture whose shorter side is below MIN_SIDE is enlarged by a whole factor first, so that labels stay
    readable.

    Args:
        image: uint8 [H, W, 3], RGB; it is not changed.
        detections: [N, 6] (x1, y1, x2, y2 in pixels of `image`, score 0..1, class index); a torch tensor on
            the CPU is fine.
        names: class names, by index.
        masks: [H, W] each, one per detection; none for boxes alone.

    Raises:
        ReportError: a wrong shape, type or number, or a class index outside `names`.
    """
    boxes = _checked(image, detections, len(names))
    factor = max(1, -(-MIN_SIDE // min(image.shape[:2])))
    picture = Image.fromarray(_tint(image, boxes, masks) if masks else image)
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
        boxes = boxes * [factor, factor, factor, factor, 1, 1]
    draw = ImageDraw.Draw(picture)
    thickness = max(1, round(min(picture.size) / 200))
    font = ImageFont.load_default(size=max(10, round(min(picture.size) / 28)))
    for box in boxes[np.argsort(boxes[:, 4], kind="stable")]:  # the most confident last, on top
        index = int(box[5])
        _draw_box(
            draw,
            box,
            f"{_printable(names[index])} {box[4]:.2f}",
            _COLOURS[index % len(_COLOURS)],
            thickness,
            font,
        )
    return np.asarray(picture)


def _checked(image: NDArray[np.uint8], detections: ArrayLike, num_names: int) -> NDArray[np.float64]:
    """The detections, [N, 6]."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ReportError(f"image is {image.dtype} {image.shape}: expected uint8 [H, W, 3], RGB.")
    boxes = np.asarray(detections, dtype=np.float64)
    if boxes.size == 0:
        boxes = boxes.reshape(0, 6)
    if boxes.ndim != 2 or boxes.shape[1] != 6:
        raise ReportError(f"detections are {boxes.shape}: expected [N, 6] (x1, y1, x2, y2, score, class).")
    if not np.isfinite(boxes).all():
        raise ReportError("detections hold NaN or infinity: expected finite boxes; evaluate the model first.")
    for box in boxes:
        if not 0 <= box[5] < num_names:
            raise ReportError(
                f"class index {int(box[5])}: expected 0 to {num_names - 1}, as names has {num_names} entries."
            )
    return boxes


def _tint(
    image: NDArray[np.uint8], boxes: NDArray[np.float64], masks: Sequence[NDArray[np.bool_]]
) -> NDArray[np.uint8]:
    """Blend each mask's colour into the image, the most confident detection last."""
    shapes = {mask.shape for mask in masks}
    if len(masks) != len(boxes) or shapes != {image.shape[:2]}:
        raise ReportError(
            f"{len(masks)} masks of {', '.join(map(str, sorted(shapes)))} for {len(boxes)} detections: expected one of "
            f"{image.shape[:2]} for each."
        )
    tinted = image.copy()
    for index in np.argsort(boxes[:, 4], kind="stable"):
        colour = np.array(_COLOURS[int(boxes[index, 5]) % len(_COLOURS)], np.float32)
        mask = masks[index]
        tinted[mask] = ((1 - _TINT) * tinted[mask] + _TINT * colour).round().astype(np.uint8)
    return tinted


def join_pictures(pictures: Sequence[tuple[str, NDArray[np.uint8]]]) -> NDArray[np.uint8]:
    """Put pictures side by side, each under its title.

    Args:
        pictures: (title, uint8 [H, W, 3]), all of one height.

    Returns:
        uint8 [H + title, sum of widths, 3].
    """
    height = pictures[0][1].shape[0]
    font_size = max(10, round(height / 28))
    font = ImageFont.load_default(size=font_size)
    canvas = Image.new("RGB", (sum(array.shape[1] for _, array in pictures), height + 2 * font_size))
    draw = ImageDraw.Draw(canvas)
    left = 0
    for title, array in pictures:
        draw.text((left + font_size // 2, font_size // 3), _printable(title, 60), fill=_WHITE, font=font)
        canvas.paste(Image.fromarray(array), (left, 2 * font_size))
        left += array.shape[1]
    return np.asarray(canvas)


def _printable(name: str, length: int = 24) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in name)[:length]


def _draw_box(
    draw: ImageDraw.ImageDraw,
    box: NDArray[np.float64],
    label: str,
    colour: tuple[int, int, int],
    thickness: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Draw one rectangle and, above it where the picture has space, its label on a filled ground."""
    left, right = sorted((float(box[0]), float(box[2])))
    top, bottom = sorted((float(box[1]), float(box[3])))
    draw.rectangle((left, top, right, bottom), outline=colour, width=thickness)
    x1, y1, x2, y2 = draw.textbbox((0, 0), label, font=font)
    width, height = x2 - x1 + 4, y2 - y1 + 4
    x = max(0.0, min(left, draw.im.size[0] - width))
    y = top - height if top >= height else top
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    dark = sum(colour) > 330
    draw.text((x + 2 - x1, y + 2 - y1), label, fill=(0, 0, 0) if dark else (255, 255, 255), font=font)
