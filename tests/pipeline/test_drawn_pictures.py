"""The pictures of the report: how they are named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from data import generate_synthetic, open_dataset
from pipeline.stages.pictures import title_of


def test_a_picture_has_the_name_of_its_file(tmp_path: Path) -> None:
    generate_synthetic(tmp_path, 1, 2, 64, 0)
    files = sorted(path.name for path in (tmp_path / "images/val").iterdir())
    assert [title_of(open_dataset(tmp_path, "val"), index) for index in (0, 1)] == files


def test_a_dataset_without_files_has_numbers() -> None:
    assert title_of(SimpleNamespace(ids=[7, 9]), 1) == "image 9"  # type: ignore[arg-type]
