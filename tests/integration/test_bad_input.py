"""Bad input ends within seconds, with the right exit code and a message that names value, expectation and remedy."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from main_job import TINY, run_entry, untrained_weights

SECONDS = 60.0  # imports of torch included, on a busy machine


def ends(arguments: tuple[str, ...], cwd: Path, code: int, *words: str) -> None:
    started = time.perf_counter()
    outcome = run_entry("train_qat.py", *arguments, cwd=cwd)
    assert outcome.code == code, (outcome.code, outcome.err)
    assert time.perf_counter() - started < SECONDS
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err, (word, outcome.err)


def test_missing_data_root(tmp_path: Path) -> None:
    ends(("+experiment=yolov9t", "data.root=nowhere"), tmp_path, 3, "nowhere", "data.root")


def test_empty_data_root(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ends(("+experiment=yolov9t", "data.root=empty"), tmp_path, 3, "empty")


def test_image_size_that_is_no_multiple_of_32(tmp_path: Path) -> None:
    ends(
        ("+experiment=demo", "data.image_size=100"),
        tmp_path,
        2,
        "100",
        "multiple of 32",
        "data.image_size=96",
    )


def test_unknown_experiment_names_the_closest(tmp_path: Path) -> None:
    ends(("+experiment=yolo9c",), tmp_path, 2, "yolo9c", "yolov9c")


def test_unknown_key_names_the_closest(tmp_path: Path) -> None:
    ends(("+experiment=demo", "qat.epcohs=3"), tmp_path, 2, "epcohs", "qat.epochs")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04broken"])
def test_wrong_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights.pt").write_bytes(content)
    ends((*TINY, "weights=weights.pt"), tmp_path, 3, "weights.pt")


def test_missing_checkpoint(tmp_path: Path) -> None:
    ends((*TINY, "weights=nowhere.pt"), tmp_path, 3, "nowhere.pt")


def test_class_count_mismatch(tmp_path: Path, shared_data: Path) -> None:
    weights = shared_data / "weights/gelan-t-bccd.pt"
    ends(
        ("+experiment=bccd", f"weights={weights}", f"data.root={shared_data / 'data/coco128'}"),
        tmp_path,
        3,
        "3 classes",
        "80",
        "merge_classes",
    )


def test_policy_that_matches_nothing(tmp_path: Path) -> None:
    ends(
        (*TINY, untrained_weights(tmp_path), "quant.float_patterns=[nekc.*]", "stages=[calibrate]"),
        tmp_path,
        2,
        "nekc",
        "closest",
        "neck.",
    )
