"""The script that fetches BCCD: a VOC tree in a local git repository replaces the published one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from data import open_dataset

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
CLASSES = "RBC,WBC,Platelets"
BOX = "<object><name>{}</name><bndbox>{}</bndbox></object>"

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def annotation(width: int, height: int, *boxes: tuple[str, int, int, int, int]) -> str:
    sides = ("xmin", "ymin", "xmax", "ymax")
    objects = "".join(
        BOX.format(
            name, "".join(f"<{side}>{value}</{side}>" for side, value in zip(sides, corners, strict=True))
        )
        for name, *corners in boxes
    )
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f'<annotation verified="no"><filename>other.jpg</filename>{size}{objects}</annotation>'


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of the published layout: three images of 80 x 40 pixels."""
    voc = tmp_path / "published/BCCD"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (voc / folder).mkdir(parents=True)
    content = {
        "a": annotation(80, 40, ("WBC", 10, 20, 50, 40), ("RBC", 0, 0, 8, 8)),
        "b": annotation(
            80, 40, ("Platelets", 60, 30, 90, 50), ("RBC", 7, 7, 7, 9)
        ),  # over the edge; no width
        "c": annotation(80, 40),
    }
    for name, text in content.items():
        (voc / f"Annotations/{name}.xml").write_text(text)
        cv2.imwrite(str(voc / f"JPEGImages/{name}.jpg"), np.full((40, 80, 3), 90, np.uint8))
    (voc / "ImageSets/Main/train.txt").write_text("a\nc\n")
    (voc / "ImageSets/Main/val.txt").write_text("b\n")
    (voc.parent / "LICENSE").write_text("MIT\n")
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "data"]):
        git(voc.parent, *command)
    return voc.parent


def git(folder: Path, *arguments: str) -> str:
    names = ("user.name=x", "user.email=x@example.org", "commit.gpgsign=false")
    options = [word for name in names for word in ("-c", name)]
    done = subprocess.run(
        ["git", "-C", str(folder), *options, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def fetch(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPTS / "get_bccd.sh"), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_published_layout_becomes_a_dataset(repository: Path, tmp_path: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    done = fetch(tmp_path, "mine", str(repository), commit)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "train: 2 images, 2 objects, 0 without area left out",
        "val: 1 images, 1 objects, 1 without area left out",
        "mine",
    ]
    labels = {path.stem: path.read_text() for path in (tmp_path / "mine/labels").rglob("*.txt")}
    assert labels["c"] == ""
    # by hand: (10 + 50) / 2 / 80, (20 + 40) / 2 / 40, 40 / 80, 20 / 40
    assert labels["a"].splitlines()[0] == "1 0.375000 0.750000 0.500000 0.500000"
    assert labels["b"] == "2 0.875000 0.875000 0.250000 0.250000\n"  # 60..80, 30..40
    train = open_dataset(tmp_path / "mine", "train")
    assert (len(train), tuple(train.names)) == (2, tuple(CLASSES.split(",")))
    assert not (tmp_path / "mine/.source").exists()
    assert (tmp_path / "mine/LICENSE").read_text() == "MIT\n"
    shutil.rmtree(repository)
    assert fetch(tmp_path, "mine", str(repository), commit).returncode == 0, "it is fetched once"


def test_another_commit_or_no_network_is_one_message(repository: Path, tmp_path: Path) -> None:
    done = fetch(tmp_path, "mine", str(repository), "0" * 40)
    assert done.returncode == 1
    assert "cannot be fetched: check the network" in done.stderr
    assert not (tmp_path / "mine/images").exists()
    assert fetch(tmp_path, "mine", str(repository)).returncode == 2


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.xml", annotation(80, 40, ("cell", 1, 1, 2, 2)), "has the class 'cell': expected one of RBC"),
        ("a.xml", annotation(0, 40), "an image of 0 x 40 pixels"),
        ("a.xml", "<annotation>", "is not a VOC annotation"),
        ("b.xml", None, "b.xml"),
    ],
)
def test_a_faulty_annotation_is_named_and_nothing_is_written(
    repository: Path, tmp_path: Path, name: str, text: str | None, words: str
) -> None:
    path = repository / "BCCD/Annotations" / name
    path.unlink() if text is None else path.write_text(text)
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPTS / "voc_to_yolo.py"),
            str(repository / "BCCD"),
            "out",
            "--classes",
            CLASSES,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert re.search(f"^error: .*{re.escape(words)}", done.stderr)
    assert not (tmp_path / "out").exists()
