"""Every YAML file under configs/ is composed, found recursively and counted, so that none can rot unseen."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from configs import Config, compose, compose_export, dump, read
from configs.deploy_schema import TARGETS
from configs.overrides import groups
from configs.schema import MODELS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
EXPECTED = {
    ".": 2,
    "data": 4,
    "deploy": 5,
    "experiment": 10,
    "model": len(MODELS),
    "quant": 4,
    "train": 2,
}  # files per folder: a new file is added here, and thereby to these tests
NEEDED = ["weights=w.pt", "data.root=folder"]  # what an experiment without its own data and weights needs


def overrides_for(file: str) -> list[str]:
    """Return the command line that brings one file of the tree into a run."""
    folder, _, name = file.rpartition("/")
    option = name.removesuffix(".yaml")
    if not folder:
        return ["+experiment=demo"]
    if folder == "experiment":
        return [f"+experiment={option}", *([] if option in ("demo", "retinanet") else NEEDED)]
    extra = ["model.factory=package.module:function"] if option == "custom" else []
    return ["+experiment=bccd", *NEEDED, f"{folder}={option}", *extra]


def test_every_file_is_known() -> None:
    found: dict[str, int] = {}
    for file in FILES:
        folder = file.rpartition("/")[0] or "."
        found[folder] = found.get(folder, 0) + 1
    assert found == EXPECTED


@pytest.mark.parametrize("file", [file for file in FILES if file != "export.yaml"])
def test_file_composes_and_its_values_arrive(file: str) -> None:
    config = compose(overrides_for(file))
    assert isinstance(config, Config)
    folder = file.rpartition("/")[0]
    if folder in ("", "."):
        return
    text = (CONFIGS / file).read_text()
    content = yaml.safe_load(text)
    content.pop("defaults", None)
    section = config if text.startswith("# @package _global_\n") else getattr(config, folder)
    assert_contains(section, content)


def assert_contains(section: object, content: dict) -> None:
    """Compare a dataclass with what plain YAML says, an oracle that knows nothing of Hydra."""
    for key, value in content.items():
        actual = getattr(section, key)
        if isinstance(value, dict) and not isinstance(actual, dict):
            assert_contains(actual, value)
        else:
            assert actual == value, key


def test_export_composes() -> None:
    for target in TARGETS:
        config = compose_export(["run=runs/demo/latest", f"target={target}"])
        assert (config.run, config.target) == ("runs/demo/latest", target)


def test_there_is_a_model_file_per_architecture_and_a_deploy_file_per_target() -> None:
    tree = groups([CONFIGS])
    assert tree["model"] == sorted(name.replace("-", "_") for name in MODELS)
    assert tree["deploy"] == sorted(TARGETS)


def test_experiment_is_not_in_the_defaults() -> None:
    defaults = yaml.safe_load((CONFIGS / "config.yaml").read_text())["defaults"]
    assert not any("experiment" in str(item) for item in defaults)


@pytest.mark.parametrize("name", groups([CONFIGS])["experiment"])
def test_an_experiment_carries_its_own_name(name: str) -> None:
    assert compose([f"+experiment={name}", *NEEDED]).experiment == name


def test_demo_needs_nothing_and_trains() -> None:
    config = compose(["+experiment=demo"])
    assert config.data.kind == "synthetic"
    assert config.stages[0] == "train"
    assert config.data.image_size <= 192


def test_the_command_line_wins_over_the_experiment() -> None:
    config = compose(["+experiment=bccd", *NEEDED, "model=yolov9c", "qat.epochs=2", "stages=[float,report]"])
    assert config.model.name == "yolov9c"
    assert config.qat.epochs == 2
    assert config.stages == ["float", "report"]


def test_a_written_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = compose(
        [
            "+experiment=coco128_relu",
            *NEEDED,
            "quant.policy=[{match: head.*, keep_float: true}, {match: x, bits: 4}]",
        ]
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert read(path) == config
    assert config.data.merge_classes["vehicle"] == [2, 3, 5, 7]
    assert config.quant.policy[1].bits == 4


def test_experiments_of_ones_own_come_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /data: synthetic\n  - override /model: yolov9t\n  - _self_\n"
        "experiment: mine\n"
    )
    assert compose(["+experiment=mine"], config_dirs=[tmp_path]).experiment == "mine"
