import numpy as np
import pytest
import torch

from data.letterbox import LetterboxInfo, letterbox, letterbox_boxes, to_input, unletterbox


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        # height, width -> ratio, resized height and width, left, top: worked by hand
        ((480, 640), (320, 320), (0.5, 240, 320, 0, 40)),
        ((100, 50), (320, 320), (3.2, 320, 160, 80, 0)),
        ((427, 640), (320, 320), (0.5, 214, 320, 0, 53)),
        ((333, 500), (640, 640), (1.28, 426, 640, 0, 107)),
        ((10, 11), (32, 32), (32 / 11, 29, 32, 0, 1)),  # 3 spare rows: 1 above, 2 below
        ((480, 640), (256, 320), (0.5, 240, 320, 0, 8)),
    ],
)
def test_placement_follows_the_written_rule(shape, size, expected):
    image = np.full((*shape, 3), 200, np.uint8)
    boxed, info = letterbox(image, size)
    ratio, height, width, left, top = expected
    assert boxed.shape == (*size, 3)
    assert info == LetterboxInfo(pytest.approx(ratio), left, top, *shape)
    inside = np.zeros(size, bool)
    inside[top : top + height, left : left + width] = True
    assert (boxed[inside] == 200).all()
    assert (boxed[~inside] == 114).all()


def test_halving_is_the_mean_of_two_by_two_pixels():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    boxed, _ = letterbox(image, (4, 4))
    mean = image.reshape(4, 2, 4, 2, 3).mean(
        axis=(1, 3)
    )  # what bilinear interpolation is at exactly one half
    assert np.abs(boxed - mean).max() <= 0.51


def test_bilinear_enlargement_matches_torch():
    image = np.random.default_rng(1).integers(0, 256, (30, 40, 3), np.uint8)
    boxed, _ = letterbox(image, (75, 100))
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(planes, (75, 100), mode="bilinear", align_corners=False)
    assert np.abs(boxed - expected[0].permute(1, 2, 0).numpy()).max() <= 1.0


@pytest.mark.parametrize("shape", [(480, 640), (333, 500), (50, 20)])
def test_boxes_go_there_and_back(shape):
    random = np.random.default_rng(0)
    corners = np.sort(random.uniform(0, 1, (20, 2, 2)), axis=1).reshape(20, 4) * [*shape[::-1], *shape[::-1]]
    _, info = letterbox(np.zeros((*shape, 3), np.uint8), (320, 320))
    boxes = corners.astype(np.float32)
    np.testing.assert_allclose(unletterbox(letterbox_boxes(boxes, info), info), boxes, atol=1e-3)


def test_unletterbox_clips_and_keeps_other_columns():
    info = LetterboxInfo(0.5, 0, 40, 480, 640)
    detections = torch.tensor([[-10.0, 0.0, 400.0, 330.0, 0.9, 2.0]])
    assert unletterbox(detections, info).tolist() == [[0.0, 0.0, 640.0, 480.0, pytest.approx(0.9), 2.0]]
    assert detections[0, 0] == -10  # the argument is left alone


def test_to_input_spans_zero_to_one():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    result = to_input(images, "cpu")
    assert result.dtype == torch.float32
    assert result.flatten().tolist() == [0.0, pytest.approx(0.2), 1.0]
