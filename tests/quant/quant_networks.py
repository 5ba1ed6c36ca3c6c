"""Small networks that the tests of `quant` share."""

import torch
from torch import nn

from models.blocks import ConvBlock, RepBottleneck
from models.families.pyramid import Neck
from models.folding import fold_network
from models.heads import DetectionHead
from quant import Placement, calibrate, insert, place


class SmallNet(nn.Module):
    """A residual sum, a concat and an output convolution: images [B, 3, H, W] -> [B, 4, H / 2, W / 2]."""

    def __init__(self):
        super().__init__()
        self.stem = ConvBlock(3, 16, 3, 2)
        self.block = RepBottleneck(16, "silu")
        self.side = ConvBlock(16, 16, 1)
        self.last = ConvBlock(32, 16, 3)
        self.output = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        stem = self.stem(x)
        return self.output(self.last(torch.cat((self.block(stem), self.side(stem)), dim=1)))


class Between(nn.Module):
    """A block between two convolutions and an output convolution, so that it has neighbours on either side."""

    def __init__(self, block, in_channels, out_channels):
        super().__init__()
        self.before = ConvBlock(3, in_channels, 3)
        self.block = block
        self.after = ConvBlock(out_channels, 16, 1)
        self.output = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.output(self.after(self.block(self.before(x))))


class NeckNet(nn.Module):
    """The real neck with a single convolution for every part, on three features of 16 channels, and a head."""

    def __init__(self):
        super().__init__()
        self.stage3, self.stage4, self.stage5 = (
            ConvBlock(3, 16, 3, 8),
            ConvBlock(16, 16, 3, 2),
            ConvBlock(16, 16, 3, 2),
        )
        self.neck = Neck(
            spp=ConvBlock(16, 16, 3),
            top_down4=ConvBlock(32, 16, 3),
            top_down3=ConvBlock(32, 16, 3),
            down4=ConvBlock(16, 16, 3, 2),
            bottom_up4=ConvBlock(32, 16, 3),
            down5=ConvBlock(16, 16, 3, 2),
            bottom_up5=ConvBlock(32, 16, 3),
        )
        self.head = DetectionHead((16, 16, 16), 3, (8, 16, 32), "silu")

    def forward(self, x):
        stage3 = self.stage3(x)
        stage4 = self.stage4(stage3)
        return self.head(self.neck(stage3, stage4, self.stage5(stage4)))


def folded(network):
    """The network as it is quantized: folded, in evaluation mode."""
    fold_network(network)
    return network.eval()


def small_net(seed=0):
    torch.manual_seed(seed)
    return folded(SmallNet())


def small_images(count=2, seed=1, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def small_quantized(seed=0, method="minmax", learn_scales=True, rules=()):
    """A small network with quantizers, calibrated and switched on."""
    network = small_net(seed)
    model = insert(network, place(network, rules=tuple(rules)), learn_scales).eval()
    calibrate(model, [small_images()], method)
    return model


def groups_of(placement: Placement) -> dict[str, tuple[dict[str, tuple[str, ...]], tuple[str, ...]]]:
    """Group name -> ({tensor: its readers}, layers), the part of a plan that the tests write down by hand."""
    return {
        group.name: ({site.name: site.users for site in group.tensors}, group.layers)
        for group in placement.groups
    }
