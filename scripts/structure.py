"""Print the import graph of each package: size, arrows, levels and cycles.

    python scripts/structure.py [--root DIR]

One line per package. `modules` counts files, `arrows` the pairs of modules of which one imports the other. A part is a
sub-package or a module of the package itself; `part arrows` lead from one part to another. `levels` is the number of
parts on the longest chain of imports, a cycle counting as one. Imports inside functions count, too.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

Graph = dict[str, set[str]]  # name -> names that it imports


def find_modules(package: Path) -> dict[str, Path]:
    """Return dotted module name -> file for every module of a package; `__init__.py` has the name of its folder."""
    modules = {}
    for file in sorted(package.rglob("*.py")):
        parts = (package.name, *file.relative_to(package).with_suffix("").parts)
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return modules


def imported(name: str, file: Path, modules: Iterable[str]) -> Iterator[str]:
    """Yield the modules of the same package that a module imports."""
    known = set(modules)
    base = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & known
        elif isinstance(node, ast.ImportFrom):
            above = base[: len(base) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                found = f"{source}.{alias.name}"
                yield from {found if found in known else source} & known


def module_graph(modules: dict[str, Path]) -> Graph:
    """Return which module imports which."""
    return {name: set(imported(name, file, modules)) - {name} for name, file in modules.items()}


def part_graph(modules: dict[str, Path]) -> Graph:
    """Return which part imports which; a part is a sub-package or a module of the package itself."""

    def part(name: str) -> str:
        return ".".join(name.split(".")[:2])

    graph: Graph = {part(name): set() for name in modules}
    for name, targets in module_graph(modules).items():
        graph[part(name)] |= {part(target) for target in targets} - {part(name)}
    return graph


def find_cycles(graph: Graph) -> list[list[str]]:
    """Return the groups of names that import each other, directly or through others."""

    def reachable(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    reach = {name: reachable(name) for name in graph}
    groups = {frozenset(other for other in reach[name] if name in reach[other]) for name in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def num_levels(graph: Graph) -> int:
    """Return the number of names on the longest chain of imports, a cycle counting as one."""
    group = {name: members[0] for members in find_cycles(graph) for name in members}
    merged: Graph = {group.get(name, name): set() for name in graph}
    for name, targets in graph.items():
        merged[group.get(name, name)] |= {group.get(target, target) for target in targets}

    @cache
    def level(name: str) -> int:
        return 1 + max((level(target) for target in merged[name] - {name}), default=0)

    return max(map(level, merged), default=0)


def count_arrows(graph: Graph) -> int:
    """Return the number of pairs of which one imports the other."""
    return sum(map(len, graph.values()))


def describe(package: Path) -> list[str]:
    """Return the table's cells of one package."""
    modules = find_modules(package)
    parts = part_graph(modules)
    cycles = "; ".join(", ".join(members) for members in find_cycles(parts)) or "-"
    num_lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in modules.values())
    figures = (num_lines, len(modules), count_arrows(module_graph(modules)), len(parts), count_arrows(parts))
    return [package.name, *map(str, figures), str(num_levels(parts)), cycles]


def main() -> None:
    """Print one Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    root = parser.parse_args().root
    headings = ["package", "lines", "modules", "arrows", "parts", "part arrows", "levels", "cycles"]
    rows = [
        describe(file.parent) for file in sorted(root.glob("*/__init__.py")) if file.parent.name != "tests"
    ]
    rows.append(["sum", *(str(sum(int(row[i]) for row in rows)) for i in range(1, 6)), "", ""])
    for row in (headings, ["---", *["---:"] * 6, "---"], *rows):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
