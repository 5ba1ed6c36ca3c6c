"""Segmentation: heads against plain functional sums and recorded figures, checkpoints of every form, masks by hand."""

import itertools
import math
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from model_fixtures import recipe_state, waves
from torch import Tensor

from core.errors import CheckpointError
from models import Detector, build_detector, fold_detector, load_detector, save_detector
from models.checkpoints.convert import official_name
from models.checkpoints.loading import detector_from_checkpoint
from models.checkpoints.reading import Checkpoint
from models.segmentation import SEGMENTATION_HEADS, soft_masks, suppress_segments


def official_state(style: str, classes: int = 3) -> dict[str, Tensor]:
    """A state dict under official names, filled by the fixtures' recipe."""
    with torch.device("meta"):
        network = build_detector("yolov9c-seg", classes, head_style=style).network
    return recipe_state(
        {
            f"model.{official_name(network, key)}": tuple(tensor.shape)
            for key, tensor in network.state_dict().items()
        }
    )


def load(state: Mapping[str, Tensor]) -> Detector:
    return detector_from_checkpoint(Checkpoint(dict(state)), "x.pt", activation="silu").double()


def conv_block(state: Mapping[str, Tensor], name: str, x: Tensor, groups: int = 1) -> Tensor:
    weight = state[f"{name}.conv.weight"].double()
    y = F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=groups)
    statistics = [
        state[f"{name}.bn.{part}"].double() for part in ("running_mean", "running_var", "weight", "bias")
    ]
    return F.silu(F.batch_norm(y, *statistics, eps=1e-3))


def branch(state: Mapping[str, Tensor], name: str, x: Tensor, groups: int = 1) -> Tensor:
    y = conv_block(state, f"{name}.1", conv_block(state, f"{name}.0", x), groups)
    return F.conv2d(y, state[f"{name}.2.weight"].double(), state[f"{name}.2.bias"].double(), groups=groups)


def check_levels(
    state: Mapping[str, Tensor],
    head: str,
    groups: int,
    features: list[Tensor],
    raw: tuple[tuple[Tensor, ...], ...],
) -> None:
    for i, (feature, (box, cls, mask)) in enumerate(zip(features, raw, strict=True)):
        assert torch.allclose(box, branch(state, f"{head}.cv2.{i}", feature, groups))
        assert torch.allclose(cls, branch(state, f"{head}.cv3.{i}", feature))
        assert torch.allclose(mask, branch(state, f"{head}.cv4.{i}", feature))


@pytest.fixture(scope="module")
def features() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 256, 4, 4), (1, 512, 2, 2), (1, 512, 1, 1)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_plain_head_equals_its_definition(features: list[Tensor]) -> None:
    """`Segment`: prototypes are 3x3 conv, nearest enlargement, 3x3 conv, 1x1 conv on the finest level."""
    state = official_state("official")
    detector = load(state)
    assert (detector.architecture, detector.head_style, detector.task) == (
        "yolov9c-seg",
        "official",
        "segment",
    )
    with torch.no_grad():
        levels, prototypes = detector.network.get_submodule("head")(features)
    check_levels(state, "model.22", 1, features, levels)
    large = F.interpolate(
        conv_block(state, "model.22.proto.cv1", features[0]), scale_factor=2, mode="nearest"
    )
    expected = conv_block(state, "model.22.proto.cv3", conv_block(state, "model.22.proto.cv2", large))
    assert prototypes.shape == (1, 32, 8, 8)
    assert torch.allclose(prototypes, expected)


@pytest.mark.parametrize(("style", "repeats"), [("branched", 1), ("deeply-branched", 2)])
def test_branched_head_equals_its_definition(features: list[Tensor], style: str, repeats: int) -> None:
    """`DSegment`: layers 22 (GELAN block), 23 (enlargement), 24 (3x3 conv), and a 1x1 conv in the head, layer 25."""
    state = official_state(style)
    assert ("model.22.cv2.0.m.1.cv2.conv.weight" in state) == (repeats == 2)
    detector = load(state)
    assert detector.head_style == style
    head = detector.network.get_submodule("head")
    with torch.no_grad():
        levels, prototypes = head(features)
        block = head.get_submodule("prototype_elan")(features[0])
    check_levels(state, "model.25", 4, features, levels)
    fine = conv_block(state, "model.24", F.interpolate(block, scale_factor=2, mode="nearest"))
    assert torch.allclose(prototypes, conv_block(state, "model.25.proto", fine))


def test_ultralytics_network_computes_what_ultralytics_computes() -> None:
    """Figures recorded once from Ultralytics 8.3.3 `yolov9c-seg` in float64, filled by the same recipe."""
    detector = load(official_state("ultralytics"))
    with torch.no_grad():
        output, prototypes = detector(waves(64))
    assert output.shape == (1, 4 + 3 + 32, 84)
    recorded = {
        (0, 0, 0): 4.11063339502088,
        (0, 3, 83): 484.1182578427472,
        (0, 5, 10): 0.42503062543809356,
        (0, 7, 0): -0.054202717401597135,
        (0, 38, 60): 0.10186441123843372,
    }
    for index, value in recorded.items():
        assert float(output[index]) == pytest.approx(value, rel=1e-9)
    assert float(output.sum()) == pytest.approx(32656.451064714078, rel=1e-9)
    assert float(prototypes.sum()) == pytest.approx(151.3809822521466, rel=1e-9)


def test_checkpoint_with_a_silent_first_layer() -> None:
    """`yolov9-c-seg`: all layers one later than in `gelan-c-seg`."""
    state = official_state("official")
    shifted = {}
    for key, tensor in state.items():
        _, layer, rest = key.split(".", 2)
        shifted[f"model.{int(layer) + 1}.{rest}"] = tensor
    first, second = load(state).state_dict(), load(shifted).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def training_form(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`yolov9-c-dseg`: main neck one later, prototype layers at 41 and 43, heads at 44, auxiliary layers between."""
    heads = {"cv2": "cv4", "cv3": "cv5", "cv4": "cv7", "proto": "proto2", "dfl": "dfl2"}
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        _, number, rest = key.split(".", 2)
        layer = int(number)
        if layer == 25:
            name, _, tail = rest.partition(".")
            result[f"model.44.{heads[name]}.{tail}"] = tensor
        else:
            result[f"model.{ {22: 41, 24: 43}.get(layer, layer + 1) }.{rest}"] = tensor
    for key in ("23.conv.weight", "37.cv4.conv.weight", "40.conv.weight", "44.cv2.0.2.bias", "44.cv3.0.2.weight",
                "44.cv6.0.2.weight", "44.proto.conv.weight", "44.dfl.conv.weight"):  # fmt: skip
        result[f"model.{key}"] = torch.arange(16.0).reshape(1, 16, 1, 1)
    return result


def test_training_checkpoint_is_converted() -> None:
    state = official_state("deeply-branched")
    first, second = load(state).state_dict(), load(training_form(state)).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    broken = training_form(state)
    del broken["model.44.cv7.1.2.weight"]
    with pytest.raises(CheckpointError, match=r"missing: model\.44\.cv7\.1\.2\.weight$"):
        load(broken)


@pytest.mark.parametrize("style", SEGMENTATION_HEADS)
def test_networks_trace_fold_and_save(style: str, tmp_path: object) -> None:
    with torch.device("meta"):
        graph = torch.fx.symbolic_trace(build_detector("yolov9c-seg", 4, head_style=style).network)
        levels, prototypes = graph(torch.zeros(1, 3, 64, 96))
    assert [tuple(mask.shape) for _, _, mask in levels] == [(1, 32, 8, 12), (1, 32, 4, 6), (1, 32, 2, 3)]
    assert prototypes.shape == (1, 32, 16, 24)


def test_folding_and_saving_keep_the_output(tmp_path: object) -> None:
    detector = load(official_state("branched"))
    path = f"{tmp_path}/a.safetensors"
    save_detector(fold_detector(detector), path)
    back = load_detector(path).double()
    assert (back.task, back.folded, back.head_style) == ("segment", True, "branched")
    with torch.no_grad():
        for before, after in zip(detector(waves(64)), fold_detector(detector)(waves(64)), strict=True):
            assert (before - after).abs().max() < 1e-8
        for before, after in zip(detector(waves(64)), back(waves(64)), strict=True):
            assert (before - after).abs().max() < 1e-1  # weights went through float32


def test_kept_coefficients_are_those_of_the_kept_boxes() -> None:
    decoded = torch.zeros(1, 4 + 2 + 32, 5)
    decoded[0, :4] = torch.tensor(
        [[10, 11, 40, 80, 80], [10, 10, 40, 80, 80], [8, 8, 8, 8, 8], [8, 8, 8, 8, 8.0]]
    )
    decoded[0, 4] = torch.tensor([0.9, 0.8, 0.0, 0.7, 0.0])
    decoded[0, 5] = torch.tensor([0.0, 0.0, 0.6, 0.0, 0.5])
    decoded[0, 6:] = torch.arange(5.0)
    ((detections, coefficients),) = suppress_segments(decoded, 0.1, 0.5)
    assert detections[:, 4].tolist() == pytest.approx([0.9, 0.7, 0.6, 0.5])
    assert detections[:, 5].tolist() == [0, 0, 1, 1]
    assert coefficients[:, 0].tolist() == [0, 3, 2, 4]  # the second lost to the first


def test_masks_equal_a_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    prototypes = torch.randn(2, 3, 4, generator=generator)
    coefficients = torch.tensor([[1.0, -0.5], [-2.0, 0.7]])
    masks = soft_masks(prototypes, coefficients)
    assert masks.shape == (2, 3, 4)
    for n, y, x in itertools.product(range(2), range(3), range(4)):
        total = sum(float(coefficients[n, p] * prototypes[p, y, x]) for p in range(2))
        assert float(masks[n, y, x]) == pytest.approx(1 / (1 + math.exp(-total)), abs=1e-6)
    assert soft_masks(prototypes, coefficients[:0]).shape == (0, 3, 4)
