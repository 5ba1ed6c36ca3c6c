"""The Q/DQ graph of a tool that wraps modules: each conv quantizes its own input and weight, and nothing is shared.

This is what `replace every Conv2d by QuantConv2d` gives: per-tensor activation scales and per-channel weight scales,
each conv by itself. Convs that read one tensor have the same range and get the same scale; tensors that meet in a
concat are quantized after it, sums and pools not at all.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from deploy import export_onnx

SMALLEST_SCALE = 1e-8


class QuantizedConv(nn.Module):
    """A conv with one scale for its input (the largest magnitude seen / 127) and one per weight channel."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.observing = True
        self.largest = 0.0

    def forward(self, images: Tensor) -> Tensor:
        """Observe, or quantize and convolve."""
        if self.observing:
            self.largest = max(self.largest, float(images.abs().max()))
            return self.conv(images)
        conv = self.conv
        scale = max(self.largest / 127, SMALLEST_SCALE)
        scales = (conv.weight.detach().abs().amax((1, 2, 3)) / 127).clamp(min=SMALLEST_SCALE)
        zeros = torch.zeros_like(scales, dtype=torch.int32)
        data = torch.fake_quantize_per_tensor_affine(images, scale, 0, -128, 127)
        weight = torch.fake_quantize_per_channel_affine(conv.weight, scales, zeros, 0, -128, 127)
        return nn.functional.conv2d(
            data, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )


class Whole(nn.Module):
    """Network and decode in one: images [B, 3, H, W] to output0 [B, 4 + K, A]."""

    def __init__(self, network: nn.Module, decode: nn.Module) -> None:
        super().__init__()
        self.network, self.decode = network, decode

    def forward(self, images: Tensor) -> Tensor:
        """Decoded boxes and class scores."""
        return self.decode(self.network(images))


def export_naive(
    network: nn.Module, decode: nn.Module, images: Iterable[Tensor], path: Path, size: tuple[int, int]
) -> Path:
    """Wrap every conv of a copy of `network`, observe the images [B, 3, H, W], and write the Q/DQ graph.

    The exporter of this project writes it, in TensorRT's form, so that placement is the only difference.
    """
    network = copy.deepcopy(network).eval()
    wrappers = []
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                wrappers.append(QuantizedConv(child))
                setattr(parent, name, wrappers[-1])
    with torch.no_grad():
        for batch in images:
            network(batch)
    for wrapper in wrappers:
        wrapper.observing = False
    return export_onnx(Whole(network, decode).eval(), path, size, "trt10", dynamic_batch=False).path
