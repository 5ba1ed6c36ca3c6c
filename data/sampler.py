"""The order of the images of an epoch, and each process's share of it.

The sampler yields (epoch, index) pairs rather than indices: persistent workers learn the epoch with every item.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

Key = tuple[int, int]  # epoch, position in the dataset


class EpochSampler(Sampler[list[Key]]):
    """Yields the batches of one epoch as lists of (epoch, index).

    Args:
        indices: dataset positions to draw from.
        batch_size: images per batch.
        shuffle: draw a new order each epoch from (seed, epoch).
        seed: of the order.
        drop_last: leave out an incomplete last batch.
        rank: number of this process among `world_size`; it gets every `world_size`-th image. With
            `shuffle` all ranks get equally many images, some of them twice.
        world_size: number of processes.
        whole_batches: give each process every `world_size`-th batch instead of every such image, so that the batches
            are the same for any number of processes; one process may get none.
        split_batches: give each process every `world_size`-th image of each batch; `batch_size` is that of all of them
            together, and the batches are those of one process.
    """

    def __init__(
        self,
        indices: list[int],
        batch_size: int,
        shuffle: bool,
        seed: int,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        whole_batches: bool = False,
        split_batches: bool = False,
    ) -> None:
        self.indices = indices
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self.whole_batches = whole_batches
        self.split_batches = split_batches
        self.epoch = 0
        self.first_batch = 0

    def order(self) -> list[int]:
        """Dataset positions of this rank in the current epoch; with `split_batches`, those of all ranks."""
        if self.whole_batches:
            batches = [
                self.indices[i : i + self.batch_size] for i in range(0, len(self.indices), self.batch_size)
            ]
            return [index for batch in batches[self.rank :: self.world_size] for index in batch]
        if not self.shuffle:
            return self.indices[self.rank :: self.world_size]
        random = np.random.default_rng((self.seed, self.epoch))
        shuffled = [self.indices[i] for i in random.permutation(len(self.indices)).tolist()]
        if self.split_batches:
            return shuffled
        missing = -len(shuffled) % self.world_size
        return (shuffled + shuffled[:missing])[self.rank :: self.world_size]

    def num_batches(self) -> int:
        """Batches of a whole epoch, wherever it begins."""
        if self.whole_batches:
            return len(range(self.rank, -(-len(self.indices) // self.batch_size), self.world_size))
        if self.split_batches:
            size, count = self.batch_size, len(self.indices)
            return count // size if self.drop_last else -(-count // size)
        count = len(self.indices) + (-len(self.indices) % self.world_size if self.shuffle else 0)
        images = len(range(self.rank, count, self.world_size))
        return images // self.batch_size if self.drop_last else -(-images // self.batch_size)

    def __len__(self) -> int:
        return max(self.num_batches() - self.first_batch, 0)

    def __iter__(self) -> Iterator[list[Key]]:
        order = self.order()
        for batch in range(self.first_batch, self.num_batches()):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            if self.split_batches:
                chosen = chosen[self.rank :: self.world_size]
            yield [(self.epoch, index) for index in chosen]
