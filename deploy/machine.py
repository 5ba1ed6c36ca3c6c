"""What a figure was measured on, and binding the process to processors before it is measured."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from deploy.errors import DeployError

PINNINGS = ("none", "core", "numa")
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp")
CPU_INFO = Path("/proc/cpuinfo")
NODE_FOLDER = Path("/sys/devices/system/node")
CPU_FOLDER = Path("/sys/devices/system/cpu")


def describe_machine() -> dict[str, object]:
    """Processor, the features INT8 speed hangs on, processors this process may use, and versions."""
    text = CPU_INFO.read_text() if CPU_INFO.is_file() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags.group(1).split()) if flags else set()
    return {
        "processor": model.group(1) if model else platform.processor() or platform.machine(),
        "features": [name for name in FEATURES if name in present],
        "processors": len(available_processors()),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def available_processors() -> set[int]:
    """Numbers of the processors this process may run on."""
    return set(os.sched_getaffinity(0))


def pin_process(pinning: str, threads: int | None = None) -> set[int]:
    """Bind this process: "core" to one hardware thread of as many cores, "numa" to the first node, "none" to nothing.

    Returns:
        The processors in use afterwards.

    Raises:
        DeployError: unknown kind, or the machine does not tell its layout.
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
