"""docs/configuration.md says what the schema says, and every setting is described."""

from __future__ import annotations

import re
from pathlib import Path

from configs.deploy_schema import ExportConfig
from configs.describe import page
from configs.overrides import known_keys
from configs.schema import Config

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


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
