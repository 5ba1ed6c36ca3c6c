"""Accuracy budget: the smallest set of units to leave in float so that the accuracy stays within a limit.

The order of sensitivity gives the candidates, the accuracy itself decides:

1. nothing float: where that is within the budget, there is nothing to do;
2. bisection over how many of the most sensitive units to leave float, until the shortest prefix that fits is found;
3. greedy confirmation: each unit of the prefix, the least sensitive first, is quantized again, and stays so where
   the accuracy is still within the budget.

Bisection takes the accuracy for monotonic in the length of the prefix. It is not quite (a unit's rounding errors can
cancel another's), so the result is confirmed by measurement at every step and small, but not proven smallest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quant.placement.placement import Placement

Measure = Callable[[frozenset[str]], float]  # units left float -> accuracy


@dataclass(frozen=True)
class Trial:
    """One measurement: how many units were float, and the accuracy."""

    num_float: int
    accuracy: float


@dataclass(frozen=True)
class BudgetResult:
    """What the search found.

    Attributes:
        units: units to leave float, the most sensitive first; empty where none is needed.
        accuracy: accuracy with these units float.
        met: whether that reaches the target.
        trials: all measurements, in order.
    """

    units: tuple[str, ...]
    accuracy: float
    met: bool
    trials: tuple[Trial, ...]


def search_budget(
    ranking: Sequence[str], measure: Measure, target: float, max_units: int | None = None
) -> BudgetResult:
    """Find a small set of units whose floating keeps the accuracy at or above a target.

    Args:
        ranking: all units, the most sensitive first.
        measure: accuracy with the given units in float and all others quantized.
        target: accuracy to reach.
        max_units: how many units may be float at most; None for all.

    Returns:
        The result; where even `max_units` float units miss the target, `met` is False and these are returned.
    """
    trials: list[Trial] = []
    known: dict[frozenset[str], float] = {}

    def accuracy_of(units: frozenset[str]) -> float:
        if units not in known:
            known[units] = measure(units)
            trials.append(Trial(len(units), known[units]))
        return known[units]

    def result(units: Sequence[str], met: bool) -> BudgetResult:
        return BudgetResult(tuple(units), accuracy_of(frozenset(units)), met, tuple(trials))

    if accuracy_of(frozenset()) >= target:
        return result((), True)
    most = len(ranking) if max_units is None else min(max_units, len(ranking))
    if accuracy_of(frozenset(ranking[:most])) < target:
        return result(ranking[:most], False)
    too_few, enough = 0, most
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if accuracy_of(frozenset(ranking[:middle])) >= target:
            enough = middle
        else:
            too_few = middle
    kept = list(ranking[:enough])
    for unit in reversed(ranking[:enough]):
        without = [other for other in kept if other != unit]
        if accuracy_of(frozenset(without)) >= target:
            kept = without
    return result(kept, True)


def without_units(placement: Placement, units: Sequence[str], reason: str) -> Placement:
    """The placement with some units left in float, and with them the weights of layers that read no other unit.

    All other groups stay as they are, so that a model inserted by the new placement computes what the old one
    computes with these units switched off.
    """
    groups = tuple(group for group in placement.groups if group.name not in set(units))
    feeding = {layer: group.name for group in reversed(groups) for layer in group.layers}
    weights = tuple(
        dataclasses.replace(site, group=feeding[site.layer])
        for site in placement.weights
        if site.layer in feeding
    )
    names = {group.name for group in groups}
    matmuls = tuple(site for site in placement.matmuls if names.issuperset(site.groups))
    lost = {site.layer: reason for site in placement.weights if site.layer not in feeding}
    lost |= {site.name: reason for site in placement.matmuls if site not in matmuls}
    return dataclasses.replace(
        placement,
        groups=groups,
        weights=weights,
        kept_float={**placement.kept_float, **lost},
        matmuls=matmuls,
    )
