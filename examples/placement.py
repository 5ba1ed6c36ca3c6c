"""The placement of a small network, as text and as a drawing: the example of docs/placement.md.

    python examples/placement.py docs/images

The network has what a detector is made of: a residual sum, a split and a concat, an upsampling, and an output layer.
It is placed, calibrated on random images and exported; `python -m deploy.check FILE.onnx --svg FILE.svg` draws any
ONNX file in the same way.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from deploy.api import export_onnx
from deploy.check.command import main as check
from quant import Placement, calibrate, insert, place, with_named_nodes

IMAGE_SIZE = (64, 64)
CHANNELS = 32


class ConvSiLU(nn.Module):
    """3x3 convolution and SiLU; the batch norm is folded already."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.act = nn.SiLU()

    def forward(self, images: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        return self.act(self.conv(images))


class SmallNetwork(nn.Module):
    """Stem, a block with split, residual sum and concat, an upsampling, and a head with one output layer."""

    def __init__(self) -> None:
        super().__init__()
        half = CHANNELS // 2
        self.stem = ConvSiLU(3, CHANNELS, 2)
        self.branch1, self.branch2 = ConvSiLU(half, half), ConvSiLU(half, half)
        self.merge = ConvSiLU(CHANNELS + half, CHANNELS)
        self.down = ConvSiLU(CHANNELS, CHANNELS, 2)
        self.upsample = nn.Upsample(scale_factor=2)
        self.head = ConvSiLU(2 * CHANNELS, CHANNELS)
        self.output = nn.Conv2d(CHANNELS, 8, 1)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 8, H / 2, W / 2]."""
        left, right = self.stem(images).chunk(2, 1)
        summed = right + self.branch2(self.branch1(right))
        block = self.merge(torch.cat([left, right, summed], 1))
        return self.output(self.head(torch.cat([block, self.upsample(self.down(block))], 1)))


def draw_example(folder: Path) -> Placement:
    """Write `placement.svg` to a folder and return the placement."""
    torch.manual_seed(0)
    network = SmallNetwork().eval()
    placement = place(network)
    model = insert(network, placement)
    calibrate(model, [torch.rand(2, 3, *IMAGE_SIZE) for _ in range(2)])
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "small.onnx"
        named, names = with_named_nodes(model)
        export_onnx(named, path, IMAGE_SIZE, "trt10", names=names)
        check([str(path), "--strict", "--svg", str(folder / "placement.svg")])
    return placement


if __name__ == "__main__":
    print(draw_example(Path(sys.argv[1]) if len(sys.argv) > 1 else Path()).describe())
