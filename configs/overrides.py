"""Read the command line before Hydra does: a slip of the finger ends in a suggestion, not in a traceback.

Hydra's grammar is left to Hydra's own parser. This file knows three things about an override: whether its
key is a setting of the schema, whether it is a group of the tree, and which options that group has.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from core.errors import ConfigError
from core.names import closest

MAX_DIGITS = 1000  # of one number; Python itself refuses to read more than 4300
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


def key_types(schema: type) -> dict[str, Any]:
    """Return the types of all settings that are not sections, by dotted name."""
    hints = get_type_hints(schema)
    types: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        inner = hints[field.name]
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            types |= {f"{field.name}.{key}": kind for key, kind in key_types(inner).items()}
        else:
            types[field.name] = inner
    return types


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


def check_overrides(
    overrides: Sequence[str], schema: type, config_dirs: Sequence[Path], sweeping: bool = False
) -> None:
    """Raise ConfigError for the first override that cannot be read, or names no setting, no group or no option.

    Args:
        overrides: The command line without flags, e.g. `["+experiment=demo", "train.epochs=3"]`.
        schema: Dataclass that the settings belong to.
        config_dirs: Roots whose folders are the groups.
        sweeping: Whether values separated by commas make a sweep (`-m`).
    """
    parser = OverridesParser.create()
    tree = groups(config_dirs) if "model" in known_keys(schema) else {}
    for text in overrides:
        if re.search(rf"\d{{{MAX_DIGITS}}}", text):
            key = text.partition("=")[0][:100]
            raise ConfigError(f"{key}: a number of more than {MAX_DIGITS} digits; write a smaller one.")
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise ConfigError(_unreadable(text, key_types(schema))) from error
        if not override.is_hydra_override():
            _check_key(override, schema, tree)
            _check_value(override, key_types(schema), sweeping)


def _unreadable(text: str, types: dict[str, Any]) -> str:
    """The correct text for an override that Hydra's grammar does not accept."""
    key, equals, value = text.partition("=")
    name = key.strip()
    if not equals:
        return f"'{text}' is not a setting: expected KEY=VALUE; write {name or 'KEY'}=VALUE."
    if key != name or not name:
        return f"'{text}' cannot be read: no space before the equals sign; write {name or 'KEY'}={value}."
    if any(character.isspace() for character in name):
        return f"'{text}' cannot be read: expected KEY=VALUE, with no space in the key."
    kind = str(types.get(name.lstrip("+~"), ""))
    if kind.startswith(("list[", "dict[")):
        example = "[A,B]" if kind.startswith("list[") else "{A: B}"
        return f"'{text}' cannot be read: expected '{name}={example}', with the quotes, and every bracket closed."
    odd = "".join(dict.fromkeys(c for c in value if not (c.isascii() and (c.isalnum() or c in "/._-:"))))
    return f"'{text}' cannot be read, because of {odd or 'its value'}: quote it: {quoted(name, value)}"


def quoted(key: str, value: str) -> str:
    """An override with a text as its value, as it is typed in a shell: `'weights="a=b.pt"'`."""
    escaped = value.strip("'\"").replace('"', '\\"')
    return shlex.quote(f'{key}="{escaped}"')


def _check_value(override: Override, types: dict[str, Any], sweeping: bool) -> None:
    """Refuse values that Hydra reads as something else than a setting's type means: a list, a number, a sweep."""
    text = str(override.input_line)
    key, _, value = text.partition("=")
    kind = str(types.get(override.key_or_group, ""))
    is_text = types.get(override.key_or_group) is str or kind == "str | None"
    if override.is_choice_sweep() and kind.startswith("list["):
        if "[" not in value:
            raise ConfigError(f"'{text}': a list is written in brackets: {shlex.quote(f'{key}=[{value}]')}")
        sweeping = sweeping or value.count("[") == 1  # a list's own commas are none of a sweep
    if override.is_sweep_override() and not sweeping:
        remedy = f"quote it: {quoted(key, value)}; for" if is_text else "for"
        if kind == str(Any):
            remedy = f"a list is written in brackets: {shlex.quote(f'{key}=[{value}]')}; for"
        raise ConfigError(f"'{text}' has several values: {remedy} a sweep over them add -m")
    found = override.value()
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    if is_text and is_number and str(found) != value:
        raise ConfigError(f"'{text}' is read as the number {found}: quote it: {quoted(key, value)}")


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
