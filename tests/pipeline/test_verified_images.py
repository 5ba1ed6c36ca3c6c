"""Images that were verified once are not decoded again by the next run, and the dataset's folder is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.compose import compose
from core.errors import DataError
from data import generate_synthetic
from pipeline.job import Job
from pipeline.run.directory import Run


def open_both(root: Path, cache: str) -> int:
    config = compose(["+experiment=demo", "data=folder", f"data.root={root}", f"data.cache_dir={cache}"])
    job = Job(config, Run(root))
    return len(job.splits.train) + len(job.splits.val)


def test_the_second_run_verifies_nothing_and_a_changed_image_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = generate_synthetic(tmp_path / "set", 6, 3, 64, 0)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    cache = tmp_path / "cache"
    assert open_both(root, str(cache)) == 9
    assert len(list(cache.iterdir())) == 2, "one file for each split"
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    with monkeypatch.context() as patched:
        patched.setattr("data.images.read_header", lambda *_: pytest.fail("decoded again"))
        assert open_both(root, str(cache)) == 9
    broken = next((root / "images/val").iterdir())
    broken.write_bytes(broken.read_bytes()[:-300])
    with pytest.raises(DataError, match=broken.name):
        open_both(root, str(cache))


def test_without_a_cache_every_run_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = generate_synthetic(tmp_path / "set", 2, 1, 64, 0)
    open_both(root, "null")
    monkeypatch.setattr("data.images.read_header", lambda *_: pytest.fail("decoded again"))
    with pytest.raises(pytest.fail.Exception, match="decoded again"):
        open_both(root, "null")


def test_a_cache_that_cannot_be_written_names_the_setting(tmp_path: Path) -> None:
    root = generate_synthetic(tmp_path / "set", 2, 1, 64, 0)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"data\.cache_dir"):
        open_both(root, str(tmp_path / "file/cache"))
