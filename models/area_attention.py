"""Area attention of YOLO12 (arXiv:2502.12524, section 3.2 and 3.3): attention within strips of the map, not the whole.

A map is cut into strips of whole rows, and each strip attends to itself alone: a quarter of the work with four strips.
All weights are convolutions with batch normalisation, as in `models.attention`.

Shapes: B batch, C channels, H and W in cells of the block's own level, S strips of N = H * W / S cells, h heads
with D = 32 channels each.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.blocks import ConvBlock, ConvNorm
from models.blocks_csp import C3k

HEAD_CHANNELS = 32
POSITION_KERNEL = 7
RESIDUAL_SCALE = 0.01


class AreaAttention(nn.Module):
    """Multi-head self-attention within strips, with a depthwise 7x7 convolution of the values as positional encoding.

    Args:
        channels: C, a multiple of 32.
        num_areas: S; must divide H * W.
    """

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"qkv": "qkv", "proj": "projection", "pe": "position"}

    def __init__(self, channels: int, num_areas: int) -> None:
        super().__init__()
        self.num_areas = num_areas
        self.num_heads = channels // HEAD_CHANNELS
        self.scale = HEAD_CHANNELS**-0.5
        self.qkv = ConvNorm(channels, 3 * channels, 1)
        self.projection = ConvNorm(channels, channels, 1)
        self.position = ConvNorm(channels, channels, POSITION_KERNEL, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        batch, channels, height, width = x.shape
        strips, heads = self.num_areas, self.num_heads
        cells = height * width // strips
        qkv = self.qkv(x).view(batch, heads, 3 * HEAD_CHANNELS, strips, cells)
        parts = torch.split(qkv.permute(0, 3, 1, 2, 4), HEAD_CHANNELS, dim=3)  # [B, S, h, D, N] each
        query, key, value = parts[0], parts[1], parts[2]
        scores = torch.matmul(query.transpose(-2, -1), key) * self.scale  # [B, S, h, N, N]
        weights = torch.softmax(scores, dim=-1)
        mixed = torch.matmul(value, weights.transpose(-2, -1))
        whole = mixed.permute(0, 2, 3, 1, 4).reshape(batch, channels, height, width)
        values = value.permute(0, 2, 3, 1, 4).reshape(batch, channels, height, width)
        return self.projection(whole + self.position(values))


class AreaBlock(nn.Module):
    """Area attention and a feed-forward network of two 1x1 convolutions, each added to its input.

    Args:
        channels: C, a multiple of 32.
        num_areas: Strips of the attention.
        mlp_ratio: Hidden channels of the feed-forward network, over C.
        activation: `silu` or `relu`; of the feed-forward network.
    """

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"attn": "attention", "mlp": "feed_forward"}

    def __init__(self, channels: int, num_areas: int, mlp_ratio: float, activation: str) -> None:
        super().__init__()
        hidden = int(channels * mlp_ratio)
        self.attention = AreaAttention(channels, num_areas)
        self.feed_forward = nn.Sequential(
            ConvBlock(channels, hidden, 1, activation=activation), ConvNorm(hidden, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        attended = x + self.attention(x)
        return attended + self.feed_forward(attended)


class ResidualElan(nn.Module):
    """A 1x1 entry, blocks in a chain, the entry and each block's result concatenated, 1x1 exit ("R-ELAN", "A2C2f").

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the result; the chain has half of them.
        blocks: The chain, on half of `out_channels`.
        activation: `silu` or `relu`.
        residual: Whether the scaled result is added to the input; needs as many channels in as out.
    """

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {
        "cv1": "entry",
        "cv2": "exit",
        "m": "blocks",
        "gamma": "residual_scale",
    }

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        blocks: list[nn.Module],
        activation: str,
        residual: bool = False,
    ) -> None:
        super().__init__()
        hidden = out_channels // 2
        self.entry = ConvBlock(in_channels, hidden, 1, activation=activation)
        self.blocks = nn.ModuleList(blocks)
        self.exit = ConvBlock((1 + len(blocks)) * hidden, out_channels, 1, activation=activation)
        self.residual = residual
        if residual:
            self.residual_scale = nn.Parameter(RESIDUAL_SCALE * torch.ones(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H, W]."""
        parts = [self.entry(x)]
        for block in self.blocks:
            parts.append(block(parts[-1]))
        result = self.exit(torch.cat(parts, dim=1))
        return x + self.residual_scale.view(1, -1, 1, 1) * result if self.residual else result


def area_elan(
    channels: int, repeats: int, num_areas: int, mlp_ratio: float, activation: str, residual: bool
) -> ResidualElan:
    """A `ResidualElan` whose blocks are two `AreaBlock`s each (the backbone's)."""
    half = channels // 2
    blocks: list[nn.Module] = [
        nn.Sequential(*(AreaBlock(half, num_areas, mlp_ratio, activation) for _ in range(2)))
        for _ in range(repeats)
    ]
    return ResidualElan(channels, channels, blocks, activation, residual)


def bottleneck_elan(in_channels: int, out_channels: int, repeats: int, activation: str) -> ResidualElan:
    """A `ResidualElan` whose blocks are `C3k`s (the neck's)."""
    blocks: list[nn.Module] = [C3k(out_channels // 2, True, activation) for _ in range(repeats)]
    return ResidualElan(in_channels, out_channels, blocks, activation)
