"""How one setting is declared: a dataclass field that carries its meaning, unit and limits."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import field
from typing import Any

MAX_SEED = 2**32 - 1  # NumPy's largest


def setting(
    default: Any,
    description: str,
    *,
    unit: str = "",
    choices: Collection[str] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    multiple: int | None = None,
    is_size: bool = False,
) -> Any:
    """Declare one field: its default, what it means, and the limits that `configs.validation` enforces.

    Args:
        default: The value without any YAML or command line; a list or dict is copied per instance.
        description: What the setting does, for the documentation.
        unit: Physical unit or scale, for the documentation ("pixels", "seconds", "images").
        choices: Allowed strings; for a list setting, allowed items. A registry is asked each time it is needed.
        minimum: Smallest allowed number (inclusive).
        maximum: Largest allowed number (inclusive).
        above: The number must be greater than this.
        multiple: The number must be divisible by this.
        is_size: An image size: one number for a square, or [height, width]; the limits hold for both.
    """
    metadata = {
        "description": description,
        "unit": unit,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "multiple": multiple,
        "is_size": is_size,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)
