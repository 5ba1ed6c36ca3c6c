"""Blocks that YOLOv10 adds (arXiv:2405.14458, section 3.2): decoupled downsampling and compact inverted blocks.

Parts follow the rules of `models.blocks`.

Shapes: B batch, C channels, H and W in cells of the block's own level.
"""

from typing import ClassVar

from torch import Tensor, nn

from models.blocks import ConvBlock, ConvNorm, RepConvBlock
from models.blocks_csp import SplitChain


class DecoupledDown(nn.Module):
    """Halve the resolution: a 1x1 convolution sets the channels, then a depthwise 3x3 one at stride 2 ("SCDown")."""

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"cv1": "pointwise", "cv2": "depthwise"}

    def __init__(self, in_channels: int, out_channels: int, activation: str) -> None:
        super().__init__()
        self.pointwise = ConvBlock(in_channels, out_channels, 1, activation=activation)
        self.depthwise = ConvNorm(out_channels, out_channels, 3, 2, groups=out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H / 2, W / 2]."""
        return self.depthwise(self.pointwise(x))


class RepDepthwise(RepConvBlock):
    """Two depthwise convolutions side by side, 7x7 and 3x3, summed before the activation; one 7x7 when folded."""

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"conv": "large", "conv1": "small"}
    BRANCHES: ClassVar[tuple[str, str]] = ("large", "small")

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__(channels, channels, activation, kernels=(7, 3), groups=channels)


class CompactInvertedBlock(nn.Module):
    """Depthwise 3x3, 1x1 to twice the width, depthwise, 1x1 back, depthwise 3x3 ("CIB", arXiv:2405.14458, fig. 4).

    Args:
        channels: Channels of input and output.
        large_kernel: Whether the depthwise convolution in the middle is 7x7 instead of 3x3.
        activation: `silu` or `relu`.
    """

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"cv1": "convs"}

    def __init__(self, channels: int, large_kernel: bool, activation: str) -> None:
        super().__init__()
        wide = 2 * channels
        self.convs = nn.Sequential(
            ConvBlock(channels, channels, 3, groups=channels, activation=activation),
            ConvBlock(channels, wide, 1, activation=activation),
            RepDepthwise(wide, activation)
            if large_kernel
            else ConvBlock(wide, wide, 3, groups=wide, activation=activation),
            ConvBlock(wide, channels, 1, activation=activation),
            ConvBlock(channels, channels, 3, groups=channels, activation=activation),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return x + self.convs(x)


class C2fCIB(SplitChain):
    """A `SplitChain` of compact inverted blocks.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the result; each half has half of them.
        repeats: Number of blocks.
        large_kernel: Whether the blocks have a 7x7 kernel.
        activation: `silu` or `relu`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, repeats: int, large_kernel: bool, activation: str
    ) -> None:
        hidden = out_channels // 2
        blocks = [CompactInvertedBlock(hidden, large_kernel, activation) for _ in range(repeats)]
        super().__init__(in_channels, hidden, out_channels, blocks, activation)
