"""The budget search against additive and interacting costs whose best answer is known."""

from __future__ import annotations

import pytest

from core.grid import INT8_WEIGHTS
from quant.placement.placement import Group, Placement, TensorSite, WeightSite
from quant.sensitivity.budget import search_budget, without_units

COSTS = {"a": 0.010, "b": 0.006, "c": 0.003, "d": 0.001, "e": 0.0005}


def additive(float_units: frozenset[str]) -> float:
    """Every quantized unit costs its own amount of a perfect 1.0."""
    return 1.0 - sum(cost for unit, cost in COSTS.items() if unit not in float_units)


def test_nothing_is_left_float_where_the_budget_holds() -> None:
    result = search_budget(list(COSTS), additive, target=0.97)
    assert result.met
    assert result.units == ()
    assert len(result.trials) == 1


@pytest.mark.parametrize(
    ("target", "expected"), [(0.985, ("a",)), (0.9945, ("a", "b")), (0.9984, ("a", "b", "c"))]
)
def test_shortest_prefix_is_found(target: float, expected: tuple[str, ...]) -> None:
    result = search_budget(list(COSTS), additive, target)
    assert result.met
    assert result.units == expected
    assert result.accuracy == pytest.approx(additive(frozenset(expected)))


def test_wrong_ranking_is_corrected_by_the_greedy_step() -> None:
    result = search_budget(["e", "d", "a", "b", "c"], additive, target=0.985)
    assert result.units == ("a",)


def test_unreachable_target_says_so() -> None:
    result = search_budget(list(COSTS), additive, target=0.9999, max_units=2)
    assert not result.met
    assert result.units == ("a", "b")
    assert result.accuracy == pytest.approx(1.0 - 0.0045)


def test_no_set_is_measured_twice() -> None:
    asked: list[frozenset[str]] = []

    def measure(units: frozenset[str]) -> float:
        asked.append(units)
        return additive(units)

    search_budget(list(COSTS), measure, target=0.9984)
    assert len(asked) == len(set(asked))


def test_without_units_drops_a_group_and_its_layers_only() -> None:
    groups = (
        Group("x", (TensorSite("x", "x", ("first",)),), ("first",)),
        Group("y", (TensorSite("y", "y", ("second", "third")),), ("second", "third")),
    )
    weights = (
        WeightSite("first", 0, INT8_WEIGHTS, "x"),
        WeightSite("second", 0, INT8_WEIGHTS, "y"),
        WeightSite("third", 0, INT8_WEIGHTS, "y"),
    )
    left = without_units(Placement(groups, weights), ["y"], "accuracy budget")
    assert left.groups == groups[:1]
    assert left.weights == weights[:1]
    assert left.kept_float == {"second": "accuracy budget", "third": "accuracy budget"}
