"""Loader processes: too little shared memory, and workers that are killed, stopped, slow or raise."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import DataError
from data import Sample, build_loader, delivery
from data.delivery import Transport, choose_transport

MB = 10**6


class Numbered:
    """Images whose grey value is their number; `act` is called with the number before one is read."""

    names = ("thing",)

    def __init__(self, act=lambda index: None, count=16):
        self.act = act
        self.ids = list(range(count))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        self.act(index)
        image = np.full((64, 64, 3), index, np.uint8)
        boxes = np.array([[1, 2, 20, 30]], np.float32)
        return Sample(image, boxes, np.zeros(1, np.int64), index, (64, 64), None)


@pytest.fixture
def impatient(monkeypatch):
    """A worker that gives no sign for two seconds counts as stuck."""
    monkeypatch.setattr(delivery, "PATIENCE", 2.0)
    monkeypatch.setattr("data.loader.TICK", 0.25)
    monkeypatch.setattr(delivery, "TICK", 0.25)


def is_alive(pid):
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def contents(loader):
    return [(batch.images.clone(), batch.targets.clone(), batch.image_ids) for batch in loader]


def assert_same(one, other):
    assert len(one) == len(other)
    for (images, targets, ids), (images2, targets2, ids2) in zip(one, other, strict=True):
        assert torch.equal(images, images2)
        assert torch.equal(targets, targets2)
        assert ids == ids2


# 16 images of 640 px are 19.66 MB; two workers have four batches in flight, one is in use and one on the way: 118 MB
@pytest.mark.parametrize(
    ("free", "workers", "expected"),
    [
        (64 * 2**20, 2, Transport(2, shares=False)),  # Docker's default
        (117 * MB, 2, Transport(2, shares=False)),
        (118 * MB, 2, Transport(2)),
        (64 * 2**20, 1, Transport(1, shares=False)),
        (0, 2, Transport(0)),
        (0, 0, Transport(0)),
        (None, 8, Transport(8)),  # no /dev/shm on this system
    ],
)
def test_transport_fits_the_free_shared_memory(monkeypatch, caplog, free, workers, expected):
    monkeypatch.setattr(delivery, "free_shared_memory", lambda: free)
    caplog.set_level("INFO")
    assert choose_transport(workers, 16 * 3 * 640 * 640) == expected
    said = [record.message for record in caplog.records]
    assert len(said) == (expected != Transport(workers))
    assert all("/dev/shm has" in text and "--shm-size" in text for text in said)


def test_free_shared_memory_is_that_of_the_system(monkeypatch, tmp_path):
    found = os.statvfs("/dev/shm")
    assert abs(delivery.free_shared_memory() - found.f_bavail * found.f_frsize) < 64 * MB
    monkeypatch.setattr(delivery, "SHARED_MEMORY", tmp_path / "none")
    assert delivery.free_shared_memory() is None


@pytest.mark.parametrize("free", [100_000 + 2**20, 0, None])
def test_batches_are_the_same_whichever_way_they_come(monkeypatch, free):
    expected = contents(build_loader(Numbered(), 64, 4))
    monkeypatch.setattr(delivery, "free_shared_memory", lambda: free)
    images = 32 if free and free > 2**20 else 4
    loader = build_loader(Numbered(), 64, images, 2)
    assert loader.num_workers == (0 if free == 0 else 2)
    batches = contents(loader)
    if images == 32:  # one batch of all: larger than the room
        assert [ids for _, _, ids in batches] == [list(range(16))]
        expected = [(torch.cat([b[0] for b in expected]), batches[0][1], batches[0][2])]
    assert_same(batches, expected)


def test_a_batch_that_finds_no_room_goes_through_the_pipe(monkeypatch):
    """Other processes may have filled the shared memory after it was looked at."""

    def full(_tensor):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    expected = contents(build_loader(Numbered(), 64, 4))
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # in the workers as well: they are forked
    loader = build_loader(Numbered(), 64, 4, 2)
    for _epoch in range(2):
        assert_same(contents(loader), expected)


def test_a_killed_worker_ends_the_iteration(tmp_path):
    def die(index):
        if index == 9:
            os.kill(os.getpid(), signal.SIGKILL)

    started = time.monotonic()
    with pytest.raises(DataError, match=r"data worker with process id \d+ .*data.workers=0"):
        contents(build_loader(Numbered(die), 64, 4, 2))
    assert time.monotonic() - started < 20


def test_a_stopped_worker_ends_the_iteration_and_is_gone(impatient):
    def stop(index):
        if index == 9:
            os.kill(os.getpid(), signal.SIGSTOP)

    loader = build_loader(Numbered(stop), 64, 4, 2)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"stopped delivering \(process .*is stopped.*data.workers=0"):
        contents(loader)
    assert time.monotonic() - started < 20
    pids = loader.dataset.pulse.pids
    assert len(pids) == 2
    assert not any(is_alive(pid) for pid in pids)  # the end of this process would wait for them


def test_a_worker_that_stops_after_it_has_made_a_batch(impatient):
    """The batch's memory has to be asked for at the worker, which does not answer."""

    def stop(index):
        if index == 4:
            os.kill(os.getpid(), signal.SIGSTOP)

    batches = iter(build_loader(Numbered(stop), 64, 4, 1))
    time.sleep(1.5)
    started = time.monotonic()
    with pytest.raises(DataError, match="is stopped"):
        next(batches)
    assert time.monotonic() - started < 20


def test_a_worker_that_waits_for_ever_ends_the_iteration(impatient):
    loader = build_loader(Numbered(lambda index: time.sleep(1000 if index == 5 else 0)), 64, 4, 1)
    with pytest.raises(DataError, match="is waiting"):
        contents(loader)


def test_slow_workers_are_waited_for(impatient):
    """A batch takes longer than the patience, but images are read all the time."""
    loader = build_loader(Numbered(lambda _: time.sleep(0.4), count=8), 64, 8, 1)
    assert [ids for _, _, ids in contents(loader)] == [list(range(8))]


def test_time_in_which_this_process_computes_does_not_count(impatient):
    ids = []
    for batch in build_loader(Numbered(count=8), 64, 4, 1):
        time.sleep(2.5)
        ids += batch.image_ids
    assert ids == list(range(8))


def test_an_error_of_ours_arrives_as_it_was_raised():
    def refuse(index):
        if index == 9:
            raise DataError("image 9 cannot be decoded: restore it")

    for workers in (0, 2):
        with pytest.raises(DataError) as caught:
            contents(build_loader(Numbered(refuse), 64, 4, workers))
        assert str(caught.value) == "image 9 cannot be decoded: restore it"


def test_any_other_error_keeps_its_traceback():
    def fail(index):
        if index == 9:
            raise KeyError("a defect of the user's dataset")

    with pytest.raises(KeyError, match="Traceback"):
        contents(build_loader(Numbered(fail), 64, 4, 2))
