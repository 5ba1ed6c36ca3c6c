"""Cross-stage partial blocks (CSPNet, arXiv:1911.11929) of YOLOv5, YOLOv8, YOLO11 and later families.

Two layouts. `C3` runs a chain of bottlenecks in parallel to a plain 1x1 path and joins both. `SplitChain` splits its
entry in two halves, runs blocks in a chain on the second and joins both halves with the result of every block; `C2f`
and `C3k2` say which blocks. Parts follow the rules of `models.blocks`.

Shapes: B batch, C channels, H and W in cells of the block's own level.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.attention import AttentionBlock
from models.blocks import ConvBlock, ConvNorm, RepCSP, SPPElan


class Bottleneck(nn.Module):
    """Two convolutions, with the input added to their result where `shortcut` is set.

    Args:
        channels: Channels of input and output.
        hidden: Channels between the convolutions.
        kernels: Sizes of the first and the second kernel.
        shortcut: Whether the input is added.
        activation: `silu` or `relu`.
    """

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"cv1": "conv1", "cv2": "conv2"}

    def __init__(
        self, channels: int, hidden: int, kernels: tuple[int, int], shortcut: bool, activation: str
    ) -> None:
        super().__init__()
        self.conv1 = ConvBlock(channels, hidden, kernels[0], activation=activation)
        self.conv2 = ConvBlock(hidden, channels, kernels[1], activation=activation)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        result = self.conv2(self.conv1(x))
        return x + result if self.shortcut else result


class C3(RepCSP):
    """Bottlenecks in a chain in parallel to a plain 1x1 path, joined by a 1x1 convolution (YOLOv5).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the result; the paths have half of them.
        repeats: Number of bottlenecks.
        shortcut: Whether the bottlenecks add their input.
        activation: `silu` or `relu`.
        kernels: Kernel sizes of a bottleneck.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        repeats: int,
        shortcut: bool,
        activation: str,
        kernels: tuple[int, int] = (1, 3),
    ) -> None:
        super().__init__(in_channels, out_channels, 0, activation)
        hidden = out_channels // 2
        self.bottlenecks = nn.Sequential(
            *(Bottleneck(hidden, hidden, kernels, shortcut, activation) for _ in range(repeats))
        )


class C3k(C3):
    """A `C3` of two bottlenecks with 3x3 kernels only, as used inside `C3k2` (YOLO11)."""

    def __init__(self, channels: int, shortcut: bool, activation: str) -> None:
        super().__init__(channels, channels, 2, shortcut, activation, kernels=(3, 3))


class SplitChain(nn.Module):
    """Split, blocks in a chain on the second half, concatenate both halves and each block's result, 1x1 convolution.

    Args:
        in_channels: Channels of the input.
        hidden: Channels of each half, and of each block's input and output.
        out_channels: Channels of the result.
        blocks: The chain.
        activation: `silu` or `relu`.
    """

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"cv1": "entry", "cv2": "exit", "m": "blocks"}

    def __init__(
        self, in_channels: int, hidden: int, out_channels: int, blocks: Iterable[nn.Module], activation: str
    ) -> None:
        super().__init__()
        self.entry = ConvBlock(in_channels, 2 * hidden, 1, activation=activation)
        self.blocks = nn.ModuleList(blocks)
        self.exit = ConvBlock((2 + len(self.blocks)) * hidden, out_channels, 1, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H, W]."""
        halves = torch.chunk(self.entry(x), 2, dim=1)
        parts = [halves[0], halves[1]]
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.exit(torch.cat(parts, dim=1))


class C2f(SplitChain):
    """A `SplitChain` of bottlenecks with 3x3 kernels and no narrowing (YOLOv8).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the result; each half has half of them.
        repeats: Number of bottlenecks.
        shortcut: Whether the bottlenecks add their input.
        activation: `silu` or `relu`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, repeats: int, shortcut: bool, activation: str
    ) -> None:
        hidden = out_channels // 2
        blocks = [Bottleneck(hidden, hidden, (3, 3), shortcut, activation) for _ in range(repeats)]
        super().__init__(in_channels, hidden, out_channels, blocks, activation)


def _narrowing(channels: int, activation: str) -> nn.Module:
    return Bottleneck(channels, channels // 2, (3, 3), True, activation)


INNER_BLOCKS: Mapping[str, Callable[[int, str], nn.Module]] = {
    "bottleneck": _narrowing,
    "c3k": lambda channels, activation: C3k(channels, True, activation),
    "attention": lambda channels, activation: nn.Sequential(
        _narrowing(channels, activation), AttentionBlock(channels, activation)
    ),
}


class C3k2(SplitChain):
    """A `SplitChain` of narrowing bottlenecks or of `C3k` blocks (YOLO11), or of bottlenecks with attention (YOLO26).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the result.
        repeats: Number of blocks.
        inner: What a block is: `bottleneck` (to half the width and back), `c3k`, or `attention` (such a bottleneck
            followed by an attention block).
        activation: `silu` or `relu`.
        ratio: Channels of each half, over `out_channels`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        repeats: int,
        inner: str,
        activation: str,
        ratio: float = 0.5,
    ) -> None:
        hidden = int(out_channels * ratio)
        blocks = [INNER_BLOCKS[inner](hidden, activation) for _ in range(repeats)]
        super().__init__(in_channels, hidden, out_channels, blocks, activation)


class SPPF(SPPElan):
    """Spatial pyramid pooling, fast: three 5x5 max-pools in a chain, all four maps concatenated (YOLOv5, YOLOv8).

    Args:
        in_channels: Channels of the input; the pools have half of them.
        out_channels: Channels of the result.
        activation: `silu` or `relu`.
        shortcut: Whether the input is added to the result (YOLO26); then nothing is activated before the pools, and
            `out_channels` is `in_channels`.
    """

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"cv1": "entry", "cv2": "exit"}

    def __init__(self, in_channels: int, out_channels: int, activation: str, shortcut: bool = False) -> None:
        super().__init__(in_channels, in_channels // 2, out_channels, activation)
        self.shortcut = shortcut
        if shortcut:
            self.entry = ConvNorm(in_channels, in_channels // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H, W]."""
        result = super().forward(x)
        return x + result if self.shortcut else result
