"""The run directory: whole files, the latest link, refusal to mix runs, what has been done."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from core.errors import RunError, StateError, WriteError
from core.rows import FLOAT, MIXED, PTQ, QAT, ResultRow, engine_key
from pipeline.run.directory import CONFIG, Run
from pipeline.run.ledger import Inputs


def test_latest_points_to_the_newest_run(tmp_path: Path) -> None:
    first = Run.create(None, "demo", tmp_path)
    second = Run.create(None, "demo", tmp_path)
    assert first.directory != second.directory
    assert (tmp_path / "demo/latest").resolve() == second.directory.resolve()


def test_given_directory_that_holds_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="choose another"):
        Run.create(tmp_path, "demo")
    assert (tmp_path / "file").read_text() == "mine"


def test_open_needs_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=CONFIG):
        Run.open(tmp_path)


def test_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    run.write_text("rows.json", "old")

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        run.write_text("rows.json", "new")
    assert run.path("rows.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_a_folder_of_another_user_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that runs as another user than the owner of the mounted runs."""

    def refused(*arguments: object, **settings: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    monkeypatch.setattr("core.files.tempfile.mkstemp", refused)
    words = rf"\(Permission denied\): user {os.getuid()} may not write there.*docker run --user"
    with pytest.raises(WriteError, match=words):
        Run.create(None, "bccd", tmp_path / "runs")
    with pytest.raises(WriteError, match=words):
        Run(tmp_path).write_json("state.json", {})


def test_missing_artifact_names_the_stage_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="stage `calibrate`"):
        Run(tmp_path).need("placement.yaml", "calibrate")


def test_stages_are_remembered_once_each_in_order(tmp_path: Path) -> None:
    run, inputs = Run(tmp_path), Inputs({"seed": 0}, {})
    for stage in ("float", "calibrate", "float"):
        run.ledger.finish(stage, inputs, {}, 1.0)
    run.ledger.start("engine", inputs)
    assert [entry["name"] for entry in run.stages()] == ["calibrate", "float"]
    assert run.is_done("float")
    assert not run.is_done("engine")


def test_rows_come_float_first_and_int8_before_other_engines(tmp_path: Path) -> None:
    run = Run(tmp_path)
    keys = [engine_key("openvino", "fp32"), QAT, engine_key("openvino", "int8"), FLOAT, MIXED, PTQ]
    for key in keys:
        run.write_row(ResultRow.of(key, {"ap": 0.5, "ap_small": 0.1}))
    rows = run.rows()
    assert [row.key for row in rows] == [FLOAT, PTQ, MIXED, QAT, keys[2], keys[0]]
    assert [row.name for row in rows][-2:] == ["engine:openvino:int8", "engine:openvino:fp32"]
    assert (rows[0].ap, rows[0].size_bytes, rows[0].extras) == (0.5, None, {"ap_small": 0.1})


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write_text("rows/float.json", '{"name": "float"}')
    with pytest.raises(RunError, match=r"float\.json is not a row"):
        run.rows()


def test_planning_makes_no_directory(tmp_path: Path) -> None:
    run = Run.plan(None, "demo", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    run.make()
    assert run.directory.is_dir()
    assert (tmp_path / "runs/demo/latest").resolve() == run.directory.resolve()


@pytest.mark.parametrize("content", [b"", b"{", b"\x93garbage\x00"], ids=["empty", "cut", "garbage"])
def test_damaged_artifacts_are_named_with_the_way_out(tmp_path: Path, content: bytes) -> None:
    run = Run(tmp_path)
    (tmp_path / "rows").mkdir()
    for name in ("calibration.json", "qat.jsonl", "rows/qat.json", "state.json"):
        run.path(name).write_bytes(content + b"\n")
    for read in (
        lambda: run.read_json("calibration.json"),
        lambda: run.read_lines("qat.jsonl"),
        run.rows,
        run.ledger.records,
    ):
        with pytest.raises(StateError, match="remove it") as caught:
            read()
        assert caught.value.exit_code == 3
        assert str(tmp_path) in str(caught.value)
