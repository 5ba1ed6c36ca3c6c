import numpy as np
import pytest
import torch

from core.errors import DataError
from core.image_size import ImageSize
from data import AugmentOptions, Dataset, Sample, build_loader, open_dataset
from data.augment import Objects, augment, fit, jitter_color, warp_objects
from data.loader import choose_subset

STILL = AugmentOptions(mosaic=0, translate=0, scale=0, flip_lr=0, hsv_h=0, hsv_s=0, hsv_v=0)


class Squares:
    """A user's own dataset: no base class, one bright square per image whose place is known."""

    def __init__(self, count: int = 12, size: tuple[int, int] = (48, 64), crowd: bool = False) -> None:
        self.names = ("square",)
        self.ids = [100 + index for index in range(count)]
        self.size = size
        self.crowd = crowd

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        image = np.zeros((*self.size, 3), np.uint8)
        x, y = 4 + 3 * (index % 10), 6 + 2 * (index % 10)
        image[y : y + 16, x : x + 20] = 255
        boxes = np.array([[x, y, x + 20, y + 16]], np.float32)
        crowd = np.array([True]) if self.crowd else None
        return Sample(image, boxes, np.zeros(1, np.int64), self.ids[index], self.size, crowd)


def reader(dataset, size: int):
    return lambda index: fit(dataset[index], ImageSize.of(size))


def collect(loader):
    return [(batch.images.clone(), batch.targets.clone(), batch.image_ids) for batch in loader]


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) and x[2] == y[2]
        for x, y in zip(a, b, strict=True)
    )


def bright_box(image: np.ndarray, threshold: int = 100) -> list[int]:
    bright = image.min(axis=2) > threshold
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_any_object_of_the_right_shape_is_a_dataset():
    assert isinstance(Squares(), Dataset)
    loader = build_loader(Squares(), 64, 5)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert [len(batch) for batch in batches] == [5, 5, 2]
    first = batches[0]
    assert (first.images.dtype, tuple(first.images.shape)) == (torch.uint8, (5, 3, 64, 64))
    assert first.targets[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert first.targets[0].tolist() == [0, 0, 4, 6 + 8, 24, 22 + 8]  # 8 rows of padding on top
    assert first.image_ids == [100, 101, 102, 103, 104]
    assert (first.infos[0].pad_y, first.infos[0].height) == (8, 48)


def test_crowd_regions_are_no_targets():
    for options in (None, STILL):
        batch = next(iter(build_loader(Squares(crowd=True), 64, 4, augment=options)))
        assert tuple(batch.targets.shape) == (0, 6)


@pytest.mark.parametrize("options", [None, AugmentOptions(degrees=10, shear=5)])
def test_batches_do_not_depend_on_the_number_of_workers(options):
    reference = None
    for workers in (0, 1, 2):
        loader = build_loader(Squares(), 64, 4, workers, options, shuffle=True, seed=5)
        loader.set_epoch(2)
        batches = collect(loader)
        reference = reference or batches
        assert same(batches, reference)


def test_epochs_and_seeds_differ_and_repeat():
    loader = build_loader(Squares(), 64, 4, 2, AugmentOptions(), shuffle=True, seed=1)
    epochs = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        epochs.append(collect(loader))
    assert same(epochs[0], epochs[2])
    assert not same(epochs[0], epochs[1])
    assert sorted(i for batch in epochs[1] for i in batch[2]) == sorted(Squares().ids)
    assert not same(
        epochs[0], collect(build_loader(Squares(), 64, 4, 0, AugmentOptions(), shuffle=True, seed=2))
    )


@pytest.mark.parametrize(("options", "shuffle"), [(AugmentOptions(), False), (None, True)])
def test_order_and_augmentation_each_follow_the_epoch(options, shuffle):
    loader = build_loader(Squares(), 64, 4, 0, options, shuffle=shuffle, seed=1)
    first = collect(loader)
    loader.set_epoch(1)
    second = collect(loader)
    assert not same(first, second)
    assert (first[0][2] == second[0][2]) == (not shuffle)


def test_a_stopped_epoch_continues_with_the_same_batches():
    loader = build_loader(Squares(), 64, 4, 0, AugmentOptions(), shuffle=True, seed=1)
    loader.set_epoch(3)
    whole = collect(loader)
    loader.set_epoch(3, first_batch=1)
    assert len(loader) == 2
    assert same(collect(loader), whole[1:])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_take_whole_batches_in_turn(world_size):
    """11 images in batches of 4 are the same three batches for any number of processes; a fifth gets none."""
    ranks = [
        collect(build_loader(Squares(11), 64, 4, rank=rank, world_size=world_size, whole_batches=True))
        for rank in range(world_size)
    ]
    shares = [[batch[2] for batch in batches] for batches in ranks]
    assert [shares[number % world_size][number // world_size] for number in range(3)] == [
        [100, 101, 102, 103],
        [104, 105, 106, 107],
        [108, 109, 110],
    ]
    assert sum(map(len, shares)) == 3


@pytest.mark.parametrize(("count", "num_batches"), [(11, 2), (7, 2)])  # 11: the last batch is left out
def test_ranks_share_each_batch(count, num_batches):
    """The images of a step are those of one process, for any number of processes, also after a stop."""
    options = {"batch_size": 4, "shuffle": True, "seed": 3, "drop_last": count >= 8}
    alone = build_loader(Squares(count), 64, **options)
    ranks = [
        build_loader(Squares(count), 64, **options, rank=rank, world_size=3, split_batches=True)
        for rank in range(3)
    ]
    for epoch, samples, skipped in ((0, 0, 0), (1, 0, 0), (1, 4, 1)):
        for loader in (alone, *ranks):
            loader.resume_epoch(epoch, samples)
        wanted = [batch.image_ids for batch in alone]
        shares = [[batch.image_ids for batch in loader] for loader in ranks]
        assert len(wanted) == num_batches - skipped
        for number, images in enumerate(wanted):
            assert [share[number] for share in shares] == [images[rank::3] for rank in range(3)]


def test_a_batch_that_is_too_small_to_share_is_refused():
    with pytest.raises(
        DataError,
        match=r"A batch of 1 images cannot be shared by 2 processes.*another number of images than 9",
    ):
        build_loader(Squares(9), 64, 4, shuffle=True, rank=0, world_size=2, split_batches=True)


def test_ranks_share_the_images():
    def ids(shuffle: bool, count: int) -> list[list[int]]:
        loaders = [
            build_loader(Squares(count), 64, 2, shuffle=shuffle, rank=r, world_size=3) for r in range(3)
        ]
        return [[i for batch in loader for i in batch.image_ids] for loader in loaders]

    plain = ids(False, 10)
    assert sorted(i for part in plain for i in part) == Squares(10).ids
    shuffled = ids(True, 10)
    assert [len(part) for part in shuffled] == [4, 4, 4]
    assert {i for part in shuffled for i in part} == set(Squares(10).ids)


def test_limit_spreads_over_the_dataset():
    assert choose_subset(10, 4) == [0, 2, 5, 7]
    assert choose_subset(3, 9) == [0, 1, 2]
    assert [i for batch in build_loader(Squares(), 64, 4, limit=3) for i in batch.image_ids] == [
        100,
        104,
        108,
    ]


def test_mosaic_draws_only_from_the_limit():
    asked = []

    class Watched(Squares):
        def __getitem__(self, index: int) -> Sample:
            asked.append(index)
            return super().__getitem__(index)

    list(build_loader(Watched(), 64, 4, augment=AugmentOptions(), limit=3))
    assert set(asked) <= {0, 4, 8}
    assert len(asked) == 3  # each is decoded once and kept


def test_kept_images_change_nothing(monkeypatch):
    loader = build_loader(Squares(), 64, 4, 0, AugmentOptions())
    first, again = collect(loader), collect(loader)
    monkeypatch.setattr("data.loader.KEPT_BYTES", 0)
    assert same(first, again)
    assert same(first, collect(build_loader(Squares(), 64, 4, 0, AugmentOptions())))


def test_without_any_range_augmentation_only_centres():
    random = np.random.default_rng(0)
    image, boxes, labels, _ = augment(3, reader(Squares(), 64), range(12), ImageSize.of(64), STILL, random)
    assert boxes.tolist() == [[13, 12 + 8, 33, 28 + 8]]
    assert bright_box(image, 200) == [13, 20, 33, 36]
    assert labels.tolist() == [0]


@pytest.mark.parametrize(
    "options",
    [
        AugmentOptions(mosaic=0, scale=0.3, translate=0.1, hsv_h=0, hsv_s=0, hsv_v=0),
        AugmentOptions(mosaic=0, scale=0.2, translate=0.0, flip_lr=1.0, hsv_h=0, hsv_s=0, hsv_v=0),
        AugmentOptions(mosaic=0, degrees=20, shear=8, scale=0.1, hsv_h=0, hsv_s=0, hsv_v=0),
    ],
)
def test_boxes_stay_on_their_objects(options):
    """The oracle is the image: the square's pixels must fill the box that is returned."""
    dataset = Squares(size=(64, 64))
    for index in range(12):
        random = np.random.default_rng(index)
        image, boxes, *_ = augment(index, reader(dataset, 128), range(12), ImageSize.of(128), options, random)
        image[(image == 114).all(axis=2)] = 0
        np.testing.assert_allclose(boxes[0], bright_box(image, 128), atol=1.6)


def test_mosaic_boxes_stay_on_their_objects():
    dataset = Squares(size=(64, 64))
    options = AugmentOptions(mosaic=1, scale=0, translate=0, flip_lr=0.5, hsv_h=0, hsv_s=0, hsv_v=0)
    seen = 0
    for index in range(20):
        image, boxes, *_ = augment(
            index % 12,
            reader(dataset, 128),
            range(12),
            ImageSize.of(128),
            options,
            np.random.default_rng(index),
        )
        bright = (image > 127).all(axis=2)  # halfway up the soft edges
        covered = np.zeros_like(bright)
        for x1, y1, x2, y2 in boxes.round().astype(int):
            assert bright[y1:y2, x1:x2].mean() > 0.9
            covered[max(y1 - 1, 0) : y2 + 1, max(x1 - 1, 0) : x2 + 1] = True
            seen += 1
        # Only slivers of objects may be without a box.
        assert (bright & ~covered).sum() < 150
    assert seen > 20


def test_warp_drops_what_is_mostly_outside():
    boxes = np.array([[0, 0, 100, 10], [-95, 0, 5, 10], [10, 10, 11, 40], [200, 200, 220, 220]], np.float32)
    kept, labels, _ = warp_objects(Objects(boxes, np.arange(4)), np.eye(3), ImageSize.of(100))
    # The second has 5 % of its area inside, the third is 1 pixel wide, the fourth is outside.
    assert labels.tolist() == [0]
    assert kept.tolist() == [[0, 0, 100, 10]]


def test_color_jitter_keeps_grey_grey_and_changes_colours():
    grey = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(16, 16, 3)
    jittered = jitter_color(grey, (0.5, 0.9, 0.0), np.random.default_rng(0))
    np.testing.assert_array_equal(jittered, grey)
    brighter = jitter_color(grey, (0, 0, 0.4), np.random.default_rng(1))
    gain = 1 + np.random.default_rng(1).uniform(-1, 1, 3)[2] * 0.4
    np.testing.assert_allclose(brighter, (grey * gain).clip(0, 255), atol=1.01)


def test_real_images_load(shared_data):
    dataset = open_dataset(shared_data / "data" / "bccd", "val")
    batch = next(iter(build_loader(dataset, 320, 4, 1)))
    assert tuple(batch.images.shape) == (4, 3, 320, 320)
    assert (batch.images[:, :, :40] == 114).all()
    assert (batch.targets[:, 3] >= 40).all()
