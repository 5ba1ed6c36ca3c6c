"""data.image_size: one number or [height, width], through the command line, YAML and a run's config.yaml."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import yaml

from configs import compose, read
from configs.compose import dump
from core.command import size_argument
from core.errors import ConfigError
from core.image_size import ImageSize

DEMO = "+experiment=demo"


@pytest.mark.parametrize(
    ("value", "size", "stored"),
    [
        ("640", (640, 640), 640),
        ("[384,640]", (384, 640), [384, 640]),
        ("[640,384]", (640, 384), [640, 384]),
        ("[320,320]", (320, 320), 320),
        ("[320]", (320, 320), 320),
    ],
)
def test_one_number_is_a_square_and_two_are_height_and_width(
    tmp_path: Path, value: str, size: tuple[int, int], stored: object
) -> None:
    config = compose([DEMO, f"data.image_size={value}"])
    assert config.data.input_size == size
    assert config.data.image_size == stored
    (tmp_path / "config.yaml").write_text(dump(config))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]["image_size"] == stored
    assert read(tmp_path / "config.yaml") == config


def test_a_yaml_tree_may_hold_a_rectangle(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/wide.yaml").write_text(
        "# @package _global_\nexperiment: wide\n"
        "data: {kind: synthetic, image_size: [64, 96]}\nmodel: {name: yolov9t}\n"
    )
    assert compose(["+experiment=wide"], [tmp_path]).data.input_size == (64, 96)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[384,650]", ["data.image_size=[384, 650]", "multiple of 32", "data.image_size=[384,640]"]),
        ("[0,640]", ["data.image_size=[0, 640]", "at least 32", "data.image_size=[32,640]"]),
        ("[-64,640]", ["data.image_size=[-64, 640]", "at least 32", "data.image_size=[32,640]"]),
        ("[384,640,3]", ["data.image_size=[384, 640, 3]", "[height, width]", "data.image_size=[384,640]"]),
        ("[]", ["data.image_size=[]", "[height, width]"]),
        ("[384.5,640]", ["data.image_size=[384.5, 640]", "[height, width]"]),
        ("wide", ["data.image_size=wide", "one number of pixels", "data.image_size=640"]),
        ("true", ["data.image_size=True", "[height, width]"]),
        ("null", ["data.image_size=None", "[height, width]"]),
        ("[100,100]", ["data.image_size=100", "multiple of 32", "data.image_size=96"]),
    ],
)
def test_what_is_no_size_is_named_with_a_remedy(value: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        compose([DEMO, f"data.image_size={value}"])
    assert [text for text in expected if text not in str(error.value)] == []


def test_sizes_on_command_lines_and_in_metadata() -> None:
    assert size_argument("640") == (640, 640)
    assert size_argument("384x640") == ImageSize(384, 640)
    assert ImageSize(384, 640).text == "384x640"
    for text in ("", "x", "384x", "384x640x3", "-384x640", "0x640", "384 x 640", "9" * 5000):
        assert ImageSize.parse(text) is None
        with pytest.raises(argparse.ArgumentTypeError, match="HEIGHTxWIDTH"):
            size_argument(text)
