"""The import graph inside each package has no cycles between sub-packages, as scripts/structure.py counts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import networkx
import pytest

from scripts.structure import find_cycles, find_modules, module_graph, num_levels, part_graph

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("core", "models", "data", "quant", "training", "deploy", "report", "pipeline", "configs")


@pytest.mark.parametrize("package", PACKAGES)
def test_no_cycle_between_sub_packages(package: str) -> None:
    cycles = find_cycles(part_graph(find_modules(REPOSITORY / package)))
    assert cycles == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_cycle_between_modules(package: str) -> None:
    assert find_cycles(module_graph(find_modules(REPOSITORY / package))) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_levels_and_cycles_are_those_of_networkx(package: str) -> None:
    modules = find_modules(REPOSITORY / package)
    for graph in (module_graph(modules), part_graph(modules)):
        other = networkx.DiGraph((name, target) for name, targets in graph.items() for target in targets)
        other.add_nodes_from(graph)
        groups = (sorted(group) for group in networkx.strongly_connected_components(other) if len(group) > 1)
        assert find_cycles(graph) == sorted(groups)
        assert num_levels(graph) == networkx.dag_longest_path_length(networkx.condensation(other)) + 1


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of two sub-packages that import each other, one of them inside a function."""
    files = {
        "toy/__init__.py": "from toy.top import run\n",
        "toy/top.py": "import toy.left.one\nimport os\nfrom other import thing\n",
        "toy/left/__init__.py": "from .one import f\n",
        "toy/left/one.py": "from toy.right import two\n",
        "toy/right/__init__.py": "",
        "toy/right/two.py": "def f():\n    from ..left import one\n",
        "toy/right/three.py": "from . import two\nfrom toy.names import NAME\n",
        "toy/names.py": "NAME = 1\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "toy"


def test_every_form_of_import_is_an_arrow(package: Path) -> None:
    assert module_graph(find_modules(package)) == {
        "toy": {"toy.top"},
        "toy.top": {"toy.left.one"},
        "toy.left": {"toy.left.one"},
        "toy.left.one": {"toy.right.two"},
        "toy.right": set(),
        "toy.right.two": {"toy.left.one"},
        "toy.right.three": {"toy.right.two", "toy.names"},
        "toy.names": set(),
    }


def test_the_table_names_the_cycle(package: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "scripts/structure.py"), "--root", str(package.parent)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    # 11 lines in 8 modules, 7 arrows; parts toy, top, left, right, names; toy > top > {left, right} > names
    assert lines[2] == "| toy | 11 | 8 | 7 | 5 | 5 | 4 | toy.left, toy.right |"
