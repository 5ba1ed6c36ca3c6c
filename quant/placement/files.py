"""Saving a placement as YAML, and loading it back after it was edited by hand."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import yaml

from core.choices import INTEGER
from core.documents import DocumentError, parse_yaml, read_limited, shown
from core.errors import PlacementError
from core.grid import Grid
from quant.placement.placement import Group, MatmulSite, Placement, TensorSite, WeightSite
from quant.placement.policy import Rule

Value = TypeVar("Value")
_KINDS = {dict: "a map", list: "a list", str: "a name", int: "a whole number", bool: "true or false"}


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
        text = read_limited(path).decode("utf-8")
    except (OSError, UnicodeDecodeError, DocumentError) as error:
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
        content = parse_yaml(text)
    except DocumentError as error:
        raise PlacementError(
            f"{path} cannot be read: {error}. Correct it, or remove it: the stage `place` of its run writes it again"
        ) from error
    try:
        groups = tuple(_group(entry) for entry in _typed(content["groups"], list, "groups"))
        weights = tuple(_weight(entry) for entry in _typed(content["weights"], list, "weights"))
        matmuls = tuple(_matmul(entry) for entry in _typed(content.get("matmuls", []), list, "matmuls"))
        kept_float = _mapped(content["kept_float"], str, "kept_float")
        placement = Placement(
            groups, weights, kept_float, _mapped(content["concats"], bool, "concats"), matmuls
        )
        _check_references(placement)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlacementError(
            f"{path} is not a placement ({error}): start from the placement.yaml of a run"
        ) from error
    return placement


def _group(entry: Any) -> Group:
    entry = dict(_typed(entry, dict, "a group"))
    name = _typed(entry["name"], str, "name of a group")
    scale, bits, kind = entry.pop("scale", None), entry.pop("bits", 8), entry.pop("grid", INTEGER)
    scale = None if scale is None else float(scale)  # YAML takes 1e-3 for a string
    _typed(bits, int, f"bits of {name}")
    signed = _typed(entry.pop("signed", True), bool, f"signed of {name}")
    # the limits of a policy
    Rule(
        name,
        bits=bits,
        observer=entry.get("observer"),
        scale=scale,
        grid=_typed(kind, str, f"grid of {name}"),
    )
    return Group(
        tensors=_sites(entry.pop("tensors"), name),
        layers=_names(entry.pop("layers"), f"layers of {name}"),
        grid=Grid(bits, signed, kind=kind),
        scale=scale,
        **entry,
    )


def _weight(entry: Any) -> WeightSite:
    entry = dict(_typed(entry, dict, "a weight"))
    layer = _typed(entry["layer"], str, "layer of a weight")
    bits, kind = entry.pop("bits"), entry.pop("grid", INTEGER)
    _typed(bits, int, f"bits of {layer}")
    _typed(entry["axis"], int, f"axis of {layer}")
    _typed(entry["group"], str, f"group of {layer}")
    Rule(layer, bits=bits, grid=_typed(kind, str, f"grid of {layer}"))
    return WeightSite(grid=Grid(bits, symmetric=True, kind=kind), **entry)


def _matmul(entry: Any) -> MatmulSite:
    entry = _typed(entry, dict, "a matmul")
    name, node = (
        _typed(entry["name"], str, "name of a matmul"),
        _typed(entry["node"], str, "node of a matmul"),
    )
    first, second = _names(entry["groups"], f"groups of {name}")
    return MatmulSite(name, node, (first, second))


def _sites(sites: Any, group: str) -> tuple[TensorSite, ...]:
    entries = [
        _typed(site, dict, f"a tensor of {group}") for site in _typed(sites, list, f"tensors of {group}")
    ]
    return tuple(
        TensorSite(
            _typed(site["name"], str, f"name of a tensor of {group}"),
            _typed(site["node"], str, f"node of a tensor of {group}"),
            _names(site["users"], f"users of a tensor of {group}"),
        )
        for site in entries
    )


def _typed(value: Any, kind: type[Value], what: str) -> Value:
    """The value where it is of that type (True and False are not numbers); TypeError that names it otherwise."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{what} is {shown(value)}, expected {_KINDS[kind]}")
    return value


def _names(value: Any, what: str) -> tuple[str, ...]:
    return tuple(_typed(name, str, f"one of the {what}") for name in _typed(value, list, what))


def _mapped(value: Any, kind: type[Value], what: str) -> dict[str, Value]:
    entries = _typed(value, dict, what).items()
    return {
        _typed(key, str, f"a key of {what}"): _typed(item, kind, f"{what} of {shown(key)}")
        for key, item in entries
    }


def _check_references(placement: Placement) -> None:
    """Refuse two groups of one name, and layers or products that read a group which is not there."""
    names = [group.name for group in placement.groups]
    known = set(names)
    if len(known) < len(names):
        raise ValueError(f"two groups are called {next(name for name in names if names.count(name) > 1)!r}")
    readers = [(f"layer {site.layer!r}", site.group) for site in placement.weights]
    readers += [(f"matmul {site.name!r}", name) for site in placement.matmuls for name in site.groups]
    for reader, name in readers:
        if name not in known:
            raise ValueError(f"{reader} reads the group {shown(name)}, which is not among the groups")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
