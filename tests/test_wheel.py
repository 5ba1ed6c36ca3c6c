"""The wheel: it holds everything that a command needs, and `octet` runs from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data import generate_synthetic

REPOSITORY = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(
    ".*",
    "*.egg-info",
    "__pycache__",
    "build",
    "dist",
    "runs",
    "tests",
    "docs",
    "benchmarks",
    "outputs",
    "multirun",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs; packages of the index come from the environment."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(REPOSITORY, folder / "source", ignore=LEFT_OUT)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([*build, str(folder / "source")], check=True, capture_output=True)
    (wheel,) = folder.glob("octet-*.whl")
    target = folder / "site"
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)],
        check=True,
        capture_output=True,
    )
    shutil.rmtree(folder / "source")
    return target


def octet(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [str(installed / "bin/octet"), *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_octet_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    """Also from one that holds folders with the names of our packages."""
    for name in ("data", "models"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the folder of the user')\n")
    generate_synthetic(tmp_path / "set", 1, 1, 64, 0)
    version = octet(installed, tmp_path, "--version")
    assert (version.returncode, version.stdout.split()[0]) == (0, "octet")
    for arguments, words in (
        (("run", "+experiment=demo", "--cfg", "job"), "experiment: demo"),
        (("run", "--help"), "octet run +experiment=NAME"),
        (("export", "--help"), "octet export run=DIRECTORY"),
        (("check", "--help"), "octet check model.onnx"),
        (("data", "set"), "set: usable"),
    ):
        done = octet(installed, tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
        assert words in done.stdout
    assert octet(installed, tmp_path, "data", "nowhere").returncode == 3


def test_every_file_that_a_package_reads_is_in_the_wheel(installed: Path) -> None:
    """Every file of the packages that is no Python: configurations, templates, tables."""
    for package in ("configs", "deploy", "report", "core", "models", "data", "quant", "training", "pipeline"):
        for path in (REPOSITORY / package).rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                assert (installed / path.relative_to(REPOSITORY)).is_file(), path
