"""Fixtures that all tests share."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real images, checkpoints and parity figures; the test is skipped where it is absent."""
    root = Path(os.environ.get("OCTET_TEST_DATA", REPOSITORY.parent / "shared"))
    if not (root / "data").is_dir():
        pytest.skip(
            f"no real test input at {root}: set OCTET_TEST_DATA to the folder that holds data/ and weights/"
        )
    return root
