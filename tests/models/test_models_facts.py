"""Counts against hand-made sums, torch's own FLOP counter and published figures."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import build_detector, fold_detector, measure_network, select_head
from models.facts import count_parameters
from quant import place


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


def test_products_of_two_tensors_are_counted_under_their_placements_names() -> None:
    """YOLO11n has one attention block: 2 heads, 2 x 3 cells at 64 x 96, 32 channels for keys and 64 for values."""
    with torch.device("meta"):
        network = build_detector("yolo11n", 80).network.eval()
    products = [layer for layer in measure_network(network, (64, 96)).layers if layer.kind == "MatMul"]
    name = "neck.spp.attention.blocks.0.attention.matmul"
    assert [(layer.name, layer.macs) for layer in products] == [
        (f"{name}_0", 2 * 6 * 6 * 32),
        (f"{name}_1", 2 * 6 * 6 * 64),
    ]
    assert {layer.name for layer in products} <= set(place(network).kept_float)


@pytest.mark.parametrize("architecture", ["yolov9t", "yolov9e", "yolo11n"])
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
        ("yolov5nu", 2.6e6, 3.85e9),
        ("yolov5su", 9.1e6, 12.0e9),
        ("yolov5mu", 25.1e6, 32.1e9),
        ("yolov5lu", 53.2e6, 67.5e9),
        ("yolov5xu", 97.2e6, 123.2e9),
        ("yolov8n", 3.2e6, 4.35e9),
        ("yolov8s", 11.2e6, 14.3e9),
        ("yolov8m", 25.9e6, 39.45e9),
        ("yolov8l", 43.7e6, 82.6e9),
        ("yolov8x", 68.2e6, 128.9e9),
        ("yolo11n", 2.6e6, 3.25e9),
        ("yolo11s", 9.4e6, 10.75e9),
        ("yolo11m", 20.1e6, 34.0e9),
        ("yolo11l", 25.3e6, 43.45e9),
        ("yolo11x", 56.9e6, 97.45e9),
        ("yolov10n", 2.3e6, 3.35e9),
        pytest.param("yolov10s", 7.2e6, 10.8e9, marks=pytest.mark.exhaustive),
        ("yolov10m", 15.4e6, 29.55e9),
        pytest.param("yolov10b", 19.1e6, 46.0e9, marks=pytest.mark.exhaustive),
        pytest.param("yolov10l", 24.4e6, 60.15e9, marks=pytest.mark.exhaustive),
        pytest.param("yolov10x", 29.5e6, 80.2e9, marks=pytest.mark.exhaustive),
        ("yolo12n", 2.6e6, 3.25e9),
        pytest.param("yolo12s", 9.3e6, 10.7e9, marks=pytest.mark.exhaustive),
        pytest.param("yolo12m", 20.2e6, 33.75e9, marks=pytest.mark.exhaustive),
        ("yolo12l", 26.4e6, 44.45e9),
        pytest.param("yolo12x", 59.1e6, 99.5e9, marks=pytest.mark.exhaustive),
        ("yolo26n", 2.4e6, 2.7e9),
        pytest.param("yolo26s", 9.5e6, 10.35e9, marks=pytest.mark.exhaustive),
        pytest.param("yolo26m", 20.4e6, 34.1e9, marks=pytest.mark.exhaustive),
        ("yolo26l", 24.8e6, 43.2e9),
        pytest.param("yolo26x", 55.7e6, 96.95e9, marks=pytest.mark.exhaustive),
    ],
)
def test_folded_networks_cost_what_is_published(architecture: str, parameters: float, macs: float) -> None:
    """The families' published tables: parameters and FLOPs (2 per multiply-accumulate) as deployed, at 640 px.

    The tool behind those tables counts modules: products of two tensors, as attention has them, are not in them.
    """
    with torch.device("meta"):
        detector = build_detector(architecture, 80)
    detector = select_head(detector, detector.deployed_head)
    facts = measure_network(fold_detector(detector).network, (640, 640))
    assert facts.parameters == pytest.approx(parameters, rel=0.02)
    layers = sum(layer.macs for layer in facts.layers if layer.kind != "MatMul")
    assert layers == pytest.approx(macs, rel=0.02)
    assert facts.strides == (8, 16, 32)


@pytest.mark.parametrize(
    ("architecture", "parameters"),
    [
        ("yolov8n-seg", 3.4e6),
        ("yolov8s-seg", 11.8e6),
        ("yolov8m-seg", 27.3e6),
        ("yolov8l-seg", 46.0e6),
        ("yolov8x-seg", 71.8e6),
        ("yolo11n-seg", 2.9e6),
        ("yolo11s-seg", 10.1e6),
        ("yolo11m-seg", 22.4e6),
        ("yolo11l-seg", 27.6e6),
        ("yolo11x-seg", 62.1e6),
        ("yolo26n-seg", 2.7e6),
        pytest.param("yolo26s-seg", 10.4e6, marks=pytest.mark.exhaustive),
        pytest.param("yolo26m-seg", 23.6e6, marks=pytest.mark.exhaustive),
        pytest.param("yolo26l-seg", 28.0e6, marks=pytest.mark.exhaustive),
        ("yolo26x-seg", 62.8e6),
    ],
)
def test_segmentation_networks_have_the_published_size(architecture: str, parameters: float) -> None:
    with torch.device("meta"):
        detector = build_detector(architecture, 80)
    detector = select_head(detector, detector.deployed_head)
    assert count_parameters(detector.network) == pytest.approx(parameters, rel=0.02)


def test_parameters_of_a_detector() -> None:
    detector = build_detector("yolov9t", 80)
    assert count_parameters(detector) == 2_442_624
