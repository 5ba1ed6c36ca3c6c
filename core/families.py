"""The model families by name: what the configuration offers and `models.families.registry` resolves.

Adding a family takes an entry here, the module that it names, and a test; a new size of a known family takes its name
here and its function in that module. `models.families.family.Family` says what the module defines.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FamilyEntry:
    """A model family, as names.

    Attributes:
        name: what the family is called.
        definition: `module:attribute` of its `models.families.family.Family`; imported when it is needed.
        detectors: architectures that detect.
        segmenters: architectures that also give masks.
    """

    name: str
    definition: str
    detectors: tuple[str, ...]
    segmenters: tuple[str, ...] = ()


FAMILIES = (
    FamilyEntry(
        "yolov9",
        "models.families.yolov9_family:YOLOV9",
        detectors=("yolov9t", "yolov9s", "yolov9m", "yolov9c", "yolov9e"),
        segmenters=("yolov9t-seg", "yolov9c-seg", "yolov9e-seg"),
    ),
)
DETECTORS = tuple(name for family in FAMILIES for name in family.detectors)
SEGMENTERS = tuple(name for family in FAMILIES for name in family.segmenters)
ARCHITECTURES = (*DETECTORS, *SEGMENTERS)
