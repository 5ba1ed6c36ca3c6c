"""Small networks that the tests of this room share."""

import torch
from torch import nn

from models.blocks import ConvBlock, RepBottleneck
from models.folding import fold_network
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
