"""Values of COCO JSON, checked where they enter.

Whatever writes COCO JSON writes numbers as text now and then, ids as names, and cells without a value. Each function
here returns a value of one known type or adds one fault, with the place, to the inventory. A number written as text is
taken for the number, and counted.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeGuard

from core.documents import shown
from core.names import listing
from data.inventory import Inventory

LARGEST_ID = 2**63 - 1
LARGEST_EXACT = 2**53  # whole numbers up to here are exact as float64
AS_TEXT = "{number} numbers are written as strings and were converted"

Id = int | str


def read_id(value: Any, place: str, inventory: Inventory) -> Id | None:
    """An identifier as the file has it: a whole number of any size, or a text; None, and a fault, for anything else.

    A whole number that went through a float (7.0) is that number as long as a float holds it exactly.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST_EXACT:
        return int(value)
    if isinstance(value, int | str) and not isinstance(value, bool):
        return value
    inventory.fault(f"{place} is {shown(value)}, expected an integer or a string.")
    return None


def number_images(keys: Sequence[Id], inventory: Inventory) -> tuple[list[int], list[Id]]:
    """Image ids as a dataset has them, and the file's ids in that order.

    They are the file's own, sorted; or 1, 2, ... in the file's order where one of them is not a number of 63 bits.
    """
    odd = [key for key in keys if not isinstance(key, int) or not 0 <= key <= LARGEST_ID]
    if not odd:
        ids = sorted(int(key) for key in keys)
        return ids, list(ids)
    inventory.note(
        "{number} image ids are not integers from 0 to 2^63 - 1: images are numbered 1 to "
        f"{len(keys)} in the file's order",
        listing(map(shown, odd), 3),
        len(odd),
        is_warning=False,
    )
    return list(range(1, len(keys) + 1)), list(keys)


def repeated(ids: Sequence[Id | None]) -> list[str]:
    """Ids that occur more than once, as texts."""
    return [shown(value) for value, count in Counter(ids).items() if count > 1 and value is not None]


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is a number, NaN and infinity included; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_float(value: int | float) -> float:
    """A number as float64; infinity for whole numbers that are too large for it."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def read_number(value: Any, place: str, inventory: Inventory) -> float | None:
    """A number, or a text that is one; None without a fault for anything else."""
    if is_number(value):
        return as_float(value)
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return None
        if math.isfinite(number):
            inventory.note(AS_TEXT, f"{place} is {shown(value)}")
            return number
    return None


def read_side(value: Any, place: str, inventory: Inventory) -> int | None:
    """Height or width in pixels; None where the file does not say, and with a fault where it is not a whole number."""
    if value is None:
        return None
    number = read_number(value, place, inventory)
    if number is None or not number.is_integer() or number < 1:
        inventory.fault(f"{place} is {shown(value)}, expected a whole number of pixels.")
        return None
    return int(number)


def read_crowd(value: Any, place: str, inventory: Inventory) -> bool:
    """`iscrowd`: 0 or 1, also as text or boolean; absent means 0."""
    if value is None or isinstance(value, bool):
        return bool(value)
    number = read_number(value, place, inventory)
    if number not in (0, 1):
        inventory.fault(f"{place} is {shown(value)}, expected 0 or 1.")
    return number == 1


def read_box(value: Any, place: str, inventory: Inventory) -> list[float] | None:
    """`bbox` as x, y, width, height; None and a fault where it is anything but four numbers."""
    if isinstance(value, list) and len(value) == 4:
        box = [read_number(side, place, inventory) for side in value]
        if None not in box:
            return [float(side) for side in box if side is not None]
    found = "missing" if value is None else shown(value)
    inventory.fault(f"{place} is {found}, expected four numbers: x, y, width, height in pixels.")
    return None


def read_area(value: Any, box: Sequence[float], place: str, inventory: Inventory) -> float:
    """`area` in square pixels; that of the box, counted, where the file has none that is positive and finite."""
    number = read_number(value, place, inventory)
    if number is not None and math.isfinite(number) and number > 0:
        return number
    if value is not None and value != 0:
        inventory.note(
            "{number} areas are not positive numbers; the areas of the boxes are used",
            f"{place} is {shown(value)}",
        )
    return box[2] * box[3]


def read_text(value: Any, place: str, inventory: Inventory) -> str:
    """A name: a text, or a number as text; empty, with a fault, for anything else."""
    if isinstance(value, str) and value.strip():
        return value
    if is_number(value):
        return shown(value)
    inventory.fault(f"{place} is {'missing' if value is None else shown(value)}, expected a string.")
    return ""
