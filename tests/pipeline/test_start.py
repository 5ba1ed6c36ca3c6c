"""The start of a run: input is checked before the run directory or `latest` exist, and the remedies work."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from configs import compose
from core.errors import CheckpointError, ConfigError, OctetError, PolicyError, RunError, WriteError
from data import generate_synthetic
from data.formats.synthetic_scene import CLASSES
from models import build_detector, save_detector
from pipeline.main import open_job
from pipeline.run.directory import Run
from pipeline.run.ledger import Inputs
from pipeline.stages.order import ORDER
from training.team import ALONE


@pytest.fixture(scope="module")
def input_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny data set and weights that fit it."""
    folder = tmp_path_factory.mktemp("input")
    generate_synthetic(folder / "data", 2, 2, 64, 0)
    save_detector(build_detector("yolov9t", len(CLASSES), "silu", CLASSES), folder / "w.safetensors")
    return folder


@pytest.fixture
def start(input_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Start a run in an empty working directory, as far as the check of its input, and return its directory."""
    monkeypatch.chdir(tmp_path)

    def run(**changes: str) -> Run:
        settings = {
            "data.root": str(input_folder / "data"),
            "weights": str(input_folder / "w.safetensors"),
            "data.image_size": "64",
            "data.workers": "0",
            "data.cache_dir": "null",
            "device": "cpu",
            "stages": "[calibrate]",
        } | {key.replace("__", "."): value for key, value in changes.items()}
        config = compose(["+experiment=detector", *(f"{key}={value}" for key, value in settings.items())])
        return open_job(config, ALONE).run

    return run


TYPOS = {
    "weights": ({"weights": "nowhere.pt"}, CheckpointError, "nowhere.pt"),
    "data root": ({"data__root": "nowhere"}, OctetError, "nowhere"),
    "validation split": ({"data__val_split": "vaal"}, OctetError, "vaal"),
    "training split": ({"data__train_split": "trian"}, OctetError, "trian"),
    "architecture": ({"model": "yolov9c"}, CheckpointError, "yolov9t"),
    "data code": ({"data__factory": "nowhere.py:images"}, ConfigError, "nowhere.py"),
    "metric code": ({"metric__factory": "nowhere.py:f1"}, ConfigError, "nowhere.py"),
    "metric name": ({"metric__factory": "pathlib:Pth"}, ConfigError, "Pth"),
    "placement": ({"quant__placement": "nowhere.yaml"}, ConfigError, "nowhere.yaml"),
    "float pattern": ({"quant__float_patterns": "[hed.*]"}, PolicyError, "hed"),
    "policy": ({"quant__policy": "[{match: hed.*, keep_float: true}]"}, PolicyError, "hed"),
    "distillation": (
        {"qat__distill_feature_names": "[nek.*]", "qat__distill_features": "1", "stages": "[calibrate,finetune]"},
        ConfigError,
        "nek",
    ),
    "stage": ({"stages": "[export]"}, RunError, r"use stages=\[calibrate,export\]"),
    "stage of a stage": ({"stages": "[engine]"}, RunError, r"use stages=\[export,engine\]"),
    "row of a stage": (
        {"stages": "[calibrate,finetune]", "qat__skip_if_drop_below": "0.1"}, RunError, "float,calibrate,finetune",
    ),
    "gate": ({"max_ap_drop": "0.01"}, ConfigError, "add float to"),
    "batch": ({"stages": "[calibrate,export]", "deploy__batch": "3"}, ConfigError, r"batch=3.* has 2 images"),
    "width": ({"stages": "[calibrate,export]", "quant__weights__bits": "4"}, ConfigError, "below 8 bits is simulation"),
    "width of a rule": (
        {"stages": "[calibrate,export]", "quant__policy": "[{match: neck.*, bits: 4}]"}, ConfigError, "below 8 bits",
    ),
    "device": ({"device": "cuda:9"}, ConfigError, "cuda:9"),
    "resume": ({"resume": "true"}, RunError, "does not exist.*without resume=true"),
}  # fmt: skip


@pytest.mark.parametrize("name", TYPOS)
def test_a_typo_leaves_nothing_behind(start: Callable[..., Run], tmp_path: Path, name: str) -> None:
    changes, error, words = TYPOS[name]
    with pytest.raises(error, match=words):
        start(**changes)
    assert list(tmp_path.iterdir()) == []


def test_the_corrected_command_takes_the_directory_and_latest(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    """In a directory by name as in one by time; a first start that failed has left no trace."""
    for changes in ({}, {"run_dir": "mine"}):
        with pytest.raises(CheckpointError):
            start(weights="nowhere.pt", **changes)
        run = start(**changes)
        assert (run.directory / "config.yaml").is_file()
        again = start(resume="true", **changes)
        assert again.directory.resolve() == run.directory.resolve()
    assert (tmp_path / "runs/detector/latest/config.yaml").is_file()


@pytest.mark.parametrize("changes", [{}, {"run_dir": "mine"}])
def test_resume_auto_goes_on_where_there_is_a_run(start: Callable[..., Run], changes: dict[str, str]) -> None:
    first = start(resume="auto", **changes)
    assert start(resume="auto", **changes).directory.resolve() == first.directory.resolve()
    if not changes:
        assert start().directory.resolve() != first.directory.resolve()


def test_resume_auto_takes_no_folder_of_something_else(start: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(RunError, match="it is not a run directory; choose another"):
        start(resume="auto", run_dir="mine")


def test_a_failed_start_leaves_latest_where_it_was(start: Callable[..., Run], tmp_path: Path) -> None:
    run = start()
    with pytest.raises(RunError):
        start(stages="[engine]")
    assert (tmp_path / "runs/detector/latest").resolve() == run.directory.resolve()
    assert [path.name for path in (tmp_path / "runs/detector").iterdir() if path.name != "latest"] == [
        run.directory.name
    ]


def test_resume_is_recommended_only_where_it_works(start: Callable[..., Run], tmp_path: Path) -> None:
    """A folder of something else is no run, and `resume=true` would refuse it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(RunError, match="not a run directory; choose another") as caught:
        start(run_dir="mine")
    assert "resume=true" not in str(caught.value)
    start(run_dir="run")
    with pytest.raises(RunError, match="add resume=true"):
        start(run_dir="run")
    start(run_dir="run", resume="true")


def test_workers_and_cache_may_change_on_resume(start: Callable[..., Run]) -> None:
    run = start()
    config = compose(["+experiment=detector", "data.root=x", "weights=x"])
    stage = next(stage for stage in ORDER if stage.name == "calibrate")
    run.ledger.finish("calibrate", Inputs(stage.chosen_settings(config), {}), {}, 1.0)
    for key, value in (
        ("data.workers", "3"),
        ("data.cache_dir", "elsewhere"),
        ("threads", "1"),
        ("device", "cpu"),
    ):
        changed = compose(["+experiment=detector", "data.root=x", "weights=x", f"{key}={value}"])
        record = run.ledger.get("calibrate")
        assert record is not None
        assert record.inputs.changes(Inputs(stage.chosen_settings(changed), {})) == []
    changed = compose(["+experiment=detector", "data.root=x", "weights=x", "quant.observer=minmax"])
    assert record.inputs.changes(Inputs(stage.chosen_settings(changed), {})) != []


PLACES = {
    "below a file": ({"run_dir": "file/run"}, r"file is a file; choose another path"),
    "a file": ({"run_dir": "file"}, r"file is a file; choose another path"),
    "name too long": ({"run_dir": "x" * 300}, r"File name too long\): choose a shorter name"),
    "path too long": (
        {"run_dir": "/".join(["y" * 200] * 30)},
        r"File name too long\): choose a shorter name",
    ),
    "runs is a file": ({"experiment": "demo"}, r"runs is a file"),
    "latest is a folder": ({}, r"latest is a folder.*rename or remove it"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_run_directory_that_cannot_be_made_is_refused_first(
    start: Callable[..., Run], tmp_path: Path, name: str
) -> None:
    changes, words = PLACES[name]
    (tmp_path / "file").touch()
    if name == "runs is a file":
        (tmp_path / "runs").touch()
        changes = {}
    if name == "latest is a folder":
        (tmp_path / "runs/detector/latest").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(WriteError, match=words) as caught:
        start(weights="nowhere.pt", **changes)  # the place is found before the weights are looked for
    assert caught.value.exit_code == 3
    assert sorted(tmp_path.rglob("*")) == before


def test_a_read_only_disk_is_found_first(start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # what access(2) says of a read-only mount
    for changes in ({}, {"run_dir": "mine"}):
        with pytest.raises(WriteError, match=rf"user {os.getuid()} may not write there"):
            start(weights="nowhere.pt", **changes)
    disk = type("Disk", (), {"f_flag": os.ST_RDONLY})
    monkeypatch.setattr("os.statvfs", lambda path: disk)
    with pytest.raises(WriteError, match=r"Read-only file system\): choose a folder that can be written"):
        start(weights="nowhere.pt")
