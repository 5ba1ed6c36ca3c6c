"""Facts about a network: parameters, multiply-accumulates per layer and matrix product, output strides.

Counted by watching one forward pass on the meta device: shapes flow, no numbers are computed, so it takes
milliseconds for any image size.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MATMULS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)


@dataclass(frozen=True)
class LayerFacts:
    """One weighted layer, or one matrix product of two tensors.

    Attributes:
        name: Path in the network; of a product its module's path and `matmul`, numbered where there are several.
        kind: Class name; `MatMul` for a product.
        parameters: Weights and biases.
        macs: Multiply-accumulates for one image; of the weights only, biases are not counted.
        output_shape: Without the batch dimension.
    """

    name: str
    kind: str
    parameters: int
    macs: int
    output_shape: tuple[int, ...]


@dataclass(frozen=True)
class NetworkFacts:
    """What a network costs at one image size.

    Attributes:
        image_size: (h, w) in pixels.
        parameters: Of all layers, normalisation included.
        macs: Multiply-accumulates for one image.
        layers: Weighted layers and matrix products, in the order they run.
        strides: Input pixels per cell for each output map, in order and without repetitions.
    """

    image_size: tuple[int, int]
    parameters: int
    macs: int
    layers: tuple[LayerFacts, ...]
    strides: tuple[int, ...]


def count_parameters(module: nn.Module) -> int:
    """Number of trainable and frozen parameters; buffers are not counted, shared parameters once."""
    return sum(parameter.numel() for parameter in module.parameters())


def measure_network(network: nn.Module, image_size: tuple[int, int], channels: int = 3) -> NetworkFacts:
    """Count parameters, and multiply-accumulates of (transposed) convolutions, linear layers and matrix products.

    A convolution with weight [O, I / groups, k, k] and output [O, h, w] takes O * (I / groups) * k * k * h * w, a
    product [..., N, K] x [..., K, M] takes K for each of its results.
    Example: 3 -> 16 channels, 3x3, output 320 x 320: 16 * 3 * 9 * 320 * 320 = 44,236,800.

    Args:
        network: Images [1, channels, h, w] to tensors, in any nesting; not changed.
        image_size: (h, w) in pixels.
        channels: Channels of an image.
    """
    watched = copy.deepcopy(network).to("meta").eval()
    layers: list[LayerFacts] = []
    products = _ProductRecorder(layers)
    hooks = [
        module.register_forward_hook(_recorder(name, layers))
        for name, module in watched.named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
    ]
    for name, module in watched.named_modules():
        hooks += products.watch(name, module)
    try:
        with torch.no_grad(), products:
            outputs = watched(torch.empty(1, channels, *image_size, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    heights = [tensor.shape[-2] for tensor in _tensors(outputs) if tensor.ndim == 4]
    strides = tuple(dict.fromkeys(image_size[0] // height for height in heights))
    layers = _numbered(layers)
    return NetworkFacts(
        image_size, count_parameters(network), sum(layer.macs for layer in layers), tuple(layers), strides
    )


class _ProductRecorder(TorchFunctionMode):
    """Records matrix products of tensors under the module that computes them."""

    def __init__(self, layers: list[LayerFacts]) -> None:
        super().__init__()
        self.layers = layers
        self.scopes: list[str] = []

    def watch(self, name: str, module: nn.Module) -> list[Any]:
        """Hooks that say when a module runs."""
        return [
            module.register_forward_pre_hook(lambda *_: self.scopes.append(name)),
            module.register_forward_hook(lambda *_: self._leave()),
        ]

    def _leave(self) -> None:
        self.scopes.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in MATMULS:
            first = args[0] if args else kwargs["input"]
            name = f"{self.scopes[-1]}.matmul".lstrip(".")
            macs = result.numel() * first.shape[-1]
            self.layers.append(LayerFacts(name, "MatMul", 0, macs, tuple(result.shape[1:])))
        return result


def _numbered(layers: list[LayerFacts]) -> list[LayerFacts]:
    """Products of one module get numbers, as in a placement: `matmul_0`, `matmul_1`."""
    counts = Counter(layer.name for layer in layers if layer.kind == "MatMul")
    seen = Counter[str]()
    found = []
    for layer in layers:
        if counts[layer.name] > 1:
            seen[layer.name] += 1
            layer = replace(layer, name=f"{layer.name}_{seen[layer.name] - 1}")
        found.append(layer)
    return found


def _recorder(name: str, layers: list[LayerFacts]) -> Any:
    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.get_parameter("weight")
        if isinstance(module, nn.ConvTranspose2d):
            cells = inputs[0].shape[2:].numel()
        elif isinstance(module, nn.Conv2d):
            cells = output.shape[2:].numel()
        else:
            cells = output.shape[1:-1].numel()
        parameters = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        layers.append(
            LayerFacts(
                name, type(module).__name__, parameters, weight.numel() * cells, tuple(output.shape[1:])
            )
        )

    return record


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
