"""Masks: codes against pycocotools, drawn and restored masks against formulas and against the pixels themselves."""

import itertools
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as reference

from core.errors import DataError
from core.image_size import ImageSize
from data import AugmentOptions, build_loader, generate_synthetic, ground_truth, letterbox, open_dataset
from data.masks import (
    Rle,
    coco_segmentation,
    decode_mask,
    draw_masks,
    encode_mask,
    outlines_of,
    parse_segmentation,
    polygon_area,
    restore_masks,
)


def disc(height: int, width: int, x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width] + 0.5
    return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


def test_codes_are_those_of_pycocotools():
    random = np.random.default_rng(0)
    masks = [
        random.random(random.integers(1, 40, 2)) < share
        for share in (0, 0.02, 0.5, 0.98, 1)
        for _ in range(20)
    ]
    masks.append(disc(3000, 2000, 900.0, 1500.0, 800.0))  # runs of three groups, differences of both signs
    for mask in masks:
        code = encode_mask(mask)
        assert code.counts == reference.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
        assert code.size == mask.shape
        assert (decode_mask(code) == mask).all()


def test_some_columns_stand_for_the_whole_mask():
    mask = disc(30, 50, 20.0, 14.0, 9.0)
    assert encode_mask(mask[:, 8:31], 8, 50) == encode_mask(mask)
    assert encode_mask(np.zeros((30, 0), bool), 50, 50) == encode_mask(np.zeros((30, 50), bool))


def test_every_coco_form_is_read_and_written_back():
    mask = disc(20, 30, 14.0, 9.0, 6.0)
    code = encode_mask(mask)
    runs = [len(list(group)) for _, group in itertools.groupby(mask.T.ravel())]  # the first pixel is 0
    assert parse_segmentation({"size": [20, 30], "counts": runs}, (20, 30)) == code
    assert parse_segmentation({"size": [20, 30], "counts": code.counts.decode()}, (20, 30)) == code
    assert coco_segmentation(code) == {"size": [20, 30], "counts": code.counts.decode()}
    polygons = [[1, 2, 5, 2, 5, 8.5], [10, 10, 12, 10, 12, 12, 10, 12]]
    assert coco_segmentation(parse_segmentation(polygons, (20, 30))) == polygons
    assert polygon_area(parse_segmentation(polygons, (20, 30))) == pytest.approx(4 * 6.5 / 2 + 4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "expected polygons"),
        ([], "expected polygons"),
        ([[1, 2, 3, 4]], "fewer than three points"),
        ([[1, 2, 3]], "not lists"),
        ([[1, 2, 3, 4, float("nan"), 5]], "not finite"),
        ({"size": [4, 5], "counts": [20]}, r"size \[4, 5\]"),
        ({"size": [4, 4], "counts": [3, 2]}, "runs of 5 pixels"),
        ({"size": [4, 4], "counts": "\x7f"}, "not a run-length code"),
        ({"size": [4, 4], "counts": 5}, "counts .5"),
    ],
)
def test_what_is_no_mask_is_refused(value: object, message: str):
    with pytest.raises(ValueError, match=message):
        parse_segmentation(value, (4, 4))


def test_drawn_cells_hold_the_covered_share():
    """A rectangle from 4 to 18 and 8 to 20 covers cell (1..3, 2..4) wholly and half of column 4."""
    box = np.array([[4, 8, 18, 20]], np.float32)
    outline = [np.array([[4, 8], [18, 8], [18, 20], [4, 20.0]])]
    mask = draw_masks([outline], box, ImageSize.of(32))[0].astype(int)
    expected = np.zeros((8, 8))
    expected[2:5, 1:4] = 255
    expected[2:5, 4] = 127.5
    assert (
        np.abs(mask - expected).max() <= 64
    )  # OpenCV fills the pixels of the border, too: one of four columns
    assert mask[:, 5:].max() == mask[:2].max() == 0


def test_holes_stay_open():
    ring = disc(64, 64, 32, 32, 25) & ~disc(64, 64, 32, 32, 12)
    code = encode_mask(ring)
    drawn = draw_masks([outlines_of(code)], np.array([[7, 7, 57, 57]], np.float32), ImageSize.of(64))[0]
    expected = cv2.resize(ring.astype(np.float32), (16, 16), interpolation=cv2.INTER_AREA)
    assert np.abs(drawn / 255 - expected).mean() < 0.03
    assert drawn[8, 8] == 0


@pytest.mark.parametrize("size", [(60, 100), (100, 60), (33, 31)])
def test_restored_masks_lie_where_the_object_was(size: tuple[int, int]):
    """The soft mask of a disc, given on the coarse grid of the letterboxed input, comes back as the disc."""
    x, y, radius = 0.55 * size[1], 0.45 * size[0], 0.3 * min(size)
    _, info = letterbox(np.zeros((*size, 3), np.uint8), (128, 128))
    rows, columns = (np.mgrid[:32, :32] + 0.5) * 4
    distance = np.hypot(columns - (x * info.ratio + info.pad_x), rows - (y * info.ratio + info.pad_y))
    soft = 1 / (1 + np.exp((distance - radius * info.ratio) / 8))
    box = np.array([x - radius - 1, y - radius - 1, x + radius + 1, y + radius + 1])
    boxes = np.stack([box, [x, y, x + radius, y + radius], [5.0, 5.0, 5.2, 9.0]])
    codes = restore_masks(np.stack([soft] * 3).astype(np.float32), boxes, info, (128, 128))
    whole, quarter, empty = (decode_mask(code) for code in codes)
    expected = disc(*size, x, y, radius)
    assert (whole & expected).sum() / (whole | expected).sum() > 0.95
    inside = np.zeros(size, bool)
    inside[int(np.ceil(y - 0.5)) :, int(np.ceil(x - 0.5)) :] = (
        True  # pixel centres right of and below the corner
    )
    assert (quarter == (whole & inside)).mean() > 0.999
    assert not empty.any()


def write_coco(root: Path, annotations: list[dict]) -> Path:
    (root / "annotations").mkdir(parents=True)
    (root / "images/val").mkdir(parents=True)
    cv2.imwrite(str(root / "images/val/a.png"), np.zeros((40, 60, 3), np.uint8))
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}],
        "categories": [{"id": 3, "name": "thing"}],
        "annotations": [
            {
                "id": n,
                "image_id": 1,
                "category_id": 3,
                "bbox": [10, 10, 20, 10],
                "area": 150.0,
                "iscrowd": 0,
                **entry,
            }
            for n, entry in enumerate(annotations, start=1)
        ],
    }
    (root / "annotations/instances_val.json").write_text(json.dumps(content))
    return root


def test_coco_masks_travel_from_file_to_ground_truth(tmp_path: Path):
    polygon = [[10.5, 10, 30, 10, 30, 20, 10, 20]]
    code = {"size": [40, 60], "counts": encode_mask(disc(40, 60, 20, 15, 6)).counts.decode()}
    crowd = {"segmentation": {"size": [40, 60], "counts": [2400]}, "iscrowd": 1}
    root = write_coco(tmp_path / "set", [{"segmentation": polygon}, {"segmentation": code}, crowd])
    dataset = open_dataset(root, "val", segments=True)
    found = [entry["segmentation"] for entry in ground_truth(dataset)["annotations"]]
    assert found[:2] == [polygon, code]
    assert decode_mask(Rle((40, 60), found[2]["counts"].encode())).sum() == 0
    batch = next(iter(build_loader(dataset, 64, 1, masks=True)))
    assert batch.masks is not None
    assert batch.masks.shape == (2, 16, 16)  # without the crowd
    assert all(
        "segmentation" not in entry for entry in ground_truth(open_dataset(root, "val"))["annotations"]
    )


def test_an_object_without_a_mask_is_named(tmp_path: Path):
    root = write_coco(tmp_path / "coco", [{}])
    with pytest.raises(DataError, match=r"a\.png.*\[10, 10, 20, 10\].*None"):
        open_dataset(root, "val", segments=True)
    with pytest.raises(DataError, match="segments=True"):
        next(iter(build_loader(open_dataset(root, "val"), 64, 1, masks=True)))
    tree = tmp_path / "yolo"
    for folder in ("images/val", "labels/val"):
        (tree / folder).mkdir(parents=True)
    (tree / "data.yaml").write_text("val: images/val\nnames: [thing]\n")
    cv2.imwrite(str(tree / "images/val/a.png"), np.zeros((40, 60, 3), np.uint8))
    (tree / "labels/val/a.txt").write_text("0 0.1 0.1 0.5 0.1 0.5 0.6\n0 0.5 0.5 0.2 0.2\n")
    with pytest.raises(DataError, match="line 2: a box without an outline"):
        open_dataset(tree, "val", segments=True)
    (tree / "labels/val/a.txt").write_text("0 0.1 0.1 0.5 0.1 0.5 0.6\n")
    (sample,) = list(open_dataset(tree, "val", segments=True))
    assert sample.segments is not None
    assert np.allclose(sample.segments[0], [[6, 4], [30, 4], [30, 24]])
    assert sample.areas is not None
    assert sample.areas.tolist() == pytest.approx([24 * 20 / 2])


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_synthetic(tmp_path_factory.mktemp("shapes") / "set", 6, 6, 160, 0)


def test_synthetic_outlines_are_what_was_painted(monkeypatch: pytest.MonkeyPatch):
    """Each shape painted alone in white covers the pixels that pycocotools gives its outline; rings have their hole."""
    from data.formats import synthetic_scene

    windows: list[tuple] = []
    monkeypatch.setattr(
        synthetic_scene, "_paint", lambda window, shape, solid, random: windows.append((shape, solid))
    )
    for number in range(5):
        synthetic_scene.draw_scene(160, (0, 0, number))
    assert {shape.label for shape, _ in windows} == {0, 1, 2, 3}
    for shape, solid in windows:
        painted = np.zeros((160, 160), bool)
        painted[shape.window] = solid
        polygon = [shape.outline.reshape(-1).tolist()]
        expected = reference.decode(reference.merge(reference.frPyObjects(polygon, 160, 160))).astype(bool)
        difference = (painted != expected).sum()
        border = painted.sum() - cv2.erode(painted.astype(np.uint8), np.ones((3, 3))).sum()
        assert difference <= border  # less than one pixel along the edges


@pytest.mark.parametrize("augmented", [False, True])
def test_masks_move_with_their_image(shapes: Path, augmented: bool):
    """White squares with a hole on black: wherever letterbox, mosaic, warp and flip put them, their masks are there."""

    class Squares:
        names = ("square",)
        ids = tuple(range(4))

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int):
            from data import Sample

            image = np.zeros((80, 100, 3), np.uint8)
            x, y = 10 + 12 * index, 8 + 7 * index
            image[y : y + 40, x : x + 40] = 255
            image[y + 12 : y + 28, x + 12 : x + 28] = 0
            box = np.array([[x, y, x + 40, y + 40]], np.float32)
            mask = encode_mask(image[..., 0] > 0)
            return Sample(image, box, np.zeros(1, np.int64), index, (80, 100), segments=[mask])

    options = AugmentOptions(hsv_h=0, hsv_s=0, hsv_v=0, degrees=20, scale=0.3) if augmented else None
    for batch in build_loader(Squares(), 128, 2, masks=True, augment=options, seed=3):
        assert batch.masks is not None
        for number in range(len(batch)):
            image = batch.images[number, 0].numpy().astype(np.float32) / 255
            image[image < 0.6] = 0  # the grey of the padding
            seen = cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA)
            own = batch.masks[batch.targets[:, 0] == number].numpy() / 255
            drawn = np.minimum(own.sum(axis=0), 1)
            assert drawn.sum() > 20
            assert np.abs(drawn - seen).sum() / drawn.sum() < 0.25
