"""Binding the process to processors before it is measured."""

from __future__ import annotations

import os
from pathlib import Path

from core.errors import DeployError
from core.machine import available_processors

PINNINGS = ("none", "core", "numa")
NODE_FOLDER = Path("/sys/devices/system/node")
CPU_FOLDER = Path("/sys/devices/system/cpu")


def pin_process(pinning: str, threads: int | None = None) -> set[int]:
    """Bind this process: "core" to one hardware thread of as many cores, "numa" to the first node, "none" to nothing.

    Returns:
        The processors in use afterwards.

    Raises:
        DeployError: unknown kind, or an unknown layout of the machine.
    """
    if pinning not in PINNINGS:
        raise DeployError(f"Unknown pinning '{pinning}'; expected one of {', '.join(PINNINGS)}.")
    available = available_processors()
    if pinning == "none":
        return available
    wanted = _first_threads(available) if pinning == "core" else _first_node(available)
    chosen = set(sorted(wanted)[:threads]) if threads is not None and pinning == "core" else wanted
    if not chosen:
        raise DeployError(f"--pin {pinning}: no processor of {sorted(available)} qualifies; use --pin none.")
    os.sched_setaffinity(0, chosen)
    return chosen


def _first_threads(available: set[int]) -> set[int]:
    first = set()
    for number in available:
        file = CPU_FOLDER / f"cpu{number}" / "topology" / "thread_siblings_list"
        siblings = parse_list(file.read_text()) if file.is_file() else {number}
        first.add(min(siblings & available or {number}))
    return first


def _first_node(available: set[int]) -> set[int]:
    for folder in sorted(NODE_FOLDER.glob("node[0-9]*")):
        processors = parse_list((folder / "cpulist").read_text()) & available
        if processors:
            return processors
    raise DeployError(
        f"--pin numa: {NODE_FOLDER} names no node with processors of this process; use --pin core."
    )


def parse_list(text: str) -> set[int]:
    """Linux's processor lists: "0-3,8" is {0, 1, 2, 3, 8}."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        low, _, high = part.partition("-")
        numbers.update(range(int(low), int(high or low) + 1))
    return numbers
