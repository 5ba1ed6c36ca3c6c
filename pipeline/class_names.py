"""Class names of weights and of data: the same order by name, or no figure at all.

Weights and data agree where class i means the same in both. Names that contradict this are acted on: data with the
same names in another order are renumbered, other names end the run, and `data.class_map=order` takes classes by their
number whatever they are called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.choices import BY_ORDER
from core.errors import DataError
from core.names import listing
from data import Dataset, class_positions, reorder_classes
from models import placeholder_names

SHOWN = 5


@dataclass(frozen=True)
class ClassNames:
    """Class names that data must fit.

    Attributes:
        owner: whose they are, for messages: a file, a split.
        names: by index.
    """

    owner: str
    names: tuple[str, ...]


def is_unnamed(names: Sequence[str]) -> bool:
    """Whether nobody has named the classes: class0, class1, ..., or 0, 1, ..."""
    return tuple(names) in (placeholder_names(len(names)), tuple(map(str, range(len(names)))))


def fit_classes(
    dataset: Dataset, source: str, wanted: ClassNames, class_map: str
) -> tuple[Dataset, str | None]:
    """A dataset whose classes are in the wanted order, and a sentence for the reader where that needed something.

    Args:
        dataset: the data.
        source: where it comes from, for messages.
        wanted: the names that it must fit.
        class_map: `names` or `order`, the setting `data.class_map`.

    Raises:
        DataError: another number of classes, or other names with `names`.
    """
    names = tuple(dataset.names)
    theirs, ours = listing(wanted.names, SHOWN), listing(names, SHOWN)
    if len(names) != len(wanted.names):
        raise DataError(
            f"{wanted.owner} has {len(wanted.names)} classes ({theirs}), but {source} has {len(names)} ({ours}): give "
            "weights and splits of the same classes, or map them with data.merge_classes"
        )
    if is_unnamed(wanted.names):
        return dataset, None
    positions = class_positions(names, wanted.names)
    if positions == list(range(len(names))):
        return dataset, None
    if class_map == BY_ORDER:
        return dataset, (
            f"Class names differ ({wanted.owner}: {theirs}; {source}: {ours}): matched by number "
            "(data.class_map=order)."
        )
    if positions is None:
        raise DataError(
            f"The classes of {wanted.owner} are {theirs}, those of {source} are {ours}: every figure would compare "
            "one class with another. Map the data's classes with data.merge_classes, or, if class 0 of one is class 0 "
            "of the other and so on, continue with data.class_map=order (--class-map order of pipeline.evaluate)"
        )
    return reorder_classes(dataset, wanted.names, positions), (
        f"Classes of {source} ({ours}) were renumbered to the order of {wanted.owner} ({theirs}) by name; "
        "data.class_map=order would match them by number."
    )
