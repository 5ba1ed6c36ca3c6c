"""The pins and the declared packages: complete, exact, and free of addresses."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("core", "models", "data", "quant", "training", "deploy", "report", "pipeline", "configs")
INSTALLED_BY = {"tensorrt_rtx": ["tensorrt-rtx-cu12"]}  # which requires the package that has the module
USERS_OWN = {"tensorrt", "tensorrt_bindings"}  # comes from NVIDIA, never from the package index


def normal(name: str) -> str:
    """Return a package name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


PINS = [
    line
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
PINNED = {normal(pin.split("==")[0]) for pin in PINS}
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    return {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}  # type: ignore[index]


@pytest.mark.parametrize("pin", PINS)
def test_a_pin_is_exact_and_has_no_address(pin: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!+_-]*", pin), pin


def test_every_pin_has_one_hash() -> None:
    lines = [
        line for line in (REPOSITORY / "hashes.txt").read_text().splitlines() if not line.startswith("#")
    ]
    matches = [re.fullmatch(r"(\S+)==(\S+) --hash=sha256:[0-9a-f]{64}", line) for line in lines]
    assert all(matches)
    found = [f"{normal(match[1])}=={match[2]}" for match in matches if match]
    assert sorted(found) == sorted(f"{normal(pin.split('==')[0])}=={pin.split('==')[1]}" for pin in PINS)


def test_everything_declared_is_pinned() -> None:
    declared = names(PROJECT["dependencies"])
    for extra in PROJECT["optional-dependencies"].values():
        declared |= names(extra)
    assert declared - PINNED == set()


def test_everything_imported_by_the_packages_is_declared() -> None:
    providers = packages_distributions()
    extras = [needs for extra, needs in PROJECT["optional-dependencies"].items() if extra != "dev"]
    declared = names(PROJECT["dependencies"]).union(*map(names, extras))
    files = [file for package in PACKAGES for file in (REPOSITORY / package).rglob("*.py")]
    files += [REPOSITORY / entry for entry in ("train_qat.py", "export.py") if (REPOSITORY / entry).is_file()]
    missing: dict[str, list[str]] = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            for module in {name.split(".")[0] for name in modules}:
                if module in sys.stdlib_module_names or module in PACKAGES or module in USERS_OWN:
                    continue
                offered = {
                    normal(name) for name in [*providers.get(module, [module]), *INSTALLED_BY.get(module, ())]
                }
                if not offered & declared:
                    missing.setdefault(module, []).append(file.relative_to(REPOSITORY).as_posix())
    assert missing == {}
