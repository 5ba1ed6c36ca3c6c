"""The comparisons with other tools end well where the tools are not there, as `make bench` has it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
COMPARISONS = ("compare_ptq.py", "compare_engines.py", "check_peers.py")


@pytest.mark.slow
@pytest.mark.parametrize("script", COMPARISONS)
def test_comparison_without_its_peers_is_skipped(script: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OCTET_")}
    empty = tmp_path / "python"  # an interpreter that sees no packages
    empty.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    empty.chmod(0o755)
    command = [sys.executable, str(REPOSITORY / "benchmarks" / script), "--nncf-python", str(empty)]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    first, *_, last = result.stdout.splitlines()
    assert first.startswith("skipped nncf: ")
    assert "cannot import it" in first
    assert last.startswith("skipped: ")
    assert list(tmp_path.iterdir()) == [empty]
