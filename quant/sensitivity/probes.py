"""What `fisher` watches while gradients flow: sums of squared changes, of each image, at every quantizer and layer.

Convolutions and SiLUs run without autograd. Each gets one function instead, whose backward pass takes the sums and
computes the gradient for the input. That of a convolution with stride 1 is a convolution, too, with the weight turned
by 180 degrees and its channel axes swapped: torch's forward kernels are faster than those of its backward pass.

Products of gradients can be those of bfloat16 values: gradients for inputs, and for the weights where the kernel
computes them. The forward pass, the roundings Q(x) - x and all sums stay in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.fake_quantize import FakeQuantize
from quant.layers import QuantizedConv2d, QuantizedConvTranspose2d, QuantizedLayer, QuantizedLinear
from quant.native.statistics import silu_gradient_and_changes, squared_changes, squared_weight_changes
from quant.rounding import round_to_grid

PIECE = 1 << 17  # values rounded at a time on a CPU, so that they stay in its cache


class _Backward(torch.autograd.Function):
    """Gives an output that was computed without autograd the backward pass of a probe."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, probe: LayerProbe | SiLUProbe) -> Tensor:
        ctx.save_for_backward(x)
        ctx.probe = probe
        ctx.mark_dirty(output)  # it now has a gradient
        return output

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return ctx.probe.backward(x.detach(), outer[0], getattr(ctx, "reader", None)), None, None


class Probe:
    """Sums by image of g^2 (Q(x) - x)^2, of one activation quantizer or layer."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parts: list[Tensor] = []

    def take(self, images: Tensor) -> Tensor:
        """The sums since the last call, [B]; 0 where there was no gradient."""
        parts, self.parts = self.parts, []
        return torch.stack(parts).sum(0) if parts else images.new_zeros(len(images))


class QuantizerProbe(Probe):
    """Watches the tensors that pass a quantizer."""

    def __init__(self, quantizer: FakeQuantize) -> None:
        super().__init__(quantizer)
        self.quantizer = quantizer
        self.scale = float(quantizer.scale)

    def watch(self, _module: Any, _inputs: Any, output: Tensor) -> None:
        """The quantizer's forward hook."""
        source: Any = output.grad_fn  # of `_Backward`, where the output is that of a SiLU
        is_of_silu = isinstance(getattr(source, "probe", None), SiLUProbe)
        if is_of_silu and output.is_cpu and not hasattr(source, "reader"):
            source.reader = self
        elif output.requires_grad:
            x = output.detach()  # a hook that held `output` itself would be a cycle
            output.register_hook(lambda gradient: self.parts.append(self.sums(x, gradient)))

    def sums(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Of one tensor and its gradient, [B]."""
        scale, grid = self.scale, self.quantizer.grid
        found = squared_changes(x, gradient, scale, grid)
        if found is None and gradient.stride() != x.stride():
            gradient = torch.empty_like(x).copy_(gradient)
            found = squared_changes(x, gradient, scale, grid)
        return self._sums_in_torch(x, gradient) if found is None else found

    def _sums_in_torch(self, x: Tensor, gradient: Tensor) -> Tensor:
        order = [0, *sorted(range(1, x.ndim), key=x.stride, reverse=True)]  # as they lie in memory: no copies
        x, gradient = x.permute(order).flatten(1), gradient.permute(order).flatten(1)
        if x.device.type != "cpu" or x.numel() <= PIECE:
            return self._sum(x, gradient)
        pairs = zip(x.split(1), gradient.split(1), strict=True)
        return torch.cat([self._sum_of_pieces(*pair) for pair in pairs])

    def _sum_of_pieces(self, x: Tensor, gradient: Tensor) -> Tensor:
        sums = map(self._sum, x.split(PIECE, 1), gradient.split(PIECE, 1))
        return torch.stack(list(sums)).sum(0)

    def _sum(self, x: Tensor, gradient: Tensor) -> Tensor:
        change = round_to_grid(x, self.quantizer.scale, self.quantizer.grid)
        return change.sub_(x).mul_(gradient).square_().sum(1)


class LayerProbe(Probe):
    """Watches the inputs and the output gradients of a layer."""

    def __init__(self, layer: QuantizedLayer, products: torch.dtype = torch.float32) -> None:
        super().__init__(layer)
        self.layer = layer
        self.products = products if layer.weight.dtype == torch.float32 else layer.weight.dtype
        quantizer, weight = layer.weight_quantizer, layer.weight.detach()
        self.error = quantizer.grid.round(weight, quantizer.steps(weight.ndim)).sub_(weight)
        self.error_channels_last = self.error.permute(0, 2, 3, 1).contiguous() if _is_plain(layer) else None
        self.turned: dict[torch.memory_format, Tensor] = {}
        self.num_calls = 0
        self.gradients: Tensor | None = None  # of each image, where the layer is called several times
        self.leaves: list[Tensor] = []  # inputs that no gradient would reach
        self.inputs: list[Tensor] = []  # of the call in progress

    def enter(self, _module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The layer's forward pre-hook: an input without a gradient, such as one after `detach`, gets one."""
        x = inputs[0]
        if not x.requires_grad:
            x = x.detach().requires_grad_()
            self.leaves.append(x)
        self.inputs.append(x)
        return (x.detach() if self._is_ours(x) else x), *inputs[1:]

    def watch(self, _module: Any, _inputs: Any, output: Tensor) -> Tensor | None:
        """The layer's forward hook."""
        x = self.inputs.pop()
        self.num_calls += 1
        if self._is_ours(x):
            watched: Tensor = _Backward.apply(x, output, self)
            return watched
        x = x.detach()
        output.register_hook(lambda gradient: self._add(x, gradient))
        return None

    def _is_ours(self, x: Tensor) -> bool:
        """Whether `backward` computes the gradient for the input, and not autograd."""
        return self.error_channels_last is not None and x.ndim == 4

    def backward(self, x: Tensor, gradient: Tensor, _reader: QuantizerProbe | None = None) -> Tensor:
        """Take the sums; returns the gradient for the input."""
        self._add(x, gradient)
        layer = self.layer
        assert isinstance(layer, QuantizedConv2d)
        assert not isinstance(layer.padding, str)
        padding = [size - 1 - pad for size, pad in zip(layer.kernel_size, layer.padding, strict=True)]
        gradient = gradient.to(self.products)
        if layer.stride == (1, 1) and min(padding) >= 0:
            return F.conv2d(gradient, self._turned(gradient), None, 1, padding).to(x.dtype)
        like_x, weight = torch.empty_like(x, dtype=self.products), layer.weight.detach().to(self.products)
        found: Tensor = torch.ops.aten.convolution_backward(
            gradient, like_x, weight, None, layer.stride, layer.padding, layer.dilation, False, (0, 0), 1,
            (True, False, False),
        )[0]  # fmt: skip
        return found.to(x.dtype)

    def _turned(self, gradient: Tensor) -> Tensor:
        """The weight, its kernels turned by 180 degrees and its channel axes swapped, in the layout of a gradient."""
        is_last = gradient.is_contiguous(memory_format=torch.channels_last) and not gradient.is_contiguous()
        layout = torch.channels_last if is_last else torch.contiguous_format
        if layout not in self.turned:
            weight = self.layer.weight.detach().flip(2, 3).transpose(0, 1)
            self.turned[layout] = weight.to(self.products).contiguous(memory_format=layout)
        return self.turned[layout]

    def _add(self, x: Tensor, gradient: Tensor) -> None:
        if self.num_calls == 1 and (sums := self._sums_of_one_call(x, gradient)) is not None:
            self.parts.append(sums)
            return
        found = weight_gradients(self.layer, x, gradient)
        if self.num_calls == 1:
            self.parts.append(self._sum(found))
        else:
            self.gradients = found if self.gradients is None else self.gradients + found

    def _sums_of_one_call(self, x: Tensor, gradient: Tensor) -> Tensor | None:
        """The sums without a tensor of gradients; None where there is no kernel for it."""
        layer = self.layer
        if self.error_channels_last is None or not self._is_ours(x):
            return None
        assert isinstance(layer, QuantizedConv2d)
        assert not isinstance(layer.padding, str)
        return squared_weight_changes(
            x, gradient, self.error_channels_last, layer.stride, layer.padding, self.products
        )

    def _sum(self, gradients: Tensor) -> Tensor:
        return gradients.mul_(self.error).square_().flatten(1).sum(1)

    def take(self, images: Tensor) -> Tensor:
        """As in the base class."""
        if self.gradients is not None:
            self.parts.append(self._sum(self.gradients))
        self.gradients, self.num_calls = None, 0
        self.leaves.clear()
        return super().take(images)


class SiLUProbe:
    """Computes the gradient for the input of a SiLU together with the sums of the quantizer that reads its output."""

    def __init__(self, module: nn.SiLU) -> None:
        self.module = module
        self.inputs: list[Tensor] = []  # of the call in progress

    def enter(self, _module: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """The forward pre-hook."""
        self.inputs.append(inputs[0])
        return (inputs[0].detach(),)

    def watch(self, _module: Any, _inputs: Any, output: Tensor) -> Tensor:
        """The forward hook."""
        y = self.inputs.pop()
        watched: Tensor = _Backward.apply(y, output, self) if y.requires_grad else output
        return watched

    def backward(self, y: Tensor, gradient: Tensor, reader: QuantizerProbe | None) -> Tensor:
        """Take the sums of the quantizer that reads the output, if any; returns the gradient for the input."""
        if reader is not None:
            found = silu_gradient_and_changes(y, gradient, reader.scale, reader.quantizer.grid)
            if found is not None:
                reader.parts.append(found[1])
                return found[0]
            reader.parts.append(reader.sums(F.silu(y), gradient))
        result: Tensor = torch.ops.aten.silu_backward(gradient, y)
        return result


def weight_gradients(layer: QuantizedLayer, x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient for a layer's weight in float, of each image by itself: [B, shape of the weight].

    Args:
        layer: the layer, whose quantizer is off.
        x: its input, [B, ...].
        gradient: the gradient of the loss for its output.
    """
    if isinstance(layer, QuantizedLinear):
        rows = (values.reshape(len(values), -1, values.shape[-1]) for values in (gradient, x))
    elif isinstance(layer, QuantizedConv2d) and _is_pointwise(layer):
        rows = (values.permute(0, 2, 3, 1).flatten(1, 2) for values in (gradient, x))
    else:
        pairs = zip(x.split(1), gradient.split(1), strict=True)
        return torch.stack([_convolution_gradient(layer, *pair) for pair in pairs])
    outputs, inputs = rows
    return torch.bmm(outputs.transpose(1, 2), inputs).reshape(-1, *layer.weight.shape)


def _is_plain(layer: QuantizedLayer) -> bool:
    """Whether the kernel computes the layer's sums."""
    if not isinstance(layer, QuantizedConv2d) or isinstance(layer.padding, str):
        return False
    return layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"


def _is_pointwise(layer: QuantizedConv2d) -> bool:
    plain = layer.kernel_size == layer.stride == (1, 1) and layer.groups == 1
    return plain and layer.padding in ((0, 0), "valid", "same")


def _convolution_gradient(layer: QuantizedLayer, x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient for a convolution's weight, of one image."""
    assert not isinstance(layer, QuantizedLinear)
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        weight = layer.weight.detach().requires_grad_()
        with torch.enable_grad():
            output = layer._conv_forward(x, weight, None)  # type: ignore[operator, union-attr]
        return torch.autograd.grad(output, weight, gradient)[0]
    transposed = isinstance(layer, QuantizedConvTranspose2d)
    found: Tensor = torch.ops.aten.convolution_backward(
        gradient, x, layer.weight, None, layer.stride, layer.padding, layer.dilation, transposed,
        layer.output_padding, layer.groups, (False, True, False),
    )[1]  # fmt: skip
    return found
