"""Draws one scene of the synthetic set: background, objects back to front, and the camera's faults.

Classes come in two pairs that differ in one trait: `disc` and `ring` (a hole), `box` and `star` (straight or notched
edges). Every other trait (colour, texture, size, proportions, rotation, contrast) is drawn from the same ranges for
all of them, so that only shape tells them apart.
"""

import math

import cv2
import numpy as np
from numpy.typing import NDArray

CLASSES = ("disc", "ring", "box", "star")

Image = NDArray[np.uint8]
Canvas = NDArray[np.float32]

_MIN_VISIBLE = 0.4  # share of an object that later objects must leave uncovered
_MIN_INSIDE = 0.5  # share of an object's box that must lie in the image
_SUBPIXEL_BITS = 4  # OpenCV draws polygons with coordinates in sixteenths of a pixel


def draw_scene(size: int, seed: tuple[int, ...]) -> tuple[Image, list[tuple[int, list[float]]]]:
    """Draw one image.

    Args:
        size: side, pixels.
        seed: numbers that determine the scene.

    Returns:
        Image uint8 [size, size, 3], RGB, and its objects: class index and box x1 y1 x2 y2 in pixels, clipped to the
        image, one at least.
    """
    random = np.random.default_rng(seed)
    canvas = _background(size, random)
    owner = np.full((size, size), -1, np.int16)  # which object is seen at a pixel
    objects: list[tuple[int, list[float], int]] = []
    wanted = int(random.integers(3, 13))
    for _ in range(4 * wanted):
        if len(objects) == wanted:
            break
        label = int(random.integers(len(CLASSES)))
        mask = _shape_mask(label, size, random)
        box = _mask_box(mask, owner, objects)
        if box is None:
            continue
        _paint(canvas, mask, random)
        owner[mask > 127] = len(objects)
        objects.append((label, box, int((mask > 127).sum())))
    visible = np.bincount(owner[owner >= 0], minlength=len(objects))
    kept = [(label, box) for i, (label, box, area) in enumerate(objects) if visible[i] >= _MIN_VISIBLE * area]
    return _camera(canvas, random), kept


def _background(size: int, random: np.random.Generator) -> Canvas:
    """Smooth noise of several scales, stripes, and strokes that are no object."""
    canvas = np.zeros((size, size, 3), np.float32) + random.uniform(60, 190, 3).astype(np.float32)
    for cells, strength in ((3, 35), (8, 22), (24, 14), (64, 9)):
        noise = random.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        canvas += cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    if random.random() < 0.5:
        canvas += (_stripes(size, random) * random.uniform(5, 25))[..., None]
    for _ in range(int(random.integers(4, 16))):
        _draw_stroke(canvas, random)
    return canvas


def _stripes(size: int, random: np.random.Generator) -> Canvas:
    """A sine wave, -1 to 1, of random direction and period."""
    angle, period = random.uniform(0, math.pi), random.uniform(4, 20)
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32)
    phase = (columns * math.cos(angle) + rows * math.sin(angle)) * (2 * math.pi / period)
    return np.sin(phase + random.uniform(0, 2 * math.pi)).astype(np.float32)


def _draw_stroke(canvas: Canvas, random: np.random.Generator) -> None:
    """A line or an open arc: edges and curves that belong to no class."""
    size = canvas.shape[0]
    color = random.uniform(20, 235, 3).tolist()
    thickness = int(random.integers(1, 4))
    x, y = (int(value) for value in random.integers(0, size, 2))
    reach = random.uniform(0.05, 0.3) * size
    if random.random() < 0.5:
        angle = random.uniform(0, 2 * math.pi)
        end = (round(x + reach * math.cos(angle)), round(y + reach * math.sin(angle)))
        cv2.line(canvas, (x, y), end, color, thickness)
    else:
        start = float(random.uniform(0, 360))
        extent = float(random.uniform(60, 200))
        axes = (max(round(reach / 2), 2), max(round(reach * random.uniform(0.2, 0.5)), 2))
        cv2.ellipse(
            canvas, (x, y), axes, float(random.uniform(0, 180)), start, start + extent, color, thickness
        )


def _shape_mask(label: int, size: int, random: np.random.Generator) -> Image:
    """Coverage 0 to 255 of one object at a random place, size and rotation."""
    share = random.uniform(0.03, 0.08) if random.random() < 0.35 else random.uniform(0.08, 0.2)
    radius = max(share * size, 3.5)
    proportion = random.uniform(0.65, 1.0)
    turn = random.uniform(0, 2 * math.pi)
    center = random.uniform(0, size, 2)
    mask = np.zeros((size, size), np.uint8)
    outlines = [_outline(label, random)]
    if CLASSES[label] == "ring":
        outlines.append(outlines[0] * random.uniform(0.4, 0.65))
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    for outline, value in zip(outlines, (255, 0), strict=False):
        points = (outline * (radius, radius * proportion)) @ rotation.T + center
        fixed = np.round(points * 2**_SUBPIXEL_BITS).astype(np.int32)
        cv2.fillPoly(mask, [fixed], (value,), cv2.LINE_AA, _SUBPIXEL_BITS)
    return mask


def _outline(label: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Points [P, 2] of a class's outline within the unit circle."""
    name = CLASSES[label]
    if name in ("disc", "ring"):
        angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)
    corners = int(random.integers(4, 7)) if name == "star" else 4
    notch = random.uniform(0.4, 0.7)
    if name == "box":
        angles = np.linspace(0, 2 * math.pi, corners, endpoint=False)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)
    angles = np.linspace(0, 2 * math.pi, 2 * corners, endpoint=False)
    radii = np.where(np.arange(2 * corners) % 2 == 0, 1.0, notch)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _mask_box(
    mask: Image, owner: NDArray[np.int16], objects: list[tuple[int, list[float], int]]
) -> list[float] | None:
    """The object's box, or None where it is mostly outside or would cover too much of what is there."""
    solid = mask > 127
    rows, columns = np.flatnonzero(solid.any(axis=1)), np.flatnonzero(solid.any(axis=0))
    if not len(rows):
        return None
    box = [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]
    touches_edge = box[0] == 0 or box[1] == 0 or box[2] == mask.shape[1] or box[3] == mask.shape[0]
    sides = box[2] - box[0], box[3] - box[1]
    if touches_edge and min(sides) < _MIN_INSIDE * max(sides):
        return None
    covered = np.bincount(owner[solid & (owner >= 0)], minlength=len(objects))
    if any(covered[i] > 0.35 * area for i, (_, _, area) in enumerate(objects)):
        return None
    return box


def _paint(canvas: Canvas, mask: Image, random: np.random.Generator) -> None:
    """Lay a textured colour over the canvas where the mask is, at least a little unlike what lies below."""
    size = canvas.shape[0]
    below = canvas[mask > 127].mean(axis=0)
    color = below + random.choice((-1.0, 1.0), 3) * random.uniform(12, 80, 3)
    cells = int(random.integers(4, 24))
    noise = random.normal(0, random.uniform(3, 16), (cells, cells, 3)).astype(np.float32)
    texture = cv2.resize(noise, (size, size), interpolation=cv2.INTER_LINEAR) + color.astype(np.float32)
    if random.random() < 0.3:
        texture += (_stripes(size, random) * random.uniform(5, 20))[..., None]
    opacity = (mask.astype(np.float32) * (random.uniform(0.75, 1.0) / 255))[..., None]
    canvas += opacity * (texture - canvas)


def _camera(canvas: Canvas, random: np.random.Generator) -> Image:
    """Blur, exposure and sensor noise."""
    if random.random() < 0.5:
        canvas = np.asarray(cv2.GaussianBlur(canvas, (0, 0), random.uniform(0.4, 1.1)), np.float32)
    canvas = canvas * random.uniform(0.7, 1.2) + random.uniform(-15, 15)
    noise = random.standard_normal(canvas.shape, np.float32) * random.uniform(3, 14)
    return np.asarray((canvas + noise).clip(0, 255), np.uint8)
