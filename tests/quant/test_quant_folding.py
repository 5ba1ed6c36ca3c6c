"""Folding on the graph computes what the network computed, in float64, and folds exactly what it may."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_small, resnet18
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.ops.misc import FrozenBatchNorm2d

from core.errors import TraceError
from quant import fold_batchnorms


def shake(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give every normalisation statistics and gains that matter."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | FrozenBatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
                (module.weight, -1.5, 1.5),
                (module.bias, -0.5, 0.5),
            ):
                if tensor is not None:
                    drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                    tensor.data.copy_(low + (high - low) * drawn)
    return network.double().eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def difference(network: nn.Module, folded: nn.Module, *shape: int) -> float:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.inference_mode():
        wanted = network(images)
        return float((folded(images) - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))


class Shared(nn.Module):
    """One layer and one normalisation for two levels, as detection heads have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, groups=1, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        fine = torch.relu(self.norm(self.conv(x)))
        coarse = torch.relu(self.norm(self.conv(x[:, :, ::2, ::2])))
        return fine[:, :, ::2, ::2] + coarse


class Kept(nn.Module):
    """Four normalisations that must stay: before a layer, beside another reader, without statistics, own one each."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 8, 3)
        self.beside = nn.BatchNorm2d(8)
        self.statless = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, track_running_stats=False))
        self.twice = nn.Conv2d(8, 8, 1)
        self.one, self.other = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.before(x))
        x = self.statless(x + self.beside(x))
        return self.one(self.twice(x)) + self.other(self.twice(x))


class Layers(nn.Module):
    """Every kind of layer that takes a normalisation in, and the places of the transposed groups."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8, affine=False),
            nn.ConvTranspose2d(8, 12, 3, stride=2, groups=4),
            nn.BatchNorm2d(12),
            nn.Conv2d(12, 12, 3, groups=12),
            nn.BatchNorm2d(12, eps=0.01),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(48, 5),
            nn.BatchNorm1d(5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize(
    "build", [Layers, Shared, lambda: resnet18(weights=None), lambda: mobilenet_v3_small(weights=None)]
)
def test_folded_is_equal_and_has_no_normalisation_left(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network = shake(build())
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    folded = fold_batchnorms(network)
    assert norms(folded) == 0
    assert difference(network, folded, 2, 3, 48, 48) < 1e-9
    assert not folded.training
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "the network itself was changed"


def test_frozen_normalisations_of_torchvision_are_folded() -> None:
    torch.manual_seed(0)
    network = shake(resnet18(weights=None, norm_layer=FrozenBatchNorm2d))
    folded = fold_batchnorms(network)
    assert difference(network, folded, 2, 3, 48, 48) < 1e-9
    kinds = {type(module).__name__ for module in folded.modules()}
    assert not kinds & {"FrozenBatchNorm2d", "BatchNorm2d"}
    assert not [node for node in folded.graph.nodes if node.op == "get_attr"]


def test_what_cannot_be_folded_stays() -> None:
    torch.manual_seed(0)
    network = shake(Kept())
    folded = fold_batchnorms(network)
    assert norms(folded) == 5
    assert difference(network, folded, 2, 3, 16, 16) < 1e-9


def test_a_detector_of_torchvision_folds_with_its_names() -> None:
    torch.manual_seed(0)
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    network = shake(model.backbone)
    folded = fold_batchnorms(network)
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        for wanted, found in zip(network(images).values(), folded(images).values(), strict=True):
            assert float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1.0)) < 1e-9
    assert norms(folded) == 0
    layers = {name for name, module in folded.named_modules() if isinstance(module, nn.Conv2d)}
    assert layers == {name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}


class Branching(nn.Module):
    """Control flow on values: no graph."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line that the message names
            return x
        return -x


def test_an_untraceable_network_names_its_line() -> None:
    with pytest.raises(TraceError, match=r"test_quant_folding\.py:\d+ \(forward\)"):
        fold_batchnorms(Branching())
