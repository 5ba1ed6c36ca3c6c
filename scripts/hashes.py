"""Write `hashes.txt`, the pins with the hash of each file, from a report of pip.

    python -m pip install --dry-run --ignore-installed --no-deps --requirement constraints.txt --report report.json
    python scripts/hashes.py report.json > hashes.txt

`make setup HASHES=1` installs from it; pip refuses a file that has another hash. The hashes are of the files for Linux
x86-64 and Python 3.11, as the pins are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HEAD = (
    "# The pins of constraints.txt with the SHA-256 of each file, made by scripts/hashes.py.\n"
    "# make setup HASHES=1 installs from it."
)


def main() -> int:
    """Print the file; returns the exit code."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    print(HEAD)
    for package in sorted(json.loads(Path(sys.argv[1]).read_text())["install"], key=_name):
        digest = package["download_info"]["archive_info"]["hashes"]["sha256"]
        print(f"{_name(package)}=={package['metadata']['version']} --hash=sha256:{digest}")
    return 0


def _name(package: dict[str, dict[str, str]]) -> str:
    return package["metadata"]["name"].lower()


if __name__ == "__main__":
    sys.exit(main())
