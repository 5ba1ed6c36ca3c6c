"""Recorded outputs of the official networks, rebuilt from their recipe; and checkpoints as other tools leave them."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import Detector
from models.checkpoints.convert import official_name


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
        elif key.endswith(("dfl.conv.weight", "dfl2.conv.weight", "anc2vec.weight")):
            state[key] = torch.arange(16, dtype=torch.float32).reshape(shape)
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


def fixture_output(folder: Path, name: str, array: str = "output") -> Tensor:
    return torch.from_numpy(np.load(folder / f"{name}.expected.npz")[array])


def official_state(detector: Detector) -> dict[str, Tensor]:
    """The detector's weights under the names of an official checkpoint."""
    network = detector.network
    return {f"model.{official_name(network, key)}": tensor for key, tensor in network.state_dict().items()}


def quantized_model(folded: Detector) -> nn.Module:
    """A module tree as yolov9-qat pickles it: folded, TensorQuantizers beside each convolution and elsewhere."""
    quant_nn = pytest.importorskip("pytorch_quantization.nn")
    tensor_quant = pytest.importorskip("pytorch_quantization.tensor_quant")
    histogram = tensor_quant.QuantDescriptor(calib_method="histogram")

    def quantizer(value: Any) -> nn.Module:
        made = quant_nn.TensorQuantizer(histogram)
        made.register_buffer("_amax", torch.as_tensor(value))
        return made

    root = nn.Module()
    for number, (key, tensor) in enumerate(official_state(folded).items()):
        module = root
        *path, name = key.split(".")
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(name, nn.Parameter(tensor.clone()))
        if name == "weight":
            module.add_module("_input_quantizer", quantizer(number + 0.5))
            module.add_module("_weight_quantizer", quantizer(tensor.abs().amax((1, 2, 3), keepdim=True)))
    block = root.get_submodule("model.4.cv2.0.m.0")
    block.add_module("repaddop", nn.Module())
    block.get_submodule("repaddop").add_module("_input0_quantizer", quantizer(1.0))
    block.forward_fuse = block.get_submodule(
        "cv2"
    ).float  # a bound method among the attributes, as fuse() leaves them
    root.names = {0: "a", 1: "b"}
    return root
