"""The command `octet`: every subcommand answers, mistakes are told, the doctor finds what is in the way."""

from __future__ import annotations

import json
import re
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest

from core.errors import DeployError
from data import generate_synthetic
from deploy.runtimes.onnxruntime import ONNXRuntime
from models import build_detector, save_detector
from pipeline.commands import benchmark, doctor
from pipeline.commands.octet import EXAMPLES, help_text, main
from pipeline.commands.table import SUBCOMMANDS
from pipeline.run.commands import resume_command
from pipeline.run.files import FLOAT_ONNX
from quant.native import building, kernel


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_has_help_under_its_own_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([name, "--help"])
    except SystemExit as left:  # argparse
        code = int(left.code or 0)
    output = capsys.readouterr().out
    assert code == 0
    assert f"octet {name} " in output
    assert "examples:" in output
    assert "python -m" not in output


def test_help_lists_every_command_and_every_example_is_one() -> None:
    lines = help_text().splitlines()
    for subcommand in SUBCOMMANDS.values():
        assert sum(line.startswith(f"  {subcommand.name} ") for line in lines) == 1
    for example in EXAMPLES:
        program, name, *_ = example.split()
        assert program == "octet"
        assert name in SUBCOMMANDS


MISTAKES = {
    "command": (["predictt"], "Unknown command 'predictt'.*closest: predict"),
    "option": (["--verbose"], "Unknown option '--verbose'"),
    "shell": (["--completion", "tcsh"], "expected one of bash, zsh, fish"),
    "setting": (["run", "+experiment=demmo"], "Unknown experiment 'demmo'; closest: demo"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_message(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = MISTAKES[name]
    try:
        code = main(arguments)
    except SystemExit as left:  # of Hydra's entries
        code = int(left.code or 0)
    assert code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(words, error)


def test_without_a_command_the_help_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: octet COMMAND" in capsys.readouterr().err


def test_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"octet {metadata.version('octet')}\n"


def test_a_stopped_run_says_how_octet_goes_on() -> None:
    started = ["octet run", "+experiment=demo", "run_dir=old"]
    assert resume_command(Path("runs/x"), started) == "octet run +experiment=demo run_dir=runs/x resume=true"


# ------------------------------------------------------------------------------------------------------- benchmark
def test_a_run_is_compared_with_its_float_graph(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    for name in (FLOAT_ONNX, "model.onnx"):
        (tmp_path / name).touch()
    (tmp_path / "export.json").write_text(
        json.dumps({"exports": [{"path": "model.onnx", "target": "onnxruntime"}]})
    )
    run = str(tmp_path)
    arguments = benchmark.compare_run([run, "--runtime", "onnxruntime", "--batch", "2", "--pin", "core"], "x")
    assert arguments == [
        "--compare", f"{run}/float.onnx@onnxruntime", f"{run}/model.onnx@onnxruntime", "--runtime", "onnxruntime",
        "--batch", "2", "--time", "5", "--table", f"{run}/latency-onnxruntime.md",
        "--json", f"{run}/latency-onnxruntime.json", "--pin", "core",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- doctor
@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Settings of a run that can start, in an empty working directory."""
    generate_synthetic(tmp_path / "data", 2, 2, 64, 0)
    save_detector(build_detector("yolov9t", 4), tmp_path / "w.safetensors")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    found = {"data.root": tmp_path / "data", "weights": tmp_path / "w.safetensors"} | {
        "data.image_size": 64, "data.class_map": "order", "data.cache_dir": "null", "device": "cpu",
        "deploy.runtimes": "[onnxruntime]",
    }  # fmt: skip
    return ["+experiment=detector", "deploy=onnxruntime", *(f"{key}={value}" for key, value in found.items())]


def test_the_doctor_passes_a_run_that_can_start_and_writes_nothing(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main([*settings, "--json", str(tmp_path / "found.json")]) == 0
    found = {item["subject"]: item for item in json.loads((tmp_path / "found.json").read_text())}
    assert found["validation data"]["text"].startswith("2 images, 4 classes")
    assert found["ONNX Runtime"]["status"] == "ok"
    assert found["disk"]["status"] == "ok"
    assert found["fake quantization"]["text"].startswith("native kernel, kept in")
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 problems")
    assert list(Path.cwd().iterdir()) == []


def test_the_doctor_names_what_is_in_the_way(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Absent weights, a full disk, and a runtime that the run wants and that is not installed: all in one go."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**20))

    def require(target: str | None = None) -> None:
        raise DeployError("ONNX Runtime is not installed: pip install onnxruntime")

    monkeypatch.setattr(ONNXRuntime, "require", require)
    assert doctor.main([*settings, "weights=nowhere.pt"]) == 3
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    problems = [line for line in lines if line.startswith("problem")]
    assert problems[0].endswith("ONNX Runtime is not installed: pip install onnxruntime")
    assert "0.0 GiB free for runs, a run needs 2" in problems[1]
    assert "Checkpoint nowhere.pt does not exist" in problems[2]
    assert lines[-1].startswith("3 problems")


def test_a_kernel_that_is_wanted_and_cannot_be_built_is_in_the_way(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(building, "COMPILERS", ())
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(kernel, "_loaded", kernel._loaded.__wrapped__)
    assert doctor.main(settings) == 0
    assert (
        "note  fake quantization: torch operators (the native kernel cannot be built"
        in capsys.readouterr().out
    )
    assert doctor.main([*settings, "quant.kernel=native"]) == 3
    assert "problem  run: the native kernel cannot be built: no C compiler" in capsys.readouterr().out
    assert list(Path.cwd().iterdir()) == []


def test_a_runtime_that_no_run_wants_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def require(target: str | None = None) -> None:
        raise DeployError("not installed")

    monkeypatch.setattr(ONNXRuntime, "require", require)
    found = {finding.subject: finding.status for finding in doctor.check_runtimes(())}
    assert found["ONNX Runtime"] == "note"


def test_wrong_settings_end_the_doctor_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["epcohs=3"]) == 2
    assert "Unknown key 'epcohs'" in capsys.readouterr().err
