"""From the names in `core.families` to the families themselves."""

import importlib

from core.families import ARCHITECTURES, FAMILIES, FamilyEntry
from core.names import closest_hint
from models.families.family import Family


def load_family(entry: FamilyEntry) -> Family:
    """Import the module that an entry names and return its family."""
    module, _, name = entry.definition.partition(":")
    family: Family = getattr(importlib.import_module(module), name)
    return family


def family_of(architecture: str) -> Family:
    """The family that an architecture belongs to.

    Raises:
        ValueError: If no family has it.
    """
    for entry in FAMILIES:
        if architecture in (*entry.detectors, *entry.segmenters):
            return load_family(entry)
    raise ValueError(
        f"Architecture {architecture!r} is unknown; expected one of {', '.join(ARCHITECTURES)}"
        + closest_hint(architecture, ARCHITECTURES)
    )
