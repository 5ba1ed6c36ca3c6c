"""Costs by block and precision, and the latency of a plan that they add up to."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from statistics import median

from deploy.autotune.blocks import Blocks

Plan = Mapping[str, str]  # unit -> precision
State = tuple[str, ...]  # precisions of the units that touch a block
CANDIDATES = 50  # random mixtures, of which the one that shows most is built


class CostTable:
    """What each block costs in each state, from engines that were built with different plans.

    A state costs the median of the engines that had it; one that none had, the median of those seen states of the block
    that differ from it least.

    Args:
        blocks: the blocks, see `find_blocks`.
    """

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self._seen: dict[str, dict[State, list[float]]] = {block: {} for block in blocks.units}
        self._known: dict[tuple[str, State], float] = {}

    def add(self, plan: Plan, milliseconds: Mapping[str, float]) -> None:
        """Take in an engine: its plan, and the time of its blocks; a block without an entry takes none."""
        self._known.clear()
        for block in self.blocks.units:
            self._seen[block].setdefault(self.state(plan, block), []).append(milliseconds.get(block, 0.0))

    def state(self, plan: Plan, block: str) -> State:
        """Precisions of the units that touch a block."""
        return tuple(plan[unit] for unit in self.blocks.units[block])

    def cost(self, plan: Plan, block: str) -> float:
        """Milliseconds of one block in a plan."""
        state = self.state(plan, block)
        if (block, state) not in self._known:
            seen = self._seen[block]
            distances = {other: sum(a != b for a, b in zip(other, state, strict=True)) for other in seen}
            nearest = min(distances.values())
            values = [median(seen[other]) for other, distance in distances.items() if distance == nearest]
            self._known[block, state] = median(values)
        return self._known[block, state]

    def latency(self, plan: Plan) -> float:
        """Milliseconds of a plan: the sum over its blocks."""
        return sum(self.cost(plan, block) for block in self.blocks.units)


def plans_to_build(
    blocks: Blocks,
    options: Mapping[str, Sequence[str]],
    uniform: Sequence[Plan],
    count: int,
    seed: int = 0,
) -> list[dict[str, str]]:
    """Plans to build engines with: one precision throughout, then mixtures that show blocks in new states.

    Args:
        blocks: the blocks.
        options: unit -> what it can be.
        uniform: the plans with one precision throughout.
        count: number of mixtures at most; there are fewer where these show nothing new.
        seed: of the random mixtures.
    """
    generator = random.Random(seed)
    plans = [dict(plan) for plan in uniform]
    seen = {found for plan in plans for found in _states(blocks, plan)}
    for _ in range(count):
        mixtures = [
            {unit: generator.choice(names) for unit, names in options.items()} for _ in range(CANDIDATES)
        ]
        best = max(mixtures, key=lambda plan: len(_states(blocks, plan) - seen))
        if _states(blocks, best) <= seen:
            break
        plans.append(best)
        seen |= _states(blocks, best)
    return plans


def _states(blocks: Blocks, plan: Plan) -> set[tuple[str, State]]:
    """Every block with its state in a plan."""
    return {(block, tuple(plan[unit] for unit in units)) for block, units in blocks.units.items()}
