"""The commands of README and docs/ run, on a small model and dataset that have the names which the pages use.

They run in `make test-all`; jobs are reduced to few images, stages and processes. `make` targets and `pip` are run by
continuous integration, and `ELSEWHERE` names the tests that run the others.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from main_job import REPOSITORY, TINY, run_entry
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
MODULES = (
    "configs.describe", "data", "deploy.benchmark", "deploy.check", "deploy.engine", "examples.placement",
    "models.checkpoints", "pipeline.evaluate", "pipeline.predict", "report",
)  # fmt: skip
SCRIPTS = ("python scripts/", "scripts/val_trt.sh")
ELSEWHERE = {  # words of a command -> the test that runs it
    "autotune": "tests/integration/test_autotune_job.py",
    "mine.py": "tests/integration/test_custom_network.py",
    "+experiment=retinanet": "tests/integration/test_custom_network.py",
    "examples.ssdlite": "tests/integration/test_custom_network.py",
    "yolov9t_seg": "tests/integration/test_segmentation.py",
    "run_dir=runs/mine resume=true": "tests/integration/test_main_job.py",
    "scripts/get_bccd.sh": "tests/data/test_get_bccd.py",
    "pip wheel": "tests/test_wheel.py",
    "python -c": "tests/test_readme.py",
}
NOT_RUN = ("make ", "pip install ", "source ")  # they install, or run all tests
SHORT = "stages=[float,calibrate]"
NEEDS_RTX = ("--compile", "tensorrt_rtx")
LIMIT = 1500.0  # seconds of a job on a busy machine
WITHOUT_GPU = 2  # exit code of device=cuda


def elsewhere(command: str) -> str | None:
    return next((test for words, test in ELSEWHERE.items() if words in command), None)


def is_job(command: str) -> bool:
    words = ("python train_qat.py ", "octet run ", "torchrun ")
    return command.startswith(words) and elsewhere(command) is None and "--cfg" not in command


def quick() -> list[str]:
    """Commands on files and runs: seconds each, minutes where TensorRT for RTX compiles."""
    starts = (*(f"python -m {name}" for name in MODULES), "python export.py ", "octet ", *SCRIPTS)
    shown = [command for command in COMMANDS if "--cfg" in command]
    found = [c for c in COMMANDS if c.startswith(starts) and not is_job(c) and elsewhere(c) is None]
    return [*shown, *found]


def jobs() -> list[str]:
    return [command for command in COMMANDS if is_job(command)]


def shorten(command: str) -> str:
    """A name of a test without characters that pytest replaces."""
    return re.sub(r"[^\w=.,+-]+", " ", command)


def arguments_of(command: str) -> list[str]:
    """The settings of a job, reduced: fewer images, two values of each sweep, two stages where it would take long."""
    words = shlex.split(command)
    start = words.index("run") if words[0] == "octet" else words.index("train_qat.py")
    settings = words[start + 1 :]
    is_sweep = "-m" in settings
    if is_sweep:
        settings = [re.sub(r"^([\w.]+=[^,\[]+,[^,]+),.*", r"\1", setting) for setting in settings]
        settings = [setting.replace("submitit_slurm", "submitit_local") for setting in settings]
    if "+experiment=demo" in settings:
        return [*settings, *TINY[1:], *(["stages=[train,float,report]"] if is_sweep else [])]
    is_long = is_sweep or "yolov9c" in command or words[0] == "torchrun"
    return [*settings, *REDUCED, *([SHORT] if is_long else [])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working directory with every file that the commands name."""
    root = tmp_path_factory.mktemp("reader")
    generate_synthetic(root / "datasets/mine", train=8, val=4, size=SIZE, seed=0)
    for names, architecture in (
        (("weights.pt", "best.pt", "w.pt", "W.pt", "model.pt"), "yolov9t"),
        (("yolov9-c.pt",), "yolov9c"),
        (("yolov9-c-seg.pt",), "yolov9c-seg"),
    ):
        save_detector(build_detector(architecture, len(CLASSES), "silu", CLASSES), root / "w.safetensors")
        for name in names:
            shutil.copy(root / "w.safetensors", root / name)
    settings = ("+experiment=detector", "weights=weights.pt", "data.root=datasets/mine")
    stages = "stages=[float,calibrate,export,engine,report]"
    both = "deploy.runtimes=[openvino,onnxruntime]"
    outcome = run_entry("train_qat.py", *settings, *REDUCED, stages, both, cwd=root, timeout=LIMIT)
    assert outcome.code == 0, outcome.err
    run = (root / "runs/detector/latest").resolve()
    for experiment in ("bccd", "demo"):
        (root / "runs" / experiment).mkdir()
        (root / "runs" / experiment / "latest").symlink_to(run)
    for name in ("model.onnx", "mine.onnx", "other.onnx", "int8.onnx"):
        shutil.copy(run / "model.onnx", root / name)
    shutil.copy(run / "float.onnx", root / "float.onnx")
    exported = run_entry(
        "export.py", f"run={run}", "target=tensorrt_rtx", "output=rtx.onnx", cwd=root, timeout=LIMIT
    )
    assert exported.code == 0, exported.err
    shutil.copytree(root / "datasets/mine", root / "data")
    for link in ("datasets/bccd", "datasets/coco", "data/bccd", "coco"):
        (root / link).symlink_to(root / "datasets/mine")
    (root / "docs/images").mkdir(parents=True)
    make_voc(root / "VOC")
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


def make_voc(voc: Path) -> None:
    """A VOC dataset of one image without objects."""
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (voc / part).mkdir(parents=True)
    (voc / "ImageSets/Main/val.txt").write_text("a\n")
    size = "<size><width>8</width><height>8</height></size>"
    (voc / "Annotations/a.xml").write_text(f"<annotation>{size}</annotation>")
    cv2.imwrite(str(voc / "JPEGImages/a.jpg"), np.zeros((8, 8, 3), np.uint8))


def run(words: list[str]) -> None:
    """Run a command in this process, as `python` would."""
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(REPOSITORY / words[0]), run_name="__main__")
    sys.exit(0)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", quick(), ids=shorten)
def test_command_runs(folder: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if any(word in command for word in NEEDS_RTX) and "export.py" not in command:
        if importlib.util.find_spec("tensorrt_rtx") is None:
            pytest.skip("TensorRT for RTX is not installed")
        command = command.replace("model.onnx", "rtx.onnx")
    command = re.sub("^octet ", "python -m pipeline.commands ", command)
    words = [str(SIZE) if word == "640" else word for word in shlex.split(command)]
    words = ["mine" if word == "datasets/mine" and "scripts/voc" in command else word for word in words]
    words += ["--time", "0.1"] if "benchmark " in command else []
    monkeypatch.chdir(folder)
    if words[0].startswith("scripts/"):
        environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run([str(REPOSITORY / words[0]), *words[1:]], env=environment, check=False)
        assert done.returncode == (3 if importlib.util.find_spec("tensorrt") is None else 0)
        return
    words = words[1:]
    monkeypatch.setattr(sys, "argv", ["command", *words[2:]] if words[0] == "-m" else words)
    with pytest.raises(SystemExit) as ended:
        run(words)
    assert ended.value.code in (0, None)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", jobs(), ids=shorten)
def test_job_runs(folder: Path, command: str) -> None:
    words, place = arguments_of(command), folder / "job" / str(abs(hash(command)))
    if "deploy=tensorrt_rtx" in command and importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT for RTX is not installed")
    if any(word.startswith("resume=") for word in words) and not command.startswith("torchrun"):
        shutil.copytree((folder / "runs/detector/latest").resolve(), place)
    words += [f"hydra.sweep.dir={place}"] if "-m" in words else [f"run_dir={place}"]
    if command.startswith("torchrun"):
        code, err = run_team([*words, "device=cpu"], folder)
    else:
        outcome = run_entry("train_qat.py", *words, cwd=folder, timeout=LIMIT)
        code, err = outcome.code, outcome.err
    assert "Traceback" not in err
    if "device=cuda" in command and not torch.cuda.is_available():
        assert code == WITHOUT_GPU, err
    else:
        assert code == 0 or "accuracy_budget" in command or "max_ap_drop" in command, err


def run_team(words: list[str], folder: Path) -> tuple[int, str]:
    """Run the job in two processes of this machine."""
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(REPOSITORY / "train_qat.py"), *words,
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_every_command_is_run_by_a_test() -> None:
    listed = [*quick(), *jobs()]
    assert len(listed) == len(set(listed))
    others = {command for command in COMMANDS if elsewhere(command) is not None}
    installing = {command for command in COMMANDS if command.startswith(NOT_RUN)}
    assert set(COMMANDS) == {*listed, *others, *installing}
    assert all((REPOSITORY / test).is_file() for test in ELSEWHERE.values())
    assert len(quick()) >= 45
    assert len(jobs()) >= 20


def test_reduced_jobs_keep_their_settings() -> None:
    sweep = arguments_of(
        "python train_qat.py -m +experiment=bccd weights=w.pt quant.observer=minmax,mse,entropy"
    )
    assert sweep[:4] == ["-m", "+experiment=bccd", "weights=w.pt", "quant.observer=minmax,mse"]
    assert sweep[-1] == SHORT
    assert arguments_of("octet run +experiment=detector data.image_size=640")[:2] == [
        "+experiment=detector", "data.image_size=640",
    ]  # fmt: skip
