"""Registries: variation as data. One entry describes one thing by name, and names the code that belongs to it.

Configuration, export, check, report and pipeline read the same entries, so adding one is an entry and its module.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any, Protocol, TypeVar

from core.errors import ConfigError, OctetError
from core.names import closest


class Named(Protocol):
    """An entry of a registry."""

    @property
    def name(self) -> str:
        """What settings and files call it."""


Entry = TypeVar("Entry", bound=Named)


class Registry(dict[str, Entry]):
    """Entries by name, in the order in which messages and choices list them.

    Looking up a name that is not there with `registry[name]` raises `error`; `in` and `get` work as in any dict.

    Args:
        kind: what an entry is, for messages, e.g. "runtime".
        entries: the entries.
        error: class of the error for an unknown name.
    """

    def __init__(self, kind: str, entries: Iterable[Entry], error: type[OctetError] = ConfigError) -> None:
        super().__init__({entry.name: entry for entry in entries})
        self.kind = kind
        self.error = error

    def __missing__(self, name: str) -> Entry:
        near = closest(str(name), self)
        hint = f" (closest: {near})" if near else ""
        raise self.error(f"Unknown {self.kind} '{name}'; expected one of {', '.join(self)}{hint}.")


def resolve(reference: str) -> Any:
    """The attribute that `module:attribute` names; imports the module.

    Example: `resolve("deploy.runtimes.openvino:OpenVINORuntime")`
    """
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)
