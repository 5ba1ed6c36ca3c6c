"""Saving a placement as YAML, and loading it back after it was edited by hand."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from core.choices import INTEGER
from core.errors import PlacementError
from core.grid import Grid
from quant.placement.placement import Group, MatmulSite, Placement, TensorSite, WeightSite
from quant.placement.policy import Rule


def dump_placement(placement: Placement) -> str:
    """The placement as YAML text that can be edited by hand."""
    content = _plain(asdict(placement))
    for entry in content["groups"]:
        grid = entry.pop("grid")
        entry |= {"bits": grid["bits"], "signed": grid["signed"], **_kind(grid)}
    for entry in content["weights"]:
        grid = entry.pop("grid")
        entry |= {"bits": grid["bits"], **_kind(grid)}
    return yaml.safe_dump(content, sort_keys=False, width=110)


def _kind(grid: dict[str, Any]) -> dict[str, str]:
    """The kind of a grid, which an entry names unless it is an integer grid."""
    return {} if grid["kind"] == INTEGER else {"grid": grid["kind"]}


def load_placement(path: Path) -> Placement:
    """Read a placement written by `dump_placement`.

    Raises:
        PlacementError: no such file, not YAML, keys that a placement does not have, or values out of range.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlacementError(
            f"{path} cannot be read ({error}): run the stage `place` first, or check quant.placement"
        ) from error
    return parse_placement(text, str(path))


def parse_placement(text: str, path: str) -> Placement:
    """Read the text of a placement; `path` says where it comes from.

    Raises:
        PlacementError: not YAML, keys that a placement does not have, or values out of range.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PlacementError(f"{path} is not YAML: {error}") from error
    try:
        groups = tuple(_group(entry) for entry in content["groups"])
        weights = tuple(_weight(entry) for entry in content["weights"])
        matmuls = tuple(_matmul(entry) for entry in content.get("matmuls", ()))
        return Placement(groups, weights, dict(content["kept_float"]), dict(content["concats"]), matmuls)
    except (KeyError, TypeError, ValueError) as error:
        raise PlacementError(
            f"{path} is not a placement ({error}): start from the placement.yaml of a run"
        ) from error


def _group(entry: dict[str, Any]) -> Group:
    entry = dict(entry)
    scale, bits, kind = entry.pop("scale", None), entry.pop("bits", 8), entry.pop("grid", INTEGER)
    scale = None if scale is None else float(scale)  # YAML takes 1e-3 for a string
    # the limits of a policy
    Rule(entry["name"], bits=bits, observer=entry.get("observer"), scale=scale, grid=kind)
    return Group(
        tensors=_sites(entry.pop("tensors")),
        layers=tuple(entry.pop("layers")),
        grid=Grid(bits, entry.pop("signed", True), kind=kind),
        scale=scale,
        **entry,
    )


def _weight(entry: dict[str, Any]) -> WeightSite:
    entry = dict(entry)
    bits, kind = entry.pop("bits"), entry.pop("grid", INTEGER)
    Rule(entry["layer"], bits=bits, grid=kind)
    return WeightSite(grid=Grid(bits, symmetric=True, kind=kind), **entry)


def _matmul(entry: dict[str, Any]) -> MatmulSite:
    first, second = entry["groups"]
    return MatmulSite(entry["name"], entry["node"], (first, second))


def _sites(sites: list[dict[str, Any]]) -> tuple[TensorSite, ...]:
    return tuple(TensorSite(site["name"], site["node"], tuple(site["users"])) for site in sites)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
