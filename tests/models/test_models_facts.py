"""Counts against hand-made sums, torch's own FLOP counter and published figures."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import build_detector, fold_detector, measure_network
from models.facts import count_parameters


def test_counts_of_a_small_network_by_hand() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False),  # 3 * 16 * 9 weights on 16 x 8 cells
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 8, 3, padding=1, groups=4),  # 8 * 4 * 9 weights on 16 x 8 cells
        nn.ConvTranspose2d(8, 4, 2, 2),  # 8 * 4 * 4 weights on 16 x 8 cells of its input
    )
    facts = measure_network(network, (32, 16))
    assert [layer.macs for layer in facts.layers] == [432 * 128, 288 * 128, 128 * 128]
    assert [layer.name for layer in facts.layers] == ["0", "2", "3"]
    assert facts.layers[1].output_shape == (8, 16, 8)
    assert facts.parameters == 432 + 32 + 288 + 8 + 128 + 4
    assert facts.strides == (1,)


@pytest.mark.parametrize("architecture", ["yolov9t", "yolov9e"])
def test_counts_equal_torchs_counter(architecture: str) -> None:
    with torch.device("meta"):
        network = build_detector(architecture, 80).network.eval()
        counter = FlopCounterMode(display=False)
        with counter:
            network(torch.empty(1, 3, 64, 96))
    assert 2 * measure_network(network, (64, 96)).macs == counter.get_total_flops()


@pytest.mark.parametrize(
    ("architecture", "parameters", "macs"),
    [
        ("yolov9s", 7.1e6, 13.2e9),
        ("yolov9m", 20.0e6, 38.2e9),
        ("yolov9c", 25.3e6, 51.1e9),
        ("yolov9e", 57.3e6, 94.5e9),
    ],
)
def test_folded_networks_cost_what_is_published(architecture: str, parameters: float, macs: float) -> None:
    """YOLOv9's published table: parameters and FLOPs (2 per multiply-accumulate) of the deployed networks at 640 px."""
    with torch.device("meta"):
        detector = build_detector(architecture, 80)
    facts = measure_network(fold_detector(detector).network, (640, 640))
    assert facts.parameters == pytest.approx(parameters, rel=0.02)
    assert facts.macs == pytest.approx(macs, rel=0.02)
    assert facts.strides == (8, 16, 32)


def test_parameters_of_a_detector() -> None:
    detector = build_detector("yolov9t", 80)
    assert count_parameters(detector) == 2_442_624
