"""What a figure was measured on: processor, memory, and library versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

from core.runtimes import RUNTIMES

CPU_INFO = Path("/proc/cpuinfo")
INSTRUCTIONS = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp",
)  # fmt: skip
DISTRIBUTION = "octet"
PACKAGES = ("torch", "torchvision", "onnx", "tensorrt-rtx-cu12", "numpy", "pycocotools", "hotcoco")


def describe_machine() -> dict[str, object]:
    """Processor, the instructions that INT8 speed depends on, processors of this process, and memory in GiB."""
    text = CPU_INFO.read_text() if CPU_INFO.is_file() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags.group(1).split()) if flags else set()
    machine: dict[str, object] = {
        "processor": model.group(1) if model else platform.processor() or platform.machine(),
        "processors": len(available_processors()),
        "instructions": [name for name in INSTRUCTIONS if name in present],
        "system": platform.platform(),
    }
    if "SC_PHYS_PAGES" in os.sysconf_names:
        machine["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return machine


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a figure may depend on; absent ones are left out."""
    versions = {"python": platform.python_version()}
    for package in (*PACKAGES, *(runtime.library for runtime in RUNTIMES.values())):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe_build() -> dict[str, str]:
    """Version of Octet, and its commit where it runs from a git checkout; "-dirty" marks changes since."""
    try:
        build = {"version": metadata.version(DISTRIBUTION)}
    except metadata.PackageNotFoundError:
        build = {}
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            build["commit"] = found.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            build["commit"] = "unknown: git is missing, or refuses this folder"
    return build


def computes_in_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself; others convert, which takes longer than float32."""
    return bool({"avx512_bf16", "amx_bf16"} & set(describe_machine()["instructions"]))  # type: ignore[call-overload]


def available_processors() -> set[int]:
    """Numbers of the processors this process may run on."""
    return set(os.sched_getaffinity(0))
