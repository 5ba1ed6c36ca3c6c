"""Names in `core` against what the packages implement, and a second family beside the first."""

import re

import pytest
import torch
from model_fixtures import official_state
from torch import Tensor, nn

from core import families
from core.choices import ACTIVATIONS
from core.errors import CheckpointError
from models import blocks, build_detector, fold_detector
from models.boxes import Decode
from models.checkpoints import interpretation
from models.checkpoints.convert import official_name
from models.checkpoints.loading import detector_from_checkpoint
from models.checkpoints.reading import Checkpoint
from models.families import registry
from models.families.family import Family
from models.heads import DetectionHead, HeadBuilder


@pytest.mark.parametrize("entry", families.FAMILIES, ids=lambda entry: entry.name)
def test_an_entry_names_what_its_module_builds(entry: families.FamilyEntry) -> None:
    family = registry.load_family(entry)
    assert set(family.builders) == {*entry.detectors, *entry.segmenters}


def test_each_architecture_has_one_family() -> None:
    assert len(set(families.ARCHITECTURES)) == len(families.ARCHITECTURES)
    with pytest.raises(ValueError, match=r"'yolov9x' is unknown.*closest"):
        build_detector("yolov9x", 2)


def test_names_of_activations_are_those_implemented() -> None:
    assert set(ACTIVATIONS) == set(blocks.ACTIVATIONS)


SMALL = re.compile(r"yolov9t|.*\d+n")


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=[] if SMALL.match(name) else pytest.mark.exhaustive)
        for name in families.ARCHITECTURES
    ],
)
def test_each_size_is_found_by_its_shapes(architecture: str) -> None:
    with torch.device("meta"):
        detector = build_detector(architecture, 3)
        folded = fold_detector(detector)
    for model, is_folded in ((detector, False), (folded, True)):
        match = interpretation.interpret(Checkpoint(official_state(model)), "x.pt").match
        assert (match.architecture, match.folded) == (architecture, is_folded)


# -- a second family: an entry, and a module with a `Family`


class TwoLevels(nn.Module):
    """A toy network of two levels whose official checkpoints have the head at layer 2."""

    def __init__(self, num_classes: int, activation: str, head: HeadBuilder) -> None:
        super().__init__()
        self.stem = blocks.ConvBlock(3, 16, 3, 8, activation=activation)
        self.down = blocks.ConvBlock(16, 16, 3, 2, activation=activation)
        self.head = head((16, 16), num_classes, (8, 16), activation)
        self.official_layers = {"stem": 0, "down": 1, **self.head.official_layers(2)}

    def forward(self, images: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        fine = self.stem(images)
        return self.head((fine, self.down(fine)))  # type: ignore[no-any-return]


TOY = Family(
    builders={"toy": TwoLevels},
    strides=(8, 16),
    heads={"official": DetectionHead},
    segmentation_heads={},
    class_bias=re.compile(r"^model\.2\.cv3\.0\.2\.bias$"),
    has_masks=lambda state: False,
    find_head_style=lambda state: "official",
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = families.FamilyEntry("toy", f"{__name__}:TOY", ("toy",))
    for module in (registry, interpretation):
        monkeypatch.setattr(module, "FAMILIES", (*families.FAMILIES, entry))


@pytest.mark.usefixtures("toy")
def test_a_family_is_an_entry_and_its_module() -> None:
    detector = build_detector("toy", 3).eval()
    assert isinstance(detector.decode, Decode)
    images = torch.rand(1, 3, 32, 32)
    assert detector(images).shape == (1, 7, 16 + 4)
    official = {
        f"model.{official_name(detector.network, key)}": tensor
        for key, tensor in detector.network.state_dict().items()
    }
    loaded = detector_from_checkpoint(Checkpoint(official), "toy.pt", activation="silu")
    assert (loaded.architecture, loaded.num_classes, loaded.strides) == ("toy", 3, (8, 16))
    assert torch.equal(loaded(images), detector(images))
    del official["model.0.bn.bias"]
    with pytest.raises(CheckpointError, match=r"closest is toy: missing: model\.0\.bn\.bias"):
        detector_from_checkpoint(Checkpoint(official), "toy.pt")


@pytest.mark.usefixtures("toy")
def test_a_second_family_leaves_the_first_as_it_is() -> None:
    detector = build_detector("yolov9t", 2).eval()
    official = {
        f"model.{official_name(detector.network, key)}": tensor
        for key, tensor in detector.network.state_dict().items()
    }
    assert detector_from_checkpoint(Checkpoint(official), "t.pt").architecture == "yolov9t"
