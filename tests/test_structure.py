"""The rule of the structure: packages do not import each other, and heavy libraries are imported in one file each.

The rule is read from the source with `ast`, so an import inside a function or under `if TYPE_CHECKING` counts too.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from core.runtimes import RUNTIMES

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("models", "data", "quant", "training", "deploy", "report")
SHARED = "core"  # all may import it; it imports none
PIPELINE = "pipeline"
OWN = (*PACKAGES, SHARED, PIPELINE, "configs")
ENTRIES = ("train_qat.py", "export.py")
CONFIG_LIBRARIES = ("hydra", "omegaconf")
ONE_FILE_ONLY = (*(runtime.library for runtime in RUNTIMES.values()), "pycocotools")
MAX_ENTRY_LINES = 60


def imported_packages(source: str) -> set[str]:
    """Return the first part of every absolutely imported name, wherever in the source the import stands."""
    packages: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            packages.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                packages.add(node.args[0].value.split(".")[0])
    return packages


def violations(files: dict[str, str]) -> list[str]:
    """Return one line per broken rule for sources given as {path relative to the repository: text}."""
    found: list[str] = []
    importers: dict[str, list[str]] = {name: [] for name in ONE_FILE_ONLY}
    for path, source in sorted(files.items()):
        place = path.split("/")[0]
        imports = imported_packages(source)
        if place in (*PACKAGES, SHARED):
            foreign = imports & (set(OWN) | {Path(entry).stem for entry in ENTRIES}) - {place, SHARED}
            found += [f"{path} imports the package {other}" for other in sorted(foreign)]
            found += [f"{path} imports {name}" for name in CONFIG_LIBRARIES if name in imports]
        elif place == "configs":
            found += [
                f"{path} imports the package {other}" for other in sorted(imports & {*PACKAGES, PIPELINE})
            ]
        for name in ONE_FILE_ONLY:
            if name in imports:
                importers[name].append(path)
    found += [
        f"{name} is imported in {len(paths)} files: {paths}"
        for name, paths in importers.items()
        if len(paths) > 1
    ]
    return found


def sources() -> dict[str, str]:
    """Return the text of every source file of the packages and the entries."""
    files = [file for package in OWN for file in sorted((REPOSITORY / package).rglob("*.py"))]
    files += [REPOSITORY / name for name in ENTRIES if (REPOSITORY / name).is_file()]
    return {file.relative_to(REPOSITORY).as_posix(): file.read_text(encoding="utf-8") for file in files}


def test_every_package_is_read() -> None:
    places = {path.split("/")[0] for path in sources()}
    assert set(OWN) <= places


def test_packages_do_not_import_each_other() -> None:
    assert violations(sources()) == []


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_is_short(entry: str) -> None:
    path = REPOSITORY / entry
    assert path.is_file(), f"{entry} is missing from the repository"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_ENTRY_LINES


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"quant/a.py": "import models"}, "quant/a.py imports the package models"),
        ({"quant/a.py": "def f():\n    from data.loader import x"}, "quant/a.py imports the package data"),
        ({"data/a.py": "from pipeline import run"}, "data/a.py imports the package pipeline"),
        ({"data/a.py": "import configs.schema"}, "data/a.py imports the package configs"),
        (
            {"models/a.py": "import importlib\nimportlib.import_module('deploy')"},
            "models/a.py imports the package deploy",
        ),
        ({"core/a.py": "from models.detector import Detector"}, "core/a.py imports the package models"),
        ({"training/a.py": "import quant"}, "training/a.py imports the package quant"),
        ({"report/a.py": "from omegaconf import OmegaConf"}, "report/a.py imports omegaconf"),
        ({"configs/a.py": "import quant"}, "configs/a.py imports the package quant"),
        (
            {"deploy/a.py": "import openvino", "deploy/b.py": "import openvino as ov"},
            "openvino is imported in 2 files",
        ),
    ],
)
def test_each_broken_rule_is_named(files: dict[str, str], expected: str) -> None:
    found = violations(files)
    assert len(found) == 1
    assert found[0].startswith(expected)


@pytest.mark.parametrize(
    "files",
    [
        {"pipeline/a.py": "import models, data, quant, training, deploy, report, hydra"},
        {"quant/a.py": "from core.errors import TraceError", "configs/b.py": "import core.names"},
        {"quant/a.py": "from quant.calibration.observers import MSE\nfrom . import graph\nimport torch"},
        {"train_qat.py": "from pipeline import run\nfrom configs import hydra_entry"},
    ],
)
def test_allowed_imports_pass(files: dict[str, str]) -> None:
    assert violations(files) == []
