"""The Pareto front of latency against accuracy loss over plans: which precision every unit gets.

Each weight w of the loss asks for the plan with the least latency + w * loss. It is found by improving a plan that is
there: a unit, or a unit and its neighbours in the graph, is set to another precision wherever that lowers the sum,
until nothing does. Neighbours move together because a single unit may cost conversions that a run of them does not.

The weights come from the plans (Aneja and Nair 1979, doi:10.1287/mnsc.25.1.73): between the fastest and the most
accurate plan, the weight at which both are equally good either shows a better one, and the search continues between it
and each of the two, or shows that there is none. Where no block depends on two units, every plan of the front's convex
hull is found; otherwise the improvement may miss one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from deploy.autotune.costs import CostTable, Plan

MOST_WEIGHTS = 60  # weights of the loss that are tried
SMALLEST_GAIN = 1e-9  # of latency + weight * loss, in milliseconds
DISTANCES = 3  # largest distance of neighbours that move together


@dataclass(frozen=True)
class Point:
    """A plan with its latency and its loss of accuracy, both estimates.

    Attributes:
        plan: unit -> precision.
        milliseconds: latency.
        loss: accuracy loss, in the unit of the losses that the search was given.
    """

    plan: Plan
    milliseconds: float
    loss: float

    def weighted(self, weight: float) -> float:
        """Latency + weight * loss."""
        return self.milliseconds + weight * self.loss


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """Points that no other one beats: the fastest first, each next one slower and with less loss."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.milliseconds, point.loss)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front


class Search:
    """The search over one network.

    Args:
        table: costs of its blocks.
        losses: unit -> precision -> accuracy loss, at least 0; every unit may have any precision that is named here.
    """

    def __init__(self, table: CostTable, losses: Mapping[str, Mapping[str, float]]) -> None:
        self.table = table
        self.losses = losses
        self.touched: dict[str, list[str]] = {unit: [] for unit in losses}  # unit -> blocks
        for block, units in table.blocks.units.items():
            for unit in units:
                self.touched[unit].append(block)
        self.neighbourhoods = {unit: self._neighbourhoods(unit) for unit in losses}

    def front(self) -> list[Point]:
        """The front: plans of one precision throughout count as found, too."""
        precisions = dict.fromkeys(name for options in self.losses.values() for name in options)
        uniform = [{unit: self._nearest(unit, name) for unit in self.losses} for name in precisions]
        found = [self.point(plan) for plan in uniform]
        total = math.fsum(max(options.values()) for options in self.losses.values())
        heavy = 1e6 * max(point.milliseconds for point in found) / total if total else 1.0
        pending = deque([(self._best(found, 0.0), self._best(found, heavy))])
        found += pending[0]
        for _ in range(MOST_WEIGHTS):
            if not pending:
                break
            fast, slow = pending.popleft()
            if fast.loss <= slow.loss:
                continue
            weight = (slow.milliseconds - fast.milliseconds) / (fast.loss - slow.loss)
            middle = self._best([*found[: len(uniform)], fast, slow], weight)
            if middle.weighted(weight) < fast.weighted(weight) - SMALLEST_GAIN:
                found.append(middle)
                pending += [(fast, middle), (middle, slow)]
        return pareto_front(found)

    def _best(self, starts: Iterable[Point], weight: float) -> Point:
        """The best plan for one weight that some plans can be improved to."""
        found = [self.point(self._improve(dict(start.plan), weight)) for start in starts]
        return min(found, key=lambda point: point.weighted(weight))

    def point(self, plan: Plan) -> Point:
        """A plan with its estimates."""
        loss = math.fsum(self.losses[unit][precision] for unit, precision in plan.items())
        return Point(dict(plan), self.table.latency(plan), loss)

    def change(self, plan: Plan, changes: Mapping[str, str]) -> tuple[float, float]:
        """What some changes of precision do to latency and loss."""
        after = {**plan, **changes}
        blocks = dict.fromkeys(block for unit in changes for block in self.touched[unit])
        milliseconds = sum(self.table.cost(after, block) - self.table.cost(plan, block) for block in blocks)
        loss = sum(self.losses[unit][name] - self.losses[unit][plan[unit]] for unit, name in changes.items())
        return milliseconds, loss

    def _improve(self, plan: dict[str, str], weight: float) -> dict[str, str]:
        """Change units, alone and with neighbours, as long as latency + weight * loss falls."""
        improved = True
        while improved:
            improved = False
            for unit in self.losses:
                for precision in self.losses[unit]:
                    for group in self.neighbourhoods[unit]:
                        changes = {
                            other: precision
                            for other in group
                            if precision in self.losses[other] and plan[other] != precision
                        }
                        milliseconds, loss = self.change(plan, changes)
                        if milliseconds + weight * loss < -SMALLEST_GAIN:
                            plan.update(changes)
                            improved = True
        return plan

    def _nearest(self, unit: str, precision: str) -> str:
        """The precision where the unit may have it, else the one with the least loss."""
        options = self.losses[unit]
        return precision if precision in options else min(options, key=lambda name: options[name])

    def _neighbourhoods(self, unit: str) -> Sequence[tuple[str, ...]]:
        """The unit alone, with the units that share a block with it, with the units that share one with these, ..."""
        groups = [dict.fromkeys([unit])]
        for _ in range(DISTANCES):
            blocks = dict.fromkeys(block for other in groups[-1] for block in self.touched[other])
            groups.append(
                dict.fromkeys(other for block in blocks for other in self.table.blocks.units[block])
            )
        return list(dict.fromkeys(tuple(group) for group in groups))
