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
    FamilyEntry(
        "yolov8",
        "models.families.yolov8:YOLOV8",
        detectors=("yolov8n", "yolov8s", "yolov8m", "yolov8l", "yolov8x"),
        segmenters=("yolov8n-seg", "yolov8s-seg", "yolov8m-seg", "yolov8l-seg", "yolov8x-seg"),
    ),
    FamilyEntry(
        "yolo11",
        "models.families.yolo11:YOLO11",
        detectors=("yolo11n", "yolo11s", "yolo11m", "yolo11l", "yolo11x"),
        segmenters=("yolo11n-seg", "yolo11s-seg", "yolo11m-seg", "yolo11l-seg", "yolo11x-seg"),
    ),
    FamilyEntry(
        "yolov5u",
        "models.families.yolov5u:YOLOV5U",
        detectors=("yolov5nu", "yolov5su", "yolov5mu", "yolov5lu", "yolov5xu"),
    ),
    FamilyEntry(
        "yolov10",
        "models.families.yolov10:YOLOV10",
        detectors=("yolov10n", "yolov10s", "yolov10m", "yolov10b", "yolov10l", "yolov10x"),
    ),
    FamilyEntry(
        "yolo12",
        "models.families.yolo12:YOLO12",
        detectors=("yolo12n", "yolo12s", "yolo12m", "yolo12l", "yolo12x"),
    ),
    FamilyEntry(
        "yolo26",
        "models.families.yolo26:YOLO26",
        detectors=("yolo26n", "yolo26s", "yolo26m", "yolo26l", "yolo26x"),
        segmenters=("yolo26n-seg", "yolo26s-seg", "yolo26m-seg", "yolo26l-seg", "yolo26x-seg"),
    ),
)
DETECTORS = tuple(name for family in FAMILIES for name in family.detectors)
SEGMENTERS = tuple(name for family in FAMILIES for name in family.segmenters)
ARCHITECTURES = (*DETECTORS, *SEGMENTERS)
