"""GPUs as data: the figures that a latency is estimated from, read from gpus.yaml or a file of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.choices import CAPABILITIES, FP8_CAPABILITIES
from core.documents import DocumentError, read_yaml, shown
from core.errors import ConfigError
from core.registry import Registry

SHIPPED = Path(__file__).with_name("gpus.yaml")
PRECISIONS = ("fp32", "fp16", "int8", "fp8")
REQUIRED = PRECISIONS[:3]
FIELDS = ("title", "capability", "gigabytes_per_second", "teraops", "kernel_microseconds", "source")


@dataclass(frozen=True)
class GPU:
    """One GPU.

    Attributes:
        name: what settings call it.
        title: what messages call it.
        capability: compute capability that is built for, of `core.choices.CAPABILITIES`.
        gigabytes_per_second: memory bandwidth.
        teraops: precision -> 10^12 dense operations per second; a multiply-accumulate is two operations.
        kernel_microseconds: fixed cost of a kernel.
        source: where the figures are from.
    """

    name: str
    title: str
    capability: str
    gigabytes_per_second: float
    teraops: Mapping[str, float]
    kernel_microseconds: float
    source: str


def load_gpus(path: Path | None = None) -> Registry[GPU]:
    """The GPUs of a file, by name; those that come with the package when `path` is None.

    Raises:
        ConfigError: the file cannot be read, or an entry lacks a figure or has one that cannot be.
    """
    path = path or SHIPPED
    try:
        content = read_yaml(path)
    except (OSError, DocumentError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}): expected a YAML file like {SHIPPED.name}"
        ) from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{path} names no GPU: expected entries like those of {SHIPPED.name}")
    return Registry("GPU", [_gpu(str(name), entry, path) for name, entry in content.items()])


def _gpu(name: str, entry: Any, path: Path) -> GPU:
    where = f"{path}, GPU {name}"
    if not isinstance(entry, dict) or set(entry) != set(FIELDS):
        found = ", ".join(map(shown, entry)) if isinstance(entry, dict) else shown(entry)
        raise ConfigError(f"{where} has {found}: expected {', '.join(FIELDS)}")
    if not isinstance(entry["capability"], str) or entry["capability"] not in CAPABILITIES:
        raise ConfigError(
            f"{where}: capability {shown(entry['capability'])}: expected one of {', '.join(CAPABILITIES)}"
        )
    teraops = entry["teraops"]
    known = isinstance(teraops, dict) and set(REQUIRED) <= set(teraops) <= set(PRECISIONS)
    if not known:
        raise ConfigError(
            f"{where}: teraops is {shown(teraops)}: expected figures for {', '.join(REQUIRED)}, and fp8 where it has it"
        )
    if "fp8" in teraops and entry["capability"] not in FP8_CAPABILITIES:
        raise ConfigError(
            f"{where}: teraops names fp8, which {entry['capability']} does not run: leave it out, or use one of "
            f"{', '.join(FP8_CAPABILITIES)}"
        )
    figures = {f"teraops.{key}": value for key, value in teraops.items()}
    figures |= {key: entry[key] for key in ("gigabytes_per_second", "kernel_microseconds")}
    for key, value in figures.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ConfigError(f"{where}: {key} is {shown(value)}: expected a positive number")
    texts = {key: str(entry[key]) for key in ("title", "capability", "source")}
    return GPU(
        name,
        gigabytes_per_second=entry["gigabytes_per_second"],
        teraops=teraops,
        kernel_microseconds=entry["kernel_microseconds"],
        **texts,
    )
