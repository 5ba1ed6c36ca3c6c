"""Every slip of the finger ends in a ConfigError that names the value, the expectation and the remedy."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from configs import Config, compose, compose_export, read, validate
from core.command import path_argument
from core.errors import ConfigError
from core.names import closest, is_address

DEMO = "+experiment=demo"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("epcohs=3", ["'epcohs'", "closest: train.epochs"]),
        ("train.epcohs=3", ["'train.epcohs'", "closest: train.epochs"]),
        ("+qat.learnin_rate=3", ["'qat.learnin_rate'", "closest: qat.learning_rate"]),
        ("++quant.observers=mse", ["closest: quant.observer"]),
        ("image_size=320", ["closest: data.image_size"]),
        ("xyzzy=1", ["'xyzzy'", "docs/configuration.md"]),
        ("model=yolov9cc", ["Unknown model 'yolov9cc'", "closest: yolov9c", "yolov9t"]),
        ("quant=int9", ["Unknown quant 'int9'", "closest: int8"]),
        ("+model=yolov9c", ["write model=yolov9c"]),
        ("experiment=bccd", ["plus sign", "+experiment=bccd"]),
        ("train.epochs=many", ["train.epochs", "'many'", "Integer"]),
        ("train.epochs=0", ["train.epochs=0", "at least 1"]),
        ("qat.learning_rate=0", ["qat.learning_rate=0", "more than 0"]),
        (
            "data.image_size=100",
            ["data.image_size=100", "multiple of 32", "data.image_size=96", "data.image_size=128"],
        ),
        ("data.image_size=0", ["data.image_size=0", "at least 32"]),
        ("quant.observer=mle", ["quant.observer=mle", "minmax, percentile, mse, entropy", "closest: mse"]),
        ("quant.activations.bits=9", ["quant.activations.bits=9", "at most 8"]),
        ("quant.grid=fp16", ["quant.grid=fp16", "integer, fp8"]),
        ("quant.policy=[{match: x, grid: fp9}]", ["quant.policy[0].grid=fp9", "closest: fp8"]),
        ("deploy.target=tensorrt", ["deploy.target=tensorrt", "trt10"]),
        ("deploy.runtimes=[openvno]", ["deploy.runtimes=openvno", "closest: openvino"]),
        ("stages=[float,calibrte]", ["stages=calibrte", "closest: calibrate"]),
        ("stages=[report,float]", ["use stages=[float,report]"]),
        ("stages=[float,float]", ["float more than once"]),
        ("stages=[]", ["at least one stage"]),
        ("device=gpu", ["device=gpu", "use device=auto"]),
        ("quant.policy=[{mtch: x}]", ["mtch", "closest: match"]),
        ("quant.policy=[{match: x, bits: 1}]", ["quant.policy[0].bits=1", "at least 2"]),
        ("quant.policy=[{keep_float: true}]", ["match", "no value"]),
        ("data.merge_classes={x: [1]}", ["write '+data.merge_classes="]),
        ("model.factory=os", ["model.factory=os", "path/to/file.py:function", "package.module:function"]),
        ("model.factory=a.b:c", ["model.factory=a.b:c", "model.name=yolov9t", "model=custom"]),
        ("a b=", ["'a b='", "KEY=VALUE"]),
        ("model=custom", ["model.factory=path/to/file.py:function"]),
        ("model=auto", ["nothing to recognise", "weights=FILE"]),
        ("data=folder", ["data.root is not set", "data=synthetic"]),
        ("ema_decay=nan", ["closest: train.ema_decay"]),
        ("train.ema_decay=nan", ["train.ema_decay=nan"]),
    ],
)
def test_a_wrong_override_is_explained(override: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([DEMO, override])
    assert "\n" not in str(caught.value)
    for part in expected:
        assert part in str(caught.value)


def test_an_unknown_experiment_names_the_closest_and_all() -> None:
    with pytest.raises(
        ConfigError, match=r"Unknown experiment 'bcd'; closest: bccd; there are bccd, coco128_relu"
    ):
        compose(["+experiment=bcd"])


def test_no_experiment_names_all() -> None:
    with pytest.raises(ConfigError, match=r"add \+experiment=NAME with one of bccd, .*yolov9t"):
        compose([])


def test_export_without_a_run() -> None:
    with pytest.raises(ConfigError, match="add run=DIRECTORY"):
        compose_export([])
    with pytest.raises(ConfigError, match=r"Unknown key 'traget'.*closest: target"):
        compose_export(["run=x", "traget=trt10"])


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        compose([DEMO, "seed=-1", "data.image_size=33", "quant.observer=x"])
    assert len(str(caught.value).splitlines()) == 3


def test_an_unknown_key_in_a_file_of_ones_own_is_explained(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nexperiment: mine\nqat:\n  epocs: 1\n"
    )
    with pytest.raises(ConfigError, match=r"qat\.epocs; closest: qat\.epochs"):
        compose(["+experiment=mine"], config_dirs=[tmp_path])


def test_a_broken_file_of_ones_own_is_explained(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nqat: [1\n")
    with pytest.raises(ConfigError, match="YAML"):
        compose(["+experiment=mine"], config_dirs=[tmp_path])


def test_reading_a_bad_run_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no readable file"):
        read(tmp_path / "absent.yaml")
    path = tmp_path / "config.yaml"
    path.write_text("experiment: x\nqat:\n  epocs: 1\n")
    with pytest.raises(ConfigError, match=r"closest: qat\.epochs"):
        read(path)
    path.write_text("[1, 2]\n")
    with pytest.raises(ConfigError, match="expected settings"):
        read(path)


def test_validate_accepts_the_defaults_with_data_and_weights() -> None:
    config = Config(experiment="x", weights="w.pt")
    config.data.root = "folder"
    validate(config)


@pytest.mark.parametrize(
    ("word", "expected"),
    [("epcohs", "train.epochs"), ("qat.epcohs", "qat.epochs"), ("SEED", "seed"), ("zzzz", None)],
)
def test_closest(word: str, expected: str | None) -> None:
    assert closest(word, ["seed", "train.epochs", "qat.epochs"]) == expected


def test_fp8_with_settings_of_integer_grids() -> None:
    wrong = ["quant.weights.bits=4", "quant.observer=entropy", "quant.greedy_rounding=true"]
    with pytest.raises(ConfigError) as caught:
        compose([DEMO, "quant=fp8", *wrong])
    for part in (
        *wrong,
        "use quant.weights.bits=8",
        "use quant.observer=mse",
        "use quant.greedy_rounding=false",
    ):
        assert part in str(caught.value)
    assert compose([DEMO, "quant=fp8"]).quant.grid == "fp8"


def test_fp8_for_gpus_without_it() -> None:
    settings = [DEMO, "quant=fp8", "deploy=tensorrt_rtx"]
    with pytest.raises(ConfigError, match=r"names SM86, without FP8.*=\[SM89,SM120,SM121\]"):
        compose([*settings, "deploy.compute_capabilities=[SM86,SM89]"])
    compose([*settings, "deploy.compute_capabilities=[SM89,SM120]"])


@pytest.mark.parametrize("key", ["weights", "data.root", "quant.placement", "run_dir"])
def test_an_address_is_no_path(key: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{key}: 'https://\S+' is an address, and Octet downloads nothing"
    ):
        compose([DEMO, f"{key}=https://example.org/w.pt"])
    compose([DEMO, f"{key}=folder/w.pt"])


def test_paths_and_addresses_are_told_apart() -> None:
    assert all(
        map(is_address, ("https://a.org/w.pt", "https:/a.org/w.pt", "s3://bucket/w.pt", "file://w.pt"))
    )
    assert not any(map(is_address, ("w.pt", "/a/b", "../b", "C:/w.pt", "a:b", "file.py:function", "a/b:/c")))
    with pytest.raises(argparse.ArgumentTypeError, match="downloads nothing"):
        path_argument("https://a.org/w.pt")


def test_a_setting_that_needs_a_value() -> None:
    with pytest.raises(ConfigError, match=r"data.val_split=null: expected a value; leave data.val_split out"):
        compose([DEMO, "data.val_split=null"])
