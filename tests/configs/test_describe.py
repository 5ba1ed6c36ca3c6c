"""docs/configuration.md says what the schema says, and every setting is described."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from configs.deploy_schema import ExportConfig
from configs.describe import page
from configs.overrides import known_keys, open_keys
from configs.schema import Config

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENT = REPOSITORY / "docs" / "configuration.md"
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def test_the_page_is_up_to_date() -> None:
    written = DOCUMENT.read_text(encoding="utf-8")
    assert written == page(), "run: python -m configs.describe > docs/configuration.md"


def test_every_setting_has_a_line() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    described = set(re.findall(r"^\| `([\w.]+)` \| \w", text, flags=re.MULTILINE))
    leaves = [
        key
        for schema in (Config, ExportConfig)
        for key in known_keys(schema)
        if not any(other.startswith(f"{key}.") for other in known_keys(schema))
    ]
    assert len(leaves) > 90
    assert set(leaves) <= described


def test_a_few_lines_read_as_they_should() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert "| `data.image_size` | int or list | 640 | ≥ 32, ≤ 8192, multiple of 32 | Network input" in text
    assert "| `experiment` | str | required |" in text
    assert "| `quant.observer` | str | mse | minmax, percentile, mse, entropy |" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documentation_names_settings_that_exist(page: Path) -> None:
    """Of `section.key=value`, in the text and in commands."""
    known = set(known_keys(Config)) | set(known_keys(ExportConfig))
    free = open_keys(Config) | open_keys(ExportConfig)
    sections = {key for key in known if any(other.startswith(f"{key}.") for other in known)}
    top = "|".join(sorted(key for key in sections if "." not in key))
    named = set(re.findall(rf"(?<![\w./-])((?:{top})\.[a-z_]+(?:\.[a-z_]+)*)(?==)", page.read_text("utf-8")))
    unknown = {n for n in named - known if not any(n.startswith(f"{key}.") for key in free)}
    assert unknown == set()
