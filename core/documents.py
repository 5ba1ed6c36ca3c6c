"""Reading untrusted files: their size, kind, depth and expansion are limited before anything is built from them.

A YAML file of one kilobyte can represent 10^9 entries (anchors), a deep one ends in a RecursionError, and reading a
pipe never ends. Whatever reads YAML or JSON that a person or another program may have written uses this module, and
turns `DocumentError` into an error of its own with the file's name.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any

import yaml

MEBIBYTE = 2**20
MAX_BYTES = 16 * MEBIBYTE  # of a settings file, a placement, a sidecar
MAX_NODES = 100_000  # entries of a YAML file after its aliases are put in
MAX_DEPTH = 64  # of nested lists and maps
MAX_NUMBER = 64  # characters of a number in YAML

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # LibYAML's where it is there: ten times as fast
_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80
_short.maxdict = _short.maxlist = 6


class DocumentError(ValueError):
    """A file that is not read; the message says why, without the file's name."""


def shown(value: Any) -> str:
    """A value for a message: its representation, cut short at every level."""
    try:
        return _short.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return f"a {type(value).__name__} of many digits"


def check_regular(path: Path) -> None:
    """Refuse folders, pipes and devices, and names that no file can have, before a library opens them.

    Raises:
        DocumentError: it is one.
        OSError: there is nothing of that name, or it is out of reach.
    """
    if "\0" in str(path):
        raise DocumentError("its name holds a zero byte")
    if not stat.S_ISREG(path.stat().st_mode):
        raise DocumentError("it is not a regular file but a folder, a pipe or a device")


def read_limited(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a regular file of at most `max_bytes`.

    Raises:
        DocumentError: it is a folder, a pipe or a device, or larger.
        OSError: it cannot be opened or read.
    """
    if "\0" in str(path):
        raise DocumentError("its name holds a zero byte")
    handle = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
    )  # the open of a pipe would wait for a writer
    with os.fdopen(handle, "rb") as stream:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise DocumentError("it is not a regular file but a folder, a pipe or a device")
        if status.st_size > max_bytes:
            raise DocumentError(f"it has {status.st_size} bytes, at most {max_bytes} are read")
        content = stream.read(min(status.st_size, max_bytes) + 1)
    if len(content) > max_bytes:
        raise DocumentError(f"it has more than {max_bytes} bytes")
    return content


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """Read a text file in UTF-8; errors as for `read_limited`, and DocumentError for another encoding."""
    try:
        return read_limited(path, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(f"it is not UTF-8 text (byte {error.start})") from error


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Read a JSON file in UTF-8; errors as for `read_limited` and `parse_json`."""
    return parse_json(read_text(path, max_bytes))


def parse_json(text: str) -> Any:
    """Plain data of JSON text.

    Raises:
        DocumentError: it is not JSON, is nested too deep, or has an integer of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DocumentError("lists and objects are nested too deep") from error
    except ValueError as error:
        raise DocumentError(f"it is not JSON ({error})") from error


def read_yaml(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Read a YAML file in UTF-8; errors as for `read_limited` and `parse_yaml`."""
    return parse_yaml(read_text(path, max_bytes))


def parse_yaml(text: str, max_nodes: int = MAX_NODES) -> Any:
    """Plain data of YAML text; tags that make objects are refused.

    Raises:
        DocumentError: it is not YAML, has more than `max_nodes` entries after its aliases are put in, is nested deeper
            than `MAX_DEPTH`, contains itself, or has a number of more than `MAX_NUMBER` characters.
    """
    check_yaml(text, max_nodes)
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except yaml.YAMLError as error:
        raise DocumentError(f"it is not YAML ({' '.join(str(error).split())})") from error
    except ValueError as error:  # dates such as 2001-99-99
        raise DocumentError(f"it has a value that cannot be read ({error})") from error


def check_yaml(text: str, max_nodes: int = MAX_NODES) -> None:
    """Check the shape of YAML text without building anything from it; errors as for `parse_yaml`."""
    if len(text) > MAX_BYTES:
        raise DocumentError(f"it has {len(text)} characters, at most {MAX_BYTES} are read")
    count = _NodeCount()
    try:
        for event in yaml.parse(text, Loader=_Loader):
            count.add(event)
            if count.total > max_nodes:
                raise DocumentError(f"it has more than {max_nodes} entries, counting what aliases repeat")
            if len(count.open) > MAX_DEPTH:
                raise DocumentError(f"lists and maps are nested deeper than {MAX_DEPTH} levels")
    except yaml.YAMLError as error:
        raise DocumentError(f"it is not YAML ({' '.join(str(error).split())})") from error
    except UnicodeEncodeError as error:
        raise DocumentError("it holds half of a surrogate pair, which is not a character") from error


class _NodeCount:
    """Counts the entries that a stream of YAML events stands for, each alias as what it repeats.

    Attributes:
        total: entries so far.
        open: anchors of the lists and maps that are open, each with the entries before it.
    """

    def __init__(self) -> None:
        self.total = 0
        self.open: list[tuple[str | None, int]] = []
        self._anchors: dict[str, int | None] = {}  # entries that each stands for; None while it is open

    def add(self, event: yaml.Event) -> None:
        """Take the next event; raises DocumentError for an anchor that contains itself, and for long numbers."""
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = self.open.pop()
            if anchor is not None:
                self._anchors[anchor] = self.total - before
        elif isinstance(event, yaml.AliasEvent):
            if self._anchors.get(event.anchor, 0) is None:
                raise DocumentError(f"the anchor &{event.anchor[:40]} contains itself")
            self.total += self._anchors.get(event.anchor) or 1
        elif isinstance(event, yaml.NodeEvent):
            is_scalar = isinstance(event, yaml.ScalarEvent)
            if is_scalar:
                _check_scalar(event)
            else:
                self.open.append((event.anchor, self.total))
            if event.anchor is not None:
                self._anchors[event.anchor] = 1 if is_scalar else None
            self.total += 1


def _check_scalar(event: yaml.ScalarEvent) -> None:
    """Refuse numbers that would take long to read: of thousands of digits, or in base 60."""
    value = event.value
    if (
        event.tag is None
        and event.implicit[0]
        and len(value) > MAX_NUMBER
        and value.lstrip("-+")[:1].isdigit()
    ):
        kind = _RESOLVER.resolve(yaml.ScalarNode, value, (True, False))
        if kind.endswith((":int", ":float")):
            raise DocumentError(f"it has a number of {len(value)} characters, at most {MAX_NUMBER} are read")
    elif event.tag is not None and len(value) > MAX_NUMBER and event.tag.endswith((":int", ":float")):
        raise DocumentError(f"it has a number of {len(value)} characters, at most {MAX_NUMBER} are read")


_RESOLVER = yaml.resolver.Resolver()


class _PlainLoader(_Loader):  # type: ignore[misc, valid-type]
    """Builds plain data; a map with the same key twice keeps the last, as YAML readers do."""
