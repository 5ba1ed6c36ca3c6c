"""How a sound file is changed: its bytes, or single values of the data in it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Read = Callable[[], object]
Make = Callable[[random.Random, Path], Read]

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3.5, 10**30, 10**400, -(2**63), 2**64, 1e308, float("inf"), float("nan"),
    "", " ", "no", "NaN", "1e400", "-0", "a\0b", "\x1b[31mx\x07", "x" * 5000, "../../../../etc/passwd", "/dev/zero",
    "/etc/passwd", "~", "%", "$HOME", "${oc.env:HOME}", "{}", "[]", "\u202e", "é", "\ud800", [], {}, [[]], {"": None},
    [None], {"a": {"b": {}}}, [1, 2], "2026-99-99", "1:2:3", "!!python/name:os.system", "os:system", "builtins:eval",
    "subprocess:getoutput",
)  # fmt: skip
TOKENS = (
    b"", b"0", b"-1", b"nan", b"inf", b"1e400", b"9" * 400, b"[" * 200, b"{" * 200, b"\0", b"\xff\xfe", b"\xef\xbb\xbf",
    b"\r\n", b"\n" * 50, b"&a [*a]", b"*a", b"<<: *a", b"!!int ", b"- " * 100, b": ", b"\t", b"x" * 10_000, b"'", b'"',
    b"#", b"%YAML 9.9\n", b"---\n", b"\x1b[2J", b"\xed\xa0\x80", b"${", b"}", b"NaN", b"Infinity", b"download: echo",
)  # fmt: skip
"""Values and pieces of text that readers stumble over."""


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: what the report calls it.
        share: of the cases, against those of the others.
        make: writes one case into an empty folder; returns what reads it.
    """

    name: str
    share: int
    make: Make


def mutate_bytes(chance: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat, insert and drop bytes, one to four times."""
    for _ in range(chance.randint(0, 4)):
        start = chance.randrange(len(data) + 1)
        length = chance.choice((1, 2, 4, 16, chance.randrange(len(data) + 1)))
        piece = data[start : start + length]
        match chance.randrange(6):
            case 0:
                flipped = bytes(byte ^ 1 << chance.randrange(8) for byte in piece[:8])
                data = data[:start] + flipped + data[start + len(flipped) :]
            case 1:
                data = data[:start]
            case 2:
                data = data[:start] + data[start + length :]
            case 3:
                data = data[:start] + piece * chance.randint(2, 30) + data[start + length :]
            case 4:
                data = data[:start] + chance.choice(TOKENS) + data[start + length :]
            case _:
                data = data[:start] + chance.randbytes(min(length, 64)) + data[start:]
        data = data[: 4 * 2**20]
    return data


def mutate_value(chance: random.Random, value: Any) -> Any:
    """Put something odd in the place of a value, a key or an entry somewhere inside plain data."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.1:
        return chance.choice(ODD)
    if isinstance(value, list):
        changed = list(value)
        index = chance.randrange(len(changed))
        match chance.randrange(6):
            case 0:
                del changed[index]
            case 1:
                changed += [changed[index]] * chance.choice((1, 3, 300))
            case _:
                changed[index] = mutate_value(chance, changed[index])
        return changed
    key = chance.choice(list(value))
    mapped = dict(value)
    match chance.randrange(6):
        case 0:
            del mapped[key]
        case 1:
            mapped[chance.choice(("", "x", "_target_", "names", "0", "factory", "id"))] = chance.choice(ODD)
        case _:
            mapped[key] = mutate_value(chance, mapped[key])
    return mapped


def as_text(chance: random.Random, value: Any, dump: Callable[[Any], str]) -> bytes:
    """Mutate plain data, or the bytes of its text, or both."""
    if chance.random() < 0.7:
        for _ in range(chance.randint(1, 3)):
            value = mutate_value(chance, value)
    try:
        data = dump(value).encode("utf-8", "surrogatepass")
    except (
        ValueError,
        yaml.YAMLError,
    ):  # an integer of hundreds of digits is printed; other odd values may not be
        data = repr(value).encode("utf-8", "surrogatepass")
    return mutate_bytes(chance, data) if chance.random() < 0.5 else data


def to_json(value: Any) -> str:
    """JSON text."""
    return json.dumps(value)


def to_yaml(value: Any) -> str:
    """YAML text."""
    return str(yaml.safe_dump(value, allow_unicode=True))
