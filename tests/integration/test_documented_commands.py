"""The commands of README and docs/ run, on a small model and dataset that have the names which the pages use.

They run in `make test-all`; jobs have fewer images here. `tests/test_readme.py` composes or looks up every command,
and is the only test of those that need a GPU, compile for one, install something or take hours.
"""

from __future__ import annotations

import runpy
import shlex
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from main_job import REPOSITORY, run_entry
from test_readme import COMMANDS

from data import generate_synthetic
from data.formats.synthetic_scene import CLASSES
from models import build_detector, save_detector

SIZE = 96
REDUCED = (
    f"data.image_size={SIZE}",
    "data.workers=0",
    "data.limit_train=8",
    "data.limit_val=4",
    "qat.epochs=1",
    "qat.batch_size=4",
    "quant.calibration_images=4",
    "sensitivity.images=2",
    "deploy.benchmark_seconds=0.1",
    "threads=1",
)
MODULES = ("data", "deploy.check", "models.checkpoints", "pipeline.evaluate", "pipeline.predict")
ELSEWHERE = (
    "deploy=trt",
    "tensorrt_rtx",
    "autotune",
    "+experiment=yolov9",
    "+experiment=retinanet",
    "-m ",
    "resume=",
    "--cfg",
)


def quick() -> list[str]:
    """Commands on files and runs: seconds each."""
    modules = [c for c in COMMANDS if c.startswith(tuple(f"python -m {name} " for name in MODULES))]
    exports = [c for c in COMMANDS if c.startswith("python export.py ")]
    octet = [
        c for c in COMMANDS if c.startswith("octet ") and not c.startswith(("octet run", "octet benchmark"))
    ]
    return [c for c in [*exports, *modules, *octet] if "--compile" not in c]


def jobs() -> list[str]:
    """Whole jobs on the reader's own data, which run here with fewer images."""
    return [
        c
        for c in COMMANDS
        if c.startswith("python train_qat.py +experiment=detector weights=")
        and not any(word in c for word in ELSEWHERE)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working directory with every file that the commands name."""
    root = tmp_path_factory.mktemp("reader")
    generate_synthetic(root / "datasets/mine", train=8, val=4, size=SIZE, seed=0)
    save_detector(build_detector("yolov9t", len(CLASSES), "silu", CLASSES), root / "w.safetensors")
    for name in ("weights.pt", "best.pt", "w.pt", "model.pt"):
        shutil.copy(root / "w.safetensors", root / name)
    settings = ("+experiment=detector", "weights=weights.pt", "data.root=datasets/mine")
    stages = "stages=[float,calibrate,export,engine,report]"
    both = "deploy.runtimes=[openvino,onnxruntime]"
    outcome = run_entry("train_qat.py", *settings, *REDUCED, stages, both, cwd=root)
    assert outcome.code == 0, outcome.err
    run = (root / "runs/detector/latest").resolve()
    for experiment in ("bccd", "demo"):
        (root / "runs" / experiment).mkdir()
        (root / "runs" / experiment / "latest").symlink_to(run)
    for name in ("model.onnx", "mine.onnx", "other.onnx", "int8.onnx"):
        shutil.copy(run / "model.onnx", root / name)
    for link in ("datasets/bccd", "coco"):
        (root / link).symlink_to(root / "datasets/mine")
    (picture,) = sorted((root / "datasets/mine").rglob("*.png"))[:1]
    image = cv2.imread(str(picture))
    (root / "folder").mkdir()
    cv2.imwrite(str(root / "photo.jpg"), image)
    cv2.imwrite(str(root / "folder/photo.jpg"), image)
    video = cv2.VideoWriter(str(root / "video.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 5, (SIZE, SIZE))
    for _ in range(2):
        video.write(np.ascontiguousarray(image[:SIZE, :SIZE]))
    video.release()
    return root


def run(words: list[str]) -> None:
    """Run a command in this process, as `python` would."""
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(REPOSITORY / words[0]), run_name="__main__")
        sys.exit(0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("command", quick())
def test_command_runs(folder: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = command.replace("octet ", "python -m pipeline.commands ", 1)
    words = [str(SIZE) if word == "640" else word for word in shlex.split(command)[1:]]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["command", *words[2:]] if words[0] == "-m" else words)
    with pytest.raises(SystemExit) as ended:
        run(words)
    assert ended.value.code in (0, None)


@pytest.mark.exhaustive
@pytest.mark.parametrize("command", jobs())
def test_job_runs(folder: Path, command: str) -> None:
    words = shlex.split(command)[2:]
    outcome = run_entry(
        "train_qat.py", *words, *REDUCED, f"run_dir={folder / 'job' / str(abs(hash(command)))}", cwd=folder
    )
    assert outcome.code == 0 or "accuracy_budget" in command or "max_ap_drop" in command, outcome.err
    assert "Traceback" not in outcome.err


def test_commands_of_every_kind_are_found() -> None:
    assert len(quick()) >= 20
    assert len(jobs()) >= 10
