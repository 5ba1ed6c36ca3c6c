"""Parses the text files of YOLO labels, and finds out whether their columns are what they are taken for.

A line of five numbers is a box, a longer one an outline. Three other kinds of file fit one of the two by their length:
keypoints (a box, then points), the output of a tracker (a box, confidence, identity), and boxes given by their corners.
None of them is an error in any single line, so the lines of a whole split are looked at together.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.documents import shown
from core.errors import DataError
from data.formats.corners import Corners
from data.inventory import DUPLICATES, Inventory
from data.masks import Outlines
from data.text import read_text

TOLERANCE = 0.01  # how far a fraction may leave [0, 1] by rounding before it is taken for a pixel value
BOX = 5  # columns: class, centre x, centre y, width, height
TRACKER = 7  # a box, confidence, identity
MAX_LABEL_BYTES = 16 * 2**20  # of one file
MAX_OBJECTS = 100_000  # of one image
MAX_LINE = 2**20  # characters
FAULTS_PER_FILE = 100  # more lines than these are counted, not listed
KEYPOINT_SHARE = 0.8  # of the long lines that must read as keypoints before they are taken for such
LEAST_AMONG_BOXES = 3  # one outline in six reads as keypoints by chance
LENGTHS_SHOWN = 6
PLACES_SHOWN = 3

Columns = tuple[int, int]  # points of an object, values of each: `kpt_shape`
Parsed = tuple[int, tuple[float, float, float, float], list[float]]


@dataclass
class Labels:
    """Objects of one image, as fractions of its size.

    Attributes:
        classes: of each.
        boxes: x1, y1, x2, y2 of each.
        points: outline x, y, x, y, ... of each; empty for a box.
    """

    classes: list[int] = field(default_factory=list)
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    points: list[list[float]] = field(default_factory=list)

    def in_pixels(self, size: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Classes [N] and boxes [N, 4], clipped to an image of that (height, width)."""
        scale = np.array([size[1], size[0], size[1], size[0]], np.float64)
        corners = np.array(self.boxes, np.float64).reshape(-1, 4).clip(0, 1) * scale
        return np.array(self.classes, np.int64), corners

    def outlines(self, size: tuple[int, int]) -> list[Outlines]:
        """The one polygon of each object, in pixels."""
        return [[np.array(points, np.float64).reshape(-1, 2) * (size[1], size[0])] for points in self.points]


class LabelReader:
    """Reads the label files of one split.

    Args:
        num_classes: K; classes are whole numbers below it.
        keypoints: `kpt_shape` of the data.yaml; None where the file has none. (0, 0) says that long lines are outlines.
        segments: every object must have an outline.
        inventory: gets faults and counts.
    """

    def __init__(
        self, num_classes: int, keypoints: Columns | None, segments: bool, inventory: Inventory
    ) -> None:
        self.num_classes = num_classes
        self.keypoints = keypoints
        self.is_pose = keypoints is not None and all(keypoints)
        self.segments = segments
        self.inventory = inventory
        self.columns: Counter[int] = Counter()
        self.first: dict[int, list[str]] = {}  # places of the first lines of each length
        self.like_keypoints: Counter[int] = Counter()
        self.corners = Corners("fractions of centre x, centre y, width, height")

    def read(self, file: Path) -> Labels:
        """Parse one file; lines that cannot be used become faults with file and line."""
        labels = Labels()
        seen: set[tuple[float, ...]] = set()
        try:
            lines = read_text(file, MAX_LABEL_BYTES).splitlines()
        except DataError as error:
            self.inventory.fault(str(error))
            return labels
        if len(lines) > MAX_OBJECTS or max(map(len, lines), default=0) > MAX_LINE:
            self.inventory.fault(
                f"{file} has {len(lines)} lines, the longest of {max(map(len, lines))} characters; at most "
                f"{MAX_OBJECTS} of {MAX_LINE} are read: is it the label file of one image?"
            )
            return labels
        faults = 0
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{file} line {number}"
            try:
                parsed = self._parse(line, place)
            except DataError as error:
                faults += 1
                if faults <= FAULTS_PER_FILE:
                    self.inventory.fault(str(error))
                continue
            if parsed is None:
                continue
            label, box, points = parsed
            key = (label, *box, *points)
            if key in seen:
                self.inventory.note(DUPLICATES, place)
                continue
            seen.add(key)
            labels.classes.append(label)
            labels.boxes.append(box)
            labels.points.append(points)
        if faults > FAULTS_PER_FILE:
            self.inventory.fault(f"{file}: {faults - FAULTS_PER_FILE} more lines that cannot be used.")
        return labels

    def _parse(self, line: str, place: str) -> Parsed | None:
        """Class, box as corners, and the outline x y x y ..., empty where there is none; None for a wrong length."""
        try:
            first, *values = (float(word) for word in line.split())
        except ValueError as error:
            raise DataError(
                f"{place}: {shown(line.strip())} holds something that is not a number."
            ) from error
        count = len(values) + 1
        self.columns[count] += 1
        places = self.first.setdefault(count, [])
        if len(places) < PLACES_SHOWN:
            places.append(place)
        if not self._is_length(count):
            return None
        if not (first.is_integer() and 0 <= first < self.num_classes):
            raise DataError(
                f"{place}: class {first:g} is out of range, expected a whole number from 0 to "
                f"{self.num_classes - 1} ({self.num_classes} names). Correct the label or the names."
            )
        if count > BOX and self.keypoints is None and reads_as_keypoints(values):
            self.like_keypoints[count] += 1
        used = values[:4] if self.is_pose else values
        if any(value < -TOLERANCE or value > 1 + TOLERANCE for value in used):
            raise DataError(
                f"{place}: {shown(line.strip())} leaves the range 0 to 1. Boxes are fractions of the image "
                "size, not pixels."
            )
        if len(used) == 4:
            if self.segments:
                self._refuse_without_outline(place)
            x, y, width, height = used
            if not self.segments:
                self.corners.add(used, _leaves(x, width) or _leaves(y, height), place)
            return int(first), (x - width / 2, y - height / 2, x + width / 2, y + height / 2), []
        xs, ys = values[0::2], values[1::2]
        return int(first), (min(xs), min(ys), max(xs), max(ys)), values

    def _is_length(self, count: int) -> bool:
        if self.is_pose and self.keypoints:
            return count in (BOX, BOX + self.keypoints[0] * self.keypoints[1])
        return count == BOX or (count >= TRACKER and count % 2 == 1)

    def _refuse_without_outline(self, place: str) -> None:
        kind = "keypoints (kpt_shape)" if self.is_pose else "a box"
        raise DataError(
            f"{place}: {kind} without an outline. A segmentation network needs one for every object: class x y x y ... "
            "as fractions; add it, or use a detection network."
        )

    def finish(self) -> None:
        """Look at the lines of all files together; adds a fault for each other meaning that they have."""
        faults = [self._wrong_length(count) for count in sorted(self.columns) if not self._is_length(count)]
        long = [count for count in self.columns if count > BOX and self._is_length(count)]
        if len(long) == 1 and self._are_keypoints(long[0]):
            faults.append(self._other_meaning(long[0]))
        self.inventory.faults[:0] = faults
        self.corners.check(self.inventory)

    def _are_keypoints(self, count: int) -> bool:
        """Whether the long lines, all of one length, read as keypoints; among boxes two may do so by chance."""
        number = self.columns[count]
        few = number < LEAST_AMONG_BOXES and BOX in self.columns
        return not few and self.like_keypoints[count] >= KEYPOINT_SHARE * number

    def _counts(self) -> str:
        counts = [f"{count} in {number} lines" for count, number in self.columns.most_common(LENGTHS_SHOWN)]
        return f"Values per line: {', '.join(counts)}."

    def _wrong_length(self, count: int) -> str:
        place, *others = self.first[count]
        if self.is_pose and self.keypoints:
            points, each = self.keypoints
            pose = f"{BOX + points * each} (class, box, {points} keypoints of {each} values: kpt_shape)"
            expected = f"{pose} or {BOX} (class, box)"
        else:
            expected = (
                "5 (class, centre x, centre y, width, height) or a class followed by at least three points"
            )
        hint = ""
        if count == BOX + 1:
            hint = " A sixth value is what detectors write as confidence."
        elif count > TRACKER and not self.is_pose:
            hint = " Keypoints need kpt_shape in data.yaml."
        also = f" Also {', '.join(others)}." if others else ""
        return f"{place}: {count} values, expected {expected}.{hint}{also} {self._counts()}"

    def _other_meaning(self, count: int) -> str:
        kind = "a box with keypoints"
        if count == TRACKER:
            kind = "tracker output (class, box, confidence, identity) or one keypoint"
        shapes = [f"[{(count - BOX) // each}, {each}]" for each in (2, 3) if not (count - BOX) % each]
        return (
            f"{self.first[count][0]}: {count} values that read as {kind}, not as an outline. Say in data.yaml what "
            f"they are: kpt_shape: {' or '.join(shapes)} for keypoints (the boxes are then used), kpt_shape: [0, 0] "
            f"for outlines; reduce a tracker's lines to 5 values. {self._counts()}"
        )


def reads_as_keypoints(values: Sequence[float]) -> bool:
    """Whether the numbers after a class read as a box inside the image, and then points inside the box.

    Points of three values have a visibility of 0, 1 or 2; a point at 0, 0 is one that nobody marked. Points of two
    values must span a quarter of the box, in width or height, where there are three or more. Two values are also taken
    for a tracker's confidence and identity where the second is a whole number.
    """
    x, y, width, height, *rest = values
    if not (width > 0 and height > 0) or _leaves(x, width) or _leaves(y, height):
        return False
    if len(rest) == 2 and rest[1].is_integer() and 0 <= rest[0] <= 1:
        return True
    for each in (2, 3):
        if len(rest) % each:
            continue
        if each == 3 and not all(value in (0, 1, 2) for value in rest[2::3]):
            continue
        points = [point for point in zip(rest[0::each], rest[1::each], strict=True) if any(point)]
        if not points:
            return True
        if _within(points, x, width, 0) and _within(points, y, height, 1):
            spans = [max(p[axis] for p in points) - min(p[axis] for p in points) for axis in (0, 1)]
            if each == 3 or len(points) < 3 or spans[0] >= width / 4 or spans[1] >= height / 4:
                return True
    return False


def _within(points: Sequence[tuple[float, ...]], center: float, side: float, axis: int) -> bool:
    reach = side / 2 * 1.1 + TOLERANCE
    return all(abs(point[axis] - center) <= reach for point in points)


def _leaves(center: float, side: float) -> bool:
    return center - side / 2 < -2 * TOLERANCE or center + side / 2 > 1 + 2 * TOLERANCE
