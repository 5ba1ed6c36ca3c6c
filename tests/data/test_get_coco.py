"""The download script, with programs in place of curl and unzip: nothing is fetched."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "get_coco.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def run(
    tmp_path: Path, *arguments: str, md5_passes: bool, curl_ends: str = "0"
) -> subprocess.CompletedProcess[str]:
    """Run the script with stand-ins that write down what they were asked to do."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    log = tmp_path / "log"
    for name, body in (
        (
            "curl",
            f'echo "curl ${{@: -1}}" >> {log}; while [[ $1 != --output ]]; do shift; done; touch "$2"; '
            f"exit {curl_ends}",
        ),
        ("sleep", f'echo "sleep $1" >> {log}'),
        ("unzip", f'echo "unzip $5" >> {log}'),
        ("md5sum", f"exit {0 if md5_passes else 1}"),
    ):
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )


def test_validation_part_is_fetched_once(tmp_path: Path):
    first = run(tmp_path, "coco", md5_passes=True)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == "coco"
    log = (tmp_path / "log").read_text()
    assert log.count("curl http://images.cocodataset.org") == 2
    assert "train2017.zip" not in log
    assert "unzip coco/images" in log
    assert run(tmp_path, "coco", md5_passes=True).returncode == 0
    assert (tmp_path / "log").read_text() == log
    run(tmp_path, "coco", "all", md5_passes=True)
    assert "train2017.zip" in (tmp_path / "log").read_text()
    assert list((tmp_path / "coco").glob("*.zip")) == []


def test_damaged_archive_is_refused(tmp_path: Path):
    result = run(tmp_path, "coco", md5_passes=False)
    assert result.returncode == 1
    assert "arrived damaged" in result.stderr
    assert "unzip" not in (tmp_path / "log").read_text()
    assert list((tmp_path / "coco").glob("*.zip")) == []


def test_unknown_part(tmp_path: Path):
    result = run(tmp_path, "coco", "everything", md5_passes=True)
    assert result.returncode == 2
    assert "expected val or all" in result.stderr


def test_without_network_it_ends_at_once_with_one_message(tmp_path: Path):
    """Exit code 6 of curl: the host's name cannot be resolved."""
    result = run(tmp_path, "coco", md5_passes=True, curl_ends="6")
    assert result.returncode == 1
    assert (tmp_path / "log").read_text().count("curl ") == 1
    assert "cannot be fetched (curl ended with 6): check the network" in result.stderr


def test_an_interrupted_transfer_is_continued(tmp_path: Path):
    """Exit code 56 of curl, twice, then success."""
    log = tmp_path / "log"
    result = run(tmp_path, "coco", md5_passes=True, curl_ends=f"$(( $(grep -c curl {log}) <= 2 ? 56 : 0 ))")
    assert result.returncode == 0, result.stderr
    lines = log.read_text().splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["curl", "sleep", "curl", "sleep", "curl"]
