"""Recorded outputs of the official networks: rebuild a fixture's state dict from its recipe."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def fixture_state(folder: Path, name: str) -> dict[str, Tensor]:
    """The official state dict of one network, as the fixture's recipe fills it."""
    keys: dict[str, Any] = json.loads((folder / f"{name}.keys.json").read_text(encoding="utf-8"))
    recorded = np.load(folder / f"{name}.expected.npz")
    state = {}
    for key, (shape, kind) in keys.items():
        if kind == "stats":
            state[key] = torch.from_numpy(recorded[f"stats:{key}"])
        elif kind == "fill":
            state[key] = torch.from_numpy(_fill(key, shape))
        elif key.endswith("dfl.conv.weight") or key.endswith("dfl2.conv.weight"):
            state[key] = torch.arange(16, dtype=torch.float32).reshape(1, 16, 1, 1)
        else:
            state[key] = torch.zeros((), dtype=torch.int64)
    return state


def _fill(key: str, shape: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(f"yolov9:{key}".encode())))
    if key.endswith("bn.weight"):
        values = generator.uniform(0.5, 1.5, shape)
    elif len(shape) == 4:
        values = generator.normal(0, 1, shape) * np.sqrt(2 / np.prod(shape[1:]))
    else:
        values = generator.normal(0, 0.1, shape)
    return np.asarray(values, dtype=np.float32)


def recipe_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A state dict filled by the fixtures' recipe, with running statistics made up likewise."""
    state = {}
    for key, shape in shapes.items():
        if key.endswith("running_var"):
            state[key] = torch.from_numpy(_fill(f"{key}.bn.weight", list(shape)))
        elif key.endswith("num_batches_tracked"):
            state[key] = torch.zeros((), dtype=torch.int64)
        elif key.endswith("dfl.conv.weight"):
            state[key] = torch.arange(16, dtype=torch.float32).reshape(1, 16, 1, 1)
        else:
            state[key] = torch.from_numpy(_fill(key, list(shape)))
    return state


def waves(size: int) -> Tensor:
    """A deterministic float64 image [1, 3, size, size] in [0, 1]."""
    ramp = torch.arange(3 * size * size, dtype=torch.float64)
    return (torch.sin(ramp * 0.37) * torch.cos(ramp * 0.0113) / 2 + 0.5).reshape(1, 3, size, size)


def fixture_images(folder: Path) -> Tensor:
    return torch.from_numpy(np.load(folder / "input.npz")["images"])


def fixture_output(folder: Path, name: str) -> Tensor:
    return torch.from_numpy(np.load(folder / f"{name}.expected.npz")["output"])
