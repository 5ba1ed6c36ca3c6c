"""Brings the classes of a dataset into the order of others: of weights, or of another split."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data.dataset import DetectionDataset
from data.samples import Dataset, Sample


def class_positions(names: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """Position of each of `names` in `wanted`; None where they are not the same names.

    Case and surrounding blanks do not count, unless names differ in nothing else.

    Example: `class_positions(["dog", "Cat"], ["cat", "dog"])` is `[1, 0]`.
    """
    for spelled in (str, lambda name: name.strip().casefold()):
        given, target = [spelled(name) for name in names], [spelled(name) for name in wanted]
        if len(set(given)) == len(given) and sorted(given) == sorted(target):
            return [target.index(name) for name in given]
    return None


def reorder_classes(dataset: Dataset, names: Sequence[str], positions: Sequence[int]) -> Dataset:
    """The same dataset with other class indices.

    Args:
        dataset: of K classes.
        names: what the K classes are called, in the new order.
        positions: new index of each old one.
    """
    table = np.array(positions, np.int64)
    if isinstance(dataset, DetectionDataset):
        records = [replace(record, labels=table[record.labels]) for record in dataset.records]
        return DetectionDataset(names, records, dataset.root, dataset.notes)
    return _Reordered(dataset, tuple(names), table)


class _Reordered:
    """A user's own dataset under other class indices."""

    def __init__(self, dataset: Dataset, names: tuple[str, ...], table: np.ndarray) -> None:
        self.dataset = dataset
        self.names = names
        self.ids = dataset.ids
        self.table = table

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        return replace(sample, labels=self.table[sample.labels])
