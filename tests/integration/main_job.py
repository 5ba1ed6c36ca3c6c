"""Running the entries as a user does, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from data.formats.synthetic_scene import CLASSES
from models import build_detector, save_detector

REPOSITORY = Path(__file__).resolve().parents[2]

TINY = (
    "+experiment=demo",
    "data.image_size=96",
    "data.synthetic.size=96",
    "data.synthetic.train=24",
    "data.synthetic.val=8",
    "data.workers=0",
    "train.epochs=1",
    "train.batch_size=8",
    "qat.epochs=2",
    "qat.batch_size=8",
    "quant.calibration_images=8",
    "sensitivity.images=4",
    "deploy.benchmark_seconds=0.2",
    "threads=1",
)


@dataclass(frozen=True)
class Outcome:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str


def run_entry(entry: str, *arguments: str, cwd: Path, timeout: float = 300.0) -> Outcome:
    """Run `train_qat.py` or `export.py` in `cwd`."""
    command = [sys.executable, str(REPOSITORY / entry), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def untrained_weights(folder: Path, activation: str = "silu") -> str:
    """Setting that gives a run of TINY a checkpoint of random weights, where none is trained in it."""
    torch.manual_seed(0)
    path = folder / "untrained.safetensors"
    save_detector(build_detector("yolov9t", len(CLASSES), activation, CLASSES), path)
    return f"weights={path}"
