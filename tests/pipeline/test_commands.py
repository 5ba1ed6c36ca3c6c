"""Commands that a report prints: what they compose is the configuration of the run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from configs.compose import compose, compose_export
from configs.schema import Config
from pipeline.run.commands import (
    OF_THE_START,
    changed_settings,
    flat_configuration,
    next_commands,
    override,
    overrides,
    resume_command,
)
from pipeline.run.directory import Run

CASES: list[list[str]] = [
    ["+experiment=demo"],
    ["+experiment=demo", "train.epochs=2", "seed=7", "stages=[train,float]", "deploy.runtimes=[openvino,onnxruntime]"],
    ["+experiment=bccd", "weights='my weights.pt'", "data.root='it\\'s here'", "max_ap_drop=0.01",
     "data.image_size=[160,320]"],
    [
        "+experiment=yolov9t", "weights=w.pt", "data.root=d", "quant=fp8", "deploy.target=trt11",
        "quant.policy=[{match: '^head\\.(box|cls)\\..*$', keep_float: true}]", "quant.float_patterns=['a,b','x:y']",
        "+data.merge_classes={person: [0], vehicle: [1, car]}", "quant.accuracy_budget=null", "device=cpu",
    ],
]  # fmt: skip


def as_dict(config: Config) -> dict[str, Any]:
    return {key: value for key, value in flat_configuration(config).items() if key not in OF_THE_START}


@pytest.mark.parametrize("given", CASES)
def test_the_printed_command_makes_the_same_configuration(given: list[str], tmp_path: Path) -> None:
    config = compose(given)
    assert as_dict(compose(overrides(config))) == as_dict(config)
    again = next_commands(config, Run(tmp_path))[0]["command"]
    python, entry, *typed = shlex.split(again)
    assert (python, entry) == ("python", "train_qat.py")
    assert as_dict(compose(typed)) == as_dict(config)


def test_an_experiment_of_the_users_own_is_written_out() -> None:
    config = compose(["+experiment=bccd", "weights=w.pt", "data.root=d"])
    config.experiment = "mine"
    assert overrides(config)[0] == "+experiment=detector"
    assert as_dict(compose(overrides(config))) == as_dict(config)


def test_only_what_differs_is_listed() -> None:
    assert changed_settings(compose(["+experiment=demo", "seed=3"])) == {"seed": 3}


@pytest.mark.parametrize(
    "text",
    [
        "it's",
        "a\\b",
        "a\\",
        "x\\'y",
        " ",
        "",
        "{a}",
        "1e5",
        "null",
        "True",
        r"^head\.(cls|box)\..*$",
        "a,b=c:d",
        "\u00fc b",
        "$x",
    ],
)
def test_any_text_survives(text: str) -> None:
    config = compose(["+experiment=bccd", "data.root=d", override("weights", text)])
    assert config.weights == text


def test_exported_runs_have_commands_to_deploy(tmp_path: Path) -> None:
    config = compose(["+experiment=demo"])
    assert [item["title"] for item in next_commands(config, Run(tmp_path))] == [
        "Make this run again", "Continue this run", "This page again",
    ]  # fmt: skip
    (tmp_path / "export.json").write_text("{}")
    commands = [item["command"] for item in next_commands(config, Run(tmp_path))]
    assert f"python export.py run={tmp_path} target=openvino" in commands


def test_a_run_that_octet_started_is_continued_with_octet(tmp_path: Path) -> None:
    """Every command composes in zsh, whose only unquoted characters here are those that it leaves alone."""
    run = tmp_path / "a run's folder [1]"
    run.mkdir()
    (run / "export.json").write_text("{}")
    config = compose(["+experiment=bccd", "weights=w.pt", "data.root=d", "stages=[float,export]"])
    found = {
        item["title"]: item["command"]
        for item in next_commands(config, Run(run), ["octet run", "+experiment=bccd"])
    }
    assert [command.split()[:2] for command in found.values()] == [
        ["octet", "run"], ["octet", "run"], ["octet", "report"], ["octet", "export"], ["octet", "predict"],
        ["octet", "evaluate"],
    ]  # fmt: skip
    for command in found.values():
        unquoted = re.sub(r"'[^']*'|\"[^\"]*\"", "", command)
        assert not set("[]{}*?~<>()|&;$\\") & set(unquoted), command
    assert shlex.split(found["See what it detects"]) == ["octet", "predict", str(run), "IMAGE"]
    _, _, *typed = shlex.split(found["Continue this run"])
    assert compose(typed).run_dir == str(run)
    assert compose_export(shlex.split(found["Export"])[2:]).run == str(run)
    resumed = shlex.split(resume_command(run, ["octet run", "+experiment=demo", "run_dir=old"]))
    assert resumed[:2] == ["octet", "run"]
    assert compose(resumed[2:]).run_dir == str(run)
