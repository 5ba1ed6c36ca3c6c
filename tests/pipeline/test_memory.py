"""Memory that is used up: one message with what to change, whichever library meets it first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from core.failures import known_failure

REPOSITORY = Path(__file__).resolve().parents[2]

# what libraries raised under `ulimit -v` (torch 2.13, OpenCV 5) and on a GPU
ERRORS = [
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    ),
    RuntimeError("could not create a primitive"),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    OSError(12, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error)[:30])
def test_no_memory_is_a_message_with_what_to_change(error: Exception) -> None:
    known = known_failure(error)
    assert known is not None
    assert known.exit_code == 3
    assert f"memory of the {'GPU' if 'CUDA' in str(error) else 'machine'}" in str(known)
    assert "use smaller batches (train.batch_size" in str(known)
    assert "fewer images of a batch at a time (train.micro_batch" in str(known)


def test_other_errors_stay_what_they_are() -> None:
    assert known_failure(RuntimeError("shape mismatch")) is None
    assert known_failure(ValueError("out of memory in a user's words")) is None


LIMITED = """
import resource, sys
import torch
from torch import nn
from core.command import reports_errors, run_command
from training import TrainingOptions, TrainingState, train_epochs

@reports_errors
def main(arguments=None):
    network = nn.Sequential(*(layer for _ in range(6) for layer in (nn.LazyConv2d(64, 3, padding=1), nn.ReLU())))
    images = torch.rand(16, 3, 128, 128)
    network(images[:1, :, :8, :8])
    state = TrainingState(network, TrainingOptions(epochs=1))
    loss = lambda raw, targets, size: {"error": raw.square().mean()}
    list(train_epochs(state, lambda epoch, samples: [(images[:1, :, :8, :8], None)], 1, loss))
    state.epoch = state.step = 0
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + int(sys.argv[1]) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for _ in train_epochs(state, lambda epoch, samples: [(images, None)], 1, loss):
        pass
    return 0

run_command(lambda: main([]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc on this system")
def train_within(megabytes: int) -> subprocess.CompletedProcess[str]:
    """A step of 16 images, with so much memory more than the process has at its start."""
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(megabytes)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc on this system")
def test_a_training_under_a_memory_limit_takes_its_steps_in_parts() -> None:
    """All 16 images need more than a gigabyte."""
    done = train_within(150)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stderr.splitlines()
    assert first.startswith("the memory does not suffice for step 0 (")
    assert first.endswith(
        "are taken with micro_batch=8 (images in memory at a time; their gradients are added up)"
    )
    assert "micro_batch=1 " in last or "micro_batch=2 " in last


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc on this system")
def test_a_memory_limit_below_one_image_ends_with_the_message() -> None:
    done = train_within(25)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: The memory does not suffice for step 0 with 1 image(s) at a time (")
    assert "resume with micro_batch=1 (train.micro_batch, qat.micro_batch)" in last
    assert "use smaller images (data.image_size)" in last
