"""Layers with quantized weights: the float layer with one more submodule, visible in its forward."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from quant.fake_quantize import WeightFakeQuantize


class QuantizedConv2d(nn.Conv2d):
    """`nn.Conv2d` whose weight passes a quantizer; input [B, C, H, W] comes quantized by the graph."""

    weight_quantizer: WeightFakeQuantize

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the quantized weight; the bias stays float."""
        return self._conv_forward(input, self.weight_quantizer(self.weight), self.bias)


class QuantizedConv1d(nn.Conv1d):
    """`nn.Conv1d` whose weight passes a quantizer."""

    weight_quantizer: WeightFakeQuantize

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the quantized weight; the bias stays float."""
        return self._conv_forward(input, self.weight_quantizer(self.weight), self.bias)


class QuantizedConvTranspose2d(nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` whose weight passes a quantizer (output channels on axis 1)."""

    weight_quantizer: WeightFakeQuantize

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve with the quantized weight; the bias stays float."""
        if output_size is not None:
            raise ValueError("a quantized transposed convolution takes no output_size: set output_padding")
        assert isinstance(
            self.padding, tuple
        )  # as torch's own forward does: names are for plain convolutions
        return F.conv_transpose2d(
            input,
            self.weight_quantizer(self.weight),
            self.bias,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.dilation,
        )


class QuantizedLinear(nn.Linear):
    """`nn.Linear` whose weight passes a quantizer."""

    weight_quantizer: WeightFakeQuantize

    def forward(self, input: Tensor) -> Tensor:
        """Multiply with the quantized weight; the bias stays float."""
        return F.linear(input, self.weight_quantizer(self.weight), self.bias)


QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.Linear: QuantizedLinear,
}
QuantizedLayer = QuantizedConv1d | QuantizedConv2d | QuantizedConvTranspose2d | QuantizedLinear


def quantize_layer(layer: nn.Module, axis: int, bits: int, learned: bool) -> None:
    """Turn a float layer into its quantized form in place: same parameters, one more submodule.

    Raises:
        TypeError: the layer's type has no quantized form.
    """
    kind = QUANTIZED.get(type(layer))
    if kind is None:
        known = ", ".join(sorted(t.__name__ for t in QUANTIZED))
        raise TypeError(f"{type(layer).__name__} has no quantized form; these have: {known}")
    weight = layer.weight
    assert isinstance(weight, Tensor)
    layer.__class__ = kind
    quantizer = WeightFakeQuantize(weight.shape[axis], axis, bits, learned).to(weight.device)
    layer.add_module("weight_quantizer", quantizer)
