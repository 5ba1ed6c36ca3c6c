"""Rectangular inputs: letterbox and augmentation against formulas looped by hand and against the pixels themselves."""

import cv2
import numpy as np
import pytest
import torch

from core.image_size import ImageSize
from data import AugmentOptions, Sample, build_loader, evaluate, letterbox, unletterbox
from data.augment import augment, fit
from data.letterbox import letterbox_boxes
from data.masks import draw_masks

RECTANGLES = [(64, 96), (96, 64), (32, 160)]


class Bricks:
    """One bright rectangle per image on black; images of several shapes."""

    names = ("brick",)
    shapes = ((48, 64), (64, 48), (30, 90))

    def __init__(self, outlines: bool = False) -> None:
        self.ids = list(range(9))
        self.outlines = outlines

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        shape = self.shapes[index % 3]
        image = np.zeros((*shape, 3), np.uint8)
        x, y = 4 + index, 3 + index // 2
        image[y : y + 16, x : x + 22] = 255
        box = np.array([[x, y, x + 22, y + 16]], np.float32)
        outline = np.array([[x, y], [x + 22, y], [x + 22, y + 16], [x, y + 16]], np.float64)
        segments = [[outline]] if self.outlines else None
        return Sample(image, box, np.zeros(1, np.int64), index, shape, segments=segments)


def letterbox_by_hand(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixel by pixel: one ratio for both axes, bilinear at the pixels' centres, spare rows and columns shared out."""
    rows, columns = image.shape[:2]
    ratio = height / rows if height * columns < width * rows else width / columns
    inner_rows, inner_columns = round(rows * ratio), round(columns * ratio)
    top, left = (height - inner_rows) // 2, (width - inner_columns) // 2
    result = np.full((height, width, 3), 114.0)
    for y in range(inner_rows):
        for x in range(inner_columns):
            v = min(max((y + 0.5) * rows / inner_rows - 0.5, 0), rows - 1)
            u = min(max((x + 0.5) * columns / inner_columns - 0.5, 0), columns - 1)
            y0, x0 = int(v), int(u)
            y1, x1 = min(y0 + 1, rows - 1), min(x0 + 1, columns - 1)
            upper = image[y0, x0] * (1 - (u - x0)) + image[y0, x1] * (u - x0)
            lower = image[y1, x0] * (1 - (u - x0)) + image[y1, x1] * (u - x0)
            result[top + y, left + x] = upper * (1 - (v - y0)) + lower * (v - y0)
    return result


@pytest.mark.parametrize("size", RECTANGLES)
@pytest.mark.parametrize("shape", [(37, 50), (50, 37), (20, 120)])
def test_letterbox_is_the_formula(size: tuple[int, int], shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    boxed, info = letterbox(image, size)
    assert boxed.shape == (*size, 3)
    assert (info.height, info.width) == shape
    assert np.abs(boxed - letterbox_by_hand(image, *size)).max() <= 1.0


@pytest.mark.parametrize(
    ("shape", "size"), [((48, 64), (96, 192)), ((128, 64), (64, 96)), ((60, 90), (64, 96))]
)
def test_boxes_map_back_exactly(shape: tuple[int, int], size: tuple[int, int]) -> None:
    """Ratios 2, 0.5 and 16/15; whole pixels and powers of two leave nothing to round."""
    _, info = letterbox(np.zeros((*shape, 3), np.uint8), size)
    random = np.random.default_rng(0)
    corners = [random.integers(0, side // 2, 50) for side in (shape[1], shape[0])]
    boxes = np.stack([*corners, corners[0] + 7, corners[1] + 9], axis=1).astype(np.float32)
    boxes = np.minimum(boxes, np.array([shape[1], shape[0]] * 2, np.float32))
    back = unletterbox(letterbox_boxes(boxes, info).astype(np.float64), info)
    exact = info.ratio in (2.0, 0.5)
    np.testing.assert_allclose(back, boxes, rtol=0, atol=0 if exact else 1e-5)


@pytest.mark.parametrize("size", RECTANGLES)
def test_a_detector_that_knows_the_targets_has_an_ap_of_one(size: tuple[int, int]) -> None:
    """Loader, letterbox, targets and the way back to the images' own pixels agree."""
    batches = list(build_loader(Bricks(), size, 4))
    assert all(tuple(batch.images.shape[1:]) == (3, *size) for batch in batches)
    answers = iter(batches)

    def predict(images: torch.Tensor) -> list[torch.Tensor]:
        targets = next(answers).targets
        rows = torch.cat([targets[:, 2:], torch.ones(len(targets), 1), targets[:, 1:2]], dim=1)
        return [rows[targets[:, 0] == index] for index in range(len(images))]

    assert evaluate(predict, batches, Bricks()).ap == pytest.approx(1.0)


@pytest.mark.parametrize("size", RECTANGLES)
@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_augmented_boxes_stay_on_their_objects(size: tuple[int, int], mosaic: float) -> None:
    """The oracle is the image: the pixels in a box are bright, and hardly a bright pixel lies outside of all."""
    options = AugmentOptions(mosaic, 0, 0.1, 0.2, 0, flip_lr=0.5, hsv_h=0, hsv_s=0, hsv_v=0)
    dataset, frame, seen = Bricks(), ImageSize(*size), 0

    def read(index: int):
        return fit(dataset[index], frame)

    for index in range(18):
        random = np.random.default_rng(index)
        image, boxes, *_ = augment(index % 9, read, range(9), frame, options, random)
        assert image.shape == (*size, 3)
        assert (boxes >= 0).all()
        assert (boxes <= [size[1], size[0], size[1], size[0]]).all()
        bright = (image > 127).all(axis=2)
        covered = np.zeros_like(bright)
        for x1, y1, x2, y2 in boxes.round().astype(int):
            assert bright[y1:y2, x1:x2].mean() > 0.85
            covered[max(y1 - 1, 0) : y2 + 1, max(x1 - 1, 0) : x2 + 1] = True
            seen += 1
        assert (bright & ~covered).sum() < 100
    assert seen >= 16


def test_a_mosaic_reaches_every_part_of_a_rectangle() -> None:
    """Centres from a quarter to three quarters of both axes: all four images are seen, on the long side too."""
    options = AugmentOptions(mosaic=1, translate=0, scale=0, flip_lr=0, hsv_h=0, hsv_s=0, hsv_v=0)
    frame = ImageSize(32, 160)
    filled = np.zeros(frame, bool)
    for index in range(30):
        image, *_ = augment(
            index % 9,
            lambda i: fit(Bricks()[i], frame),
            range(9),
            frame,
            options,
            np.random.default_rng(index),
        )
        filled |= (image != 114).any(axis=2)
    assert filled.mean() > 0.9


@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_masks_have_the_shape_of_the_input(size: tuple[int, int]) -> None:
    """Of objects in the loader, and of one that fills the corner at the far end."""
    (height, width), frame = size, ImageSize(*size)
    for batch in build_loader(Bricks(outlines=True), size, 3, masks=True):
        assert batch.masks is not None
        boxes = batch.targets[:, 2:].numpy()
        compare_masks(batch.masks.numpy(), boxes, size)
    box = np.array([[width - 32, height - 32, width, height]], np.float32)
    outline = box[0, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(4, 2).astype(np.float64)
    compare_masks(draw_masks([[outline]], box, frame), box, size)


def compare_masks(masks: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> None:
    """Masks of rectangles against the covered share of each cell, from a picture of the whole input."""
    assert masks.shape == (len(boxes), size[0] // 4, size[1] // 4)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().astype(int).tolist(), strict=True):
        wanted = np.zeros(size, np.float32)
        wanted[y1:y2, x1:x2] = 1
        wanted = cv2.resize(wanted, (size[1] // 4, size[0] // 4), interpolation=cv2.INTER_AREA)
        assert np.abs(mask / 255 - wanted).mean() < 0.03
