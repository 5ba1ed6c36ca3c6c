"""Structure of the networks: traceability, shapes, folding."""

import pytest
import torch
from torch import nn

from core.families import DETECTORS
from models import build_detector, fold_detector, select_head


def randomise_statistics(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.running_mean, part.running_var, part.weight, part.bias):
                assert tensor is not None
                tensor.data.uniform_(0.5, 1.5, generator=generator)


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("architecture", DETECTORS)
def test_network_is_traceable_and_has_three_levels(architecture: str, activation: str) -> None:
    with torch.device("meta"):
        detector = build_detector(architecture, 5, activation)
        detector = select_head(detector, detector.deployed_head)
        graph = torch.fx.symbolic_trace(detector.network)
        raw = graph(torch.zeros(2, 3, 64, 96))
    sides = 4 if architecture.startswith("yolo26") else 64
    assert [tuple(box.shape) for box, _ in raw] == [(2, sides, 8, 12), (2, sides, 4, 6), (2, sides, 2, 3)]
    assert [tuple(cls.shape) for _, cls in raw] == [(2, 5, 8, 12), (2, 5, 4, 6), (2, 5, 2, 3)]
    kinds = {type(module) for module in detector.network.modules()}
    assert (nn.SiLU in kinds) == (activation == "silu")
    assert (nn.ReLU in kinds) == (activation == "relu")


def test_folding_does_not_change_the_output() -> None:
    torch.manual_seed(0)
    detector = build_detector("yolov9t", 3).double().eval()
    randomise_statistics(detector)
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    before = {key: tensor.clone() for key, tensor in detector.state_dict().items()}
    folded = fold_detector(detector)
    with torch.no_grad():
        difference = (folded(images) - detector(images)).abs().max()
    assert difference < 1e-9
    assert folded.folded
    assert not detector.folded
    assert all(torch.equal(before[key], tensor) for key, tensor in detector.state_dict().items())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert not any(name.endswith(("dense", "pointwise")) for name, _ in folded.named_modules())


def test_folding_twice_is_folding_once() -> None:
    once = fold_detector(build_detector("yolov9t", 3))
    twice = fold_detector(once).state_dict()
    assert all(torch.equal(twice[key], tensor) for key, tensor in once.state_dict().items())


def test_single_precision_folding_stays_close() -> None:
    torch.manual_seed(0)
    detector = build_detector("yolov9t", 3).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        difference = (fold_detector(detector)(images) - detector(images)).abs().max()
    assert difference < 1e-2  # pixels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("yolov9x", 3), "yolov9x"),
        (("yolov9t", 0), "num_classes is 0"),
        (("yolov9t", 3, "gelu"), "gelu"),
        (("yolov9t", 3, "silu", ("one",)), "1 names were given for 3"),
    ],
)
def test_impossible_detectors_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_detector(*arguments)  # type: ignore[arg-type]
