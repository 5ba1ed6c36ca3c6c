"""List the licence of every package that Octet's environment holds: `python scripts/licences.py [--direct]`.

One line per package: name, version, licence as the package states it (its SPDX expression, else its classifiers, else
the first line of its licence field). `--direct` lists only what Octet itself asks for. The last line of stdout is the
number of packages that state none.
"""

from __future__ import annotations

import argparse
import re
from importlib.metadata import Distribution, distribution, distributions

MAX_LENGTH = 60


def stated_licence(package: Distribution) -> str | None:
    """The licence that a package's metadata state; None where they state none."""
    metadata = package.metadata
    expression = metadata.get("License-Expression")
    if expression:
        return str(expression)
    named = [
        classifier.rpartition(" :: ")[2]
        for classifier in metadata.get_all("Classifier") or []
        if classifier.startswith("License :: ") and classifier != "License :: OSI Approved"
    ]
    if named:
        return ", ".join(named)
    lines = [line.strip() for line in str(metadata.get("License") or "").splitlines() if line.strip()]
    return lines[0][:MAX_LENGTH] if lines and lines[0].upper() != "UNKNOWN" else None


def canonical(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Print the list."""
    parser = argparse.ArgumentParser(description="List the licences of the installed packages.")
    parser.add_argument("--direct", action="store_true", help="only what Octet itself asks for")
    options = parser.parse_args()
    packages = {canonical(package.metadata["Name"]): package for package in distributions()}
    if options.direct:
        wanted = [
            re.split(r"[^\w.-]", text)[0]
            for text in distribution("octet").requires or []
            if "extra ==" not in text
        ]
        packages = {name: packages[name] for name in map(canonical, wanted) if name in packages}
    found = {name: stated_licence(package) for name, package in sorted(packages.items())}
    for name, licence in found.items():
        print(f"{name}  {packages[name].version}  {licence or 'not stated'}")
    print(sum(licence is None for licence in found.values()))


if __name__ == "__main__":
    main()
