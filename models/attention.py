"""Attention blocks of YOLOv10 and YOLO11 (partial self-attention, arXiv:2405.14458, section 3.2).

Convolutions with batch normalisation make queries, keys and values, so that all weights fold and quantize as elsewhere;
the two matrix products and the softmax are plain functions. Parts follow the rules of `models.blocks`.

Shapes: B batch, C channels, H and W in cells of the block's own level, N = H * W cells, h heads.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.blocks import ConvBlock, ConvNorm

HEAD_CHANNELS = 64
KEY_RATIO = 0.5


class Attention(nn.Module):
    """Multi-head self-attention over all cells, with a depthwise convolution of the values as positional encoding.

    Queries and keys have half as many channels as values.

    Args:
        channels: C, split over the heads.
        num_heads: h; must divide C.
    """

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"qkv": "qkv", "proj": "projection", "pe": "position"}

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.value_channels = channels // num_heads
        self.key_channels = int(self.value_channels * KEY_RATIO)
        self.scale = self.key_channels**-0.5
        self.qkv = ConvNorm(channels, channels + 2 * self.key_channels * num_heads, 1)
        self.projection = ConvNorm(channels, channels, 1)
        self.position = ConvNorm(channels, channels, 3, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        batch, channels, height, width = x.shape
        heads = self.qkv(x).reshape(batch, self.num_heads, -1, height * width)
        parts = torch.split(heads, [self.key_channels, self.key_channels, self.value_channels], dim=2)
        query, key, value = parts[0], parts[1], parts[2]
        scores = torch.matmul(query.transpose(-2, -1), key) * self.scale  # [B, h, N, N]
        weights = torch.softmax(scores, dim=-1)
        mixed = torch.matmul(value, weights.transpose(-2, -1)).reshape(batch, channels, height, width)
        encoded = self.position(value.reshape(batch, channels, height, width))
        return self.projection(mixed + encoded)


class AttentionBlock(nn.Module):
    """Attention and a feed-forward network of two 1x1 convolutions, each added to its input.

    Args:
        channels: C; each head has 64 of them.
        activation: `silu` or `relu`; of the feed-forward network.
    """

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"attn": "attention", "ffn": "feed_forward"}

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        self.attention = Attention(channels, channels // HEAD_CHANNELS)
        self.feed_forward = nn.Sequential(
            ConvBlock(channels, 2 * channels, 1, activation=activation), ConvNorm(2 * channels, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        attended = x + self.attention(x)
        return attended + self.feed_forward(attended)


class C2PSA(nn.Module):
    """Split, attention blocks in a chain on the second half, join (YOLO11).

    Args:
        channels: C of input and output; each half has half of them.
        repeats: Number of attention blocks.
        activation: `silu` or `relu`.
    """

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"cv1": "entry", "cv2": "exit", "m": "blocks"}

    def __init__(self, channels: int, repeats: int, activation: str) -> None:
        super().__init__()
        half = channels // 2
        self.entry = ConvBlock(channels, 2 * half, 1, activation=activation)
        self.blocks = nn.Sequential(*(AttentionBlock(half, activation) for _ in range(repeats)))
        self.exit = ConvBlock(2 * half, channels, 1, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        halves = torch.chunk(self.entry(x), 2, dim=1)
        return self.exit(torch.cat((halves[0], self.blocks(halves[1])), dim=1))


class PSA(AttentionBlock):
    """Split, one attention block on the second half, join (YOLOv10); a `C2PSA` whose block's parts are its own."""

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {
        "cv1": "entry",
        "cv2": "exit",
        **AttentionBlock.OFFICIAL_NAMES,
    }

    def __init__(self, channels: int, activation: str) -> None:
        half = channels // 2
        super().__init__(half, activation)
        self.entry = ConvBlock(channels, 2 * half, 1, activation=activation)
        self.exit = ConvBlock(2 * half, channels, 1, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        halves = torch.chunk(self.entry(x), 2, dim=1)
        return self.exit(torch.cat((halves[0], super().forward(halves[1])), dim=1))
