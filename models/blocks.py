"""Building blocks of the YOLOv9 / GELAN networks (arXiv:2402.13616), as plain PyTorch.

Constraints: the networks are traced by `torch.fx`, folded, quantized and exported, so a block holds
only leaf modules and pure functions, every tensor that a deployment engine sees is a module's output, activations are
never in place, and nothing depends on the values in a tensor. Module names say what a part does; `OFFICIAL_NAMES` on
each class maps the names used by the official checkpoints to them, so that a checkpoint's key can be walked down the
module tree.

Shapes: B batch, C channels, H and W in cells of the block's own level.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

BATCH_NORM_EPS = 1e-3
BATCH_NORM_MOMENTUM = 0.03

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU}


def make_activation(name: str) -> nn.Module:
    """Return a fresh, not in-place activation module.

    Args:
        name: `silu` or `relu`.

    Raises:
        ValueError: For any other name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"Activation {name!r} is unknown; expected one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]()


class ConvNorm(nn.Module):
    """Convolution and batch normalisation, without an activation; padded by half the kernel if not told otherwise."""

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"conv": "conv", "bn": "bn"}

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        pad = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, padding=pad, groups=groups, bias=False
        )
        self.bn: nn.Module = nn.BatchNorm2d(out_channels, eps=BATCH_NORM_EPS, momentum=BATCH_NORM_MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        return self.bn(self.conv(x))


class ConvBlock(ConvNorm):
    """Convolution, batch normalisation, activation. After folding, `conv` has a bias and `bn` is an `nn.Identity`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        activation: str = "silu",
        padding: int | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, groups, padding)
        self.act = make_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        return self.act(self.bn(self.conv(x)))


class RepConvBlock(nn.Module):
    """Two convolutions side by side, 3x3 and 1x1, summed before the activation (RepVGG, arXiv:2101.03697).

    Folding replaces the whole block by one `ConvBlock` with the larger kernel under the same name.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the result.
        activation: `silu` or `relu`.
        kernels: Sizes of the kernels, the larger one first.
        groups: Groups of both convolutions.
    """

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"conv1": "dense", "conv2": "pointwise"}
    BRANCHES: ClassVar[tuple[str, str]] = ("dense", "pointwise")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        activation: str,
        kernels: tuple[int, int] = (3, 1),
        groups: int = 1,
    ) -> None:
        super().__init__()
        for name, kernel in zip(self.BRANCHES, kernels, strict=True):
            self.add_module(name, ConvNorm(in_channels, out_channels, kernel, groups=groups))
        self.act = make_activation(activation)

    @property
    def branches(self) -> tuple[ConvNorm, ConvNorm]:
        """The two convolutions, the larger kernel first."""
        return getattr(self, self.BRANCHES[0]), getattr(self, self.BRANCHES[1])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        large, small = self.branches
        return self.act(large(x) + small(x))


class RepBottleneck(nn.Module):
    """Residual block x + conv(rep(x)); the width does not change."""

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"cv1": "rep", "cv2": "conv"}

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        self.rep = RepConvBlock(channels, channels, activation)
        self.conv = ConvBlock(channels, channels, 3, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        return x + self.conv(self.rep(x))


class RepCSP(nn.Module):
    """Cross-stage partial block: residual blocks and a plain 1x1 path in parallel, joined at the exit."""

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {
        "cv1": "entry",
        "cv2": "shortcut",
        "cv3": "exit",
        "m": "bottlenecks",
    }

    def __init__(self, in_channels: int, out_channels: int, repeats: int, activation: str) -> None:
        super().__init__()
        hidden = out_channels // 2
        self.entry = ConvBlock(in_channels, hidden, 1, activation=activation)
        self.shortcut = ConvBlock(in_channels, hidden, 1, activation=activation)
        self.bottlenecks = nn.Sequential(*(RepBottleneck(hidden, activation) for _ in range(repeats)))
        self.exit = ConvBlock(2 * hidden, out_channels, 1, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        return self.exit(torch.cat((self.bottlenecks(self.entry(x)), self.shortcut(x)), dim=1))


class CSPBranch(nn.Module):
    """One computational branch of a `CSPElan`: a `RepCSP` and a 3x3 convolution."""

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"0": "csp", "1": "conv"}

    def __init__(self, in_channels: int, out_channels: int, repeats: int, activation: str) -> None:
        super().__init__()
        self.csp = RepCSP(in_channels, out_channels, repeats, activation)
        self.conv = ConvBlock(out_channels, out_channels, 3, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        return self.conv(self.csp(x))


class Elan(nn.Module):
    """Split, two branches in a chain, concatenate all four parts, 1x1 convolution (the ELAN layout).

    Each branch has half the channels of the entry. In this simplest form a branch is one 3x3 convolution.

    Args:
        in_channels: Channels of the input.
        hidden: Channels of the entry convolution, before the split.
        out_channels: Channels of the result.
        activation: `silu` or `relu`.
    """

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {
        "cv1": "entry",
        "cv2": "branch1",
        "cv3": "branch2",
        "cv4": "exit",
    }

    def __init__(self, in_channels: int, hidden: int, out_channels: int, activation: str) -> None:
        super().__init__()
        half = hidden // 2
        self.entry = ConvBlock(in_channels, hidden, 1, activation=activation)
        self.branch1: nn.Module = ConvBlock(half, half, 3, activation=activation)
        self.branch2: nn.Module = ConvBlock(half, half, 3, activation=activation)
        self.exit = ConvBlock(2 * hidden, out_channels, 1, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        halves = torch.chunk(self.entry(x), 2, dim=1)
        first = self.branch1(halves[1])
        second = self.branch2(first)
        return self.exit(torch.cat((halves[0], halves[1], first, second), dim=1))


class CSPElan(Elan):
    """The generalised ELAN (GELAN): an `Elan` whose branches are `CSPBranch`es with `repeats` residual blocks each."""

    def __init__(
        self, in_channels: int, hidden: int, out_channels: int, repeats: int, activation: str
    ) -> None:
        super().__init__(in_channels, hidden, out_channels, activation)
        half = hidden // 2
        self.branch1 = CSPBranch(half, half, repeats, activation)
        self.branch2 = CSPBranch(half, half, repeats, activation)


class AverageDown(nn.Module):
    """Halve the resolution: a 2x2 average at stride 1, then a 3x3 convolution at stride 2."""

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"cv1": "conv"}

    def __init__(self, in_channels: int, out_channels: int, activation: str) -> None:
        super().__init__()
        self.average = nn.AvgPool2d(2, stride=1)
        self.conv = ConvBlock(in_channels, out_channels, 3, 2, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        return self.conv(self.average(x))


class SplitDown(nn.Module):
    """Halve the resolution on two paths: average, then half the channels convolved at stride 2 and half max-pooled."""

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"cv1": "conv", "cv2": "pooled_conv"}

    def __init__(self, in_channels: int, out_channels: int, activation: str) -> None:
        super().__init__()
        self.average = nn.AvgPool2d(2, stride=1)
        self.conv = ConvBlock(in_channels // 2, out_channels // 2, 3, 2, activation=activation)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.pooled_conv = ConvBlock(in_channels // 2, out_channels // 2, 1, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        halves = torch.chunk(self.average(x), 2, dim=1)
        return torch.cat((self.conv(halves[0]), self.pooled_conv(self.pool(halves[1]))), dim=1)


class SPPElan(nn.Module):
    """Spatial pyramid pooling in the ELAN layout: three 5x5 max-pools in a chain, all four maps concatenated."""

    OFFICIAL_NAMES: ClassVar[dict[str, str]] = {"cv1": "entry", "cv5": "exit"}

    def __init__(self, in_channels: int, hidden: int, out_channels: int, activation: str) -> None:
        super().__init__()
        self.entry: nn.Module = ConvBlock(in_channels, hidden, 1, activation=activation)
        self.pool1 = nn.MaxPool2d(5, stride=1, padding=2)
        self.pool2 = nn.MaxPool2d(5, stride=1, padding=2)
        self.pool3 = nn.MaxPool2d(5, stride=1, padding=2)
        self.exit = ConvBlock(4 * hidden, out_channels, 1, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        entry = self.entry(x)
        once = self.pool1(entry)
        twice = self.pool2(once)
        thrice = self.pool3(twice)
        return self.exit(torch.cat((entry, once, twice, thrice), dim=1))
