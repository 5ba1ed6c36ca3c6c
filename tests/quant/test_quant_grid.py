"""Grids: their codes against tables written down, rounding against a loop, and plans as files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from quant_networks import small_net

from core.errors import ConfigError, PlacementError
from core.grid import INT8, INT8_WEIGHTS, Grid
from quant import PlacementOptions, Rule, dump_placement, load_placement, place


@pytest.mark.parametrize(
    ("grid", "low", "high"),
    [
        (INT8, -128, 127),
        (INT8_WEIGHTS, -127, 127),
        (Grid(8, signed=False), 0, 255),
        (Grid(4), -8, 7),
        (Grid(4, signed=False), 0, 15),
        (Grid(4, symmetric=True), -7, 7),
        (Grid(2), -2, 1),
        (Grid(2, symmetric=True), -1, 1),
    ],
)
def test_codes_reach_from_low_to_high(grid: Grid, low: int, high: int) -> None:
    assert (grid.low, grid.high) == (low, high)
    x = torch.linspace(-400, 400, 3201)  # quarters: with halves that go to the even code
    wanted = [min(max(round(value), low), high) for value in x.tolist()]
    assert grid.codes(x, 1.0).tolist() == wanted
    assert grid.round(x * 0.25, torch.tensor(0.25)).tolist() == [0.25 * code for code in wanted]


def test_rounding_takes_a_scale_per_channel_and_leaves_its_input_alone() -> None:
    x = torch.randn(3, 5)
    before, scale = x.clone(), torch.tensor([[0.1], [0.2], [0.3]])
    found = Grid(4).round(x, scale)
    for row in range(3):
        assert torch.equal(found[row], Grid(4).round(x[row], scale[row]))
    assert torch.equal(x, before)


@pytest.mark.parametrize("bits", [1, 9, 16])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ConfigError, match=f"{bits} bits.*2 to 8"):
        Grid(bits)


def test_a_plan_is_a_file_with_bits_and_signs(tmp_path: Path) -> None:
    rules = (Rule("stem.act", bits=4), Rule("side.conv", bits=3))
    placement = place(small_net(), PlacementOptions(unsigned=True), rules)
    path = tmp_path / "placement.yaml"
    path.write_text(dump_placement(placement))
    assert load_placement(path) == placement
    content = yaml.safe_load(path.read_text())
    groups = {entry["name"]: (entry["bits"], entry["signed"]) for entry in content["groups"]}
    assert groups["input.x"] == (8, False)
    assert groups["stem.act"] == (4, True)
    assert {entry["layer"]: entry["bits"] for entry in content["weights"]}["side.conv"] == 3
    assert set(content["weights"][0]) == {"layer", "axis", "bits", "group"}
    content["groups"][0]["bits"] = 5
    path.write_text(yaml.safe_dump(content))
    assert load_placement(path).groups[0].grid == Grid(5, signed=False)
    content["weights"][0]["bits"] = 12
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(PlacementError, match="12 bits"):
        load_placement(path)
