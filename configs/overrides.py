"""Read the command line before Hydra does: a slip of the finger ends in a suggestion, not in a traceback.

Hydra's grammar is left to Hydra's own parser. This file knows three things about an override: whether its
key is a setting of the schema, whether it is a group of the tree, and which options that group has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from core.errors import ConfigError
from core.names import closest

_NO_GROUPS = {"__pycache__", "hydra"}


def known_keys(schema: type) -> list[str]:
    """Return the dotted names of all settings of a dataclass, sections included, in the schema's order."""
    hints = get_type_hints(schema)
    keys: list[str] = []
    for field in dataclasses.fields(schema):
        keys.append(field.name)
        inner = hints[field.name]
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            keys += [f"{field.name}.{key}" for key in known_keys(inner)]
    return keys


def open_keys(schema: type) -> set[str]:
    """Return the dotted names of the dict settings, below which every key is allowed."""
    keys: set[str] = set()
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        inner = hints[field.name]
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            keys |= {f"{field.name}.{key}" for key in open_keys(inner)}
        elif "dict[" in str(inner):
            keys.add(field.name)
    return keys


def groups(config_dirs: Iterable[Path]) -> dict[str, list[str]]:
    """Return every group of the trees with its sorted options: `{"model": ["auto", "yolov9t", ...], ...}`."""
    found: dict[str, set[str]] = {}
    for root in config_dirs:
        for file in sorted(Path(root).glob("*/*.yaml")):
            if file.parent.name not in _NO_GROUPS:
                found.setdefault(file.parent.name, set()).add(file.stem)
    return {name: sorted(options) for name, options in sorted(found.items())}


def experiments(config_dirs: Iterable[Path]) -> list[str]:
    """Return the names that `+experiment=` accepts."""
    return groups(config_dirs).get("experiment", [])


def check_overrides(overrides: Sequence[str], schema: type, config_dirs: Sequence[Path]) -> None:
    """Raise ConfigError for the first override that names no setting, no group or no option.

    Args:
        overrides: The command line without flags, e.g. `["+experiment=demo", "train.epochs=3"]`.
        schema: Dataclass that the settings belong to.
        config_dirs: Roots whose folders are the groups.
    """
    parser = OverridesParser.create()
    tree = groups(config_dirs) if "model" in known_keys(schema) else {}
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise ConfigError(
                f"'{text}' cannot be read: expected KEY=VALUE (quote values with spaces or commas)."
            ) from error
        if not override.is_hydra_override():
            _check_key(override, schema, tree)


def _check_key(override: Override, schema: type, tree: dict[str, list[str]]) -> None:
    key = override.key_or_group
    group_name = key.split("@")[0].strip("/")
    if group_name in tree:
        _check_option(override, group_name, tree)
        return
    if any(key == name or key.startswith(f"{name}.") for name in open_keys(schema)):
        if not (override.is_add() or override.is_force_add() or override.is_delete()):
            raise ConfigError(
                f"'{override.input_line}' adds keys of your own; write '+{override.input_line}'."
            )
        return
    keys = known_keys(schema)
    if key in keys:
        return
    near = closest(key, [*keys, *tree])
    named = "+experiment" if near == "experiment" else near
    remedy = f"closest: {named}." if named else "docs/configuration.md lists all keys."
    raise ConfigError(f"Unknown key '{key}' in '{override.input_line}'; {remedy}")


def _check_option(override: Override, group: str, tree: dict[str, list[str]]) -> None:
    """Check the chosen option(s) of a group, and that an experiment is added with a plus sign."""
    text = str(override.input_line)
    if group == "experiment" and not override.is_add():
        raise ConfigError(f"'{text}': an experiment is added with a plus sign; write +{text.lstrip('+~')}.")
    if group != "experiment" and override.is_add():
        raise ConfigError(f"'{text}': {group} is chosen already; write {text.lstrip('+')}.")
    for option in _options(override):
        if option in tree[group]:
            continue
        near = closest(option, tree[group])
        hint = f"closest: {near}; " if near else ""
        raise ConfigError(f"Unknown {group} '{option}'; {hint}there are {', '.join(tree[group])}.")


def _options(override: Override) -> list[str]:
    """Return the option names that an override chooses: one, or several in a sweep or a list."""
    if override.is_delete():
        return []
    if override.is_choice_sweep():
        value: Any = [item for item in override.sweep_iterator() if isinstance(item, str)]
    else:
        value = override.value()
    items = value if isinstance(value, list) else [value]
    return [str(item).removesuffix(".yaml") for item in items]
