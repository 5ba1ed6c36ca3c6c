"""Settings that would ask the machine for what it does not have, or name what is no file."""

from pathlib import Path

import pytest

from configs.compose import compose
from core.errors import ConfigError, WriteError
from core.names import printable
from pipeline.run.directory import Run

DEMO = "+experiment=demo"


@pytest.mark.parametrize(
    "override",
    [
        "data.image_size=1048576", "data.image_size=[64,1048576]", "data.workers=10000", "qat.batch_size=1000000000",
        "train.batch_size=1000000000", "deploy.batch=1000000000", "threads=100000000", "data.synthetic.size=1048576",
        "data.synthetic.train=1000000000000", f"seed={'9' * 400}", "train.epochs=99999999999999999999",
        "evaluate.max_detections=1000000000000",
    ],
)  # fmt: skip
def test_sizes_beyond_any_machine_are_refused(override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        compose([DEMO, override])


def test_a_number_of_too_many_digits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^seed: a number of more than 1000 digits"):
        compose([DEMO, f"seed={'9' * 5000}"])


@pytest.mark.parametrize("rules", ["[abc]", "[3]", "${stages}"])
def test_a_policy_that_is_no_rule_is_refused(rules: str) -> None:
    with pytest.raises(ConfigError, match=r"quant\.policy"):
        compose([DEMO, f"quant.policy={rules}"])


@pytest.mark.parametrize(
    "defaults",
    [
        "[{}]",
        "[{model: yolov9t, data: yolo}]",
        "[{model: {a: b}}]",
        "[{model: [[a]]}]",
        "[[a]]",
        "[{model: 3}]",
        '["a\\0b"]',
        '[{model: "a\\0b"}]',
        '[{"a\\0b": yolov9t}]',
    ],
)
def test_a_defaults_list_that_hydra_does_not_read_is_refused(tmp_path: Path, defaults: str) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/x.yaml").write_text(f"# @package _global_\ndefaults: {defaults}\n")
    with pytest.raises(ConfigError, match="defaults as a list"):
        compose(["+experiment=x"], config_dirs=[tmp_path])


@pytest.mark.parametrize("directory", ["/proc/x", "/sys/x", "/dev/null/x", "/etc/passwd/x", "x" * 5000])
def test_a_run_directory_that_cannot_be_is_refused(directory: str) -> None:
    with pytest.raises(WriteError, match=r"cannot be (created|written)"):
        Run.create(Path(directory), "demo")


def test_control_characters_are_written_as_escapes() -> None:
    assert printable("a\x1b[31mb\x07\x9b\u202e\ud800\r") == "a\\x1b[31mb\\x07\\x9b\\u202e\\ud800\\r"
    assert printable("lines\nand\ttabs, é, 猫") == "lines\nand\ttabs, é, 猫"
