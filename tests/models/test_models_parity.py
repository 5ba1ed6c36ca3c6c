"""Networks against recorded outputs of the official ones, in float64."""

from pathlib import Path

import pytest
import torch
from model_fixtures import fixture_images, fixture_output, fixture_state

from models import fold_detector, load_detector
from models.checkpoints.loading import detector_from_checkpoint
from models.checkpoints.reading import Checkpoint

SMALL = {
    **{f"{form}-{size}": f"yolov9{size}" for form in ("gelan", "yolov9") for size in "tsmce"},
    **{f"mit-v9-{size}": f"yolov9{size}" for size in "tsc"},
    "yolov5n": "yolov5nu",
    **{name: name for name in ("yolov8n", "yolo11n")},
}
LARGE = ("yolov8m", "yolov8x", "yolo11m", "yolo11x")
FIXTURES = [
    *SMALL.items(),
    *(pytest.param(name, name, marks=pytest.mark.exhaustive) for name in LARGE),
]


@pytest.mark.parametrize(("fixture", "architecture"), FIXTURES)
def test_output_equals_the_official_network(shared_data: Path, fixture: str, architecture: str) -> None:
    folder = shared_data / "parity"
    detector = detector_from_checkpoint(
        Checkpoint(fixture_state(folder, fixture)), fixture, activation="silu"
    ).double()
    images, expected = fixture_images(folder).double(), fixture_output(folder, fixture)
    with torch.no_grad():
        as_loaded = detector(images)
        folded = fold_detector(detector)(images)
    assert detector.architecture == architecture
    assert (as_loaded - expected).abs().max() < 1e-6
    assert (folded - expected).abs().max() < 1e-4


@pytest.mark.parametrize("fixture", ["yolov8n-seg", "yolo11n-seg"])
def test_segmentation_equals_the_official_network(shared_data: Path, fixture: str) -> None:
    folder = shared_data / "parity"
    detector = detector_from_checkpoint(
        Checkpoint(fixture_state(folder, fixture)), fixture, activation="silu"
    ).double()
    wanted = (fixture_output(folder, fixture), fixture_output(folder, fixture, "prototypes"))
    images = fixture_images(folder).double()
    with torch.no_grad():
        as_loaded = detector(images)
        folded = fold_detector(detector)(images)
    assert (detector.architecture, detector.task) == (fixture, "segment")
    for index, expected in enumerate(wanted):
        assert (as_loaded[index] - expected).abs().max() < 1e-6
        assert (folded[index] - expected).abs().max() < 1e-4


def test_trained_checkpoint_loads_with_its_names(shared_data: Path) -> None:
    detector = load_detector(shared_data / "weights" / "gelan-t-bccd.pt")
    assert detector.architecture == "yolov9t"
    assert detector.names == ("RBC", "WBC", "Platelets")
    assert detector.activation == "silu"
    assert not detector.folded
    assert {parameter.dtype for parameter in detector.parameters()} == {torch.float32}


def test_ema_of_an_unstripped_checkpoint_is_the_stripped_model(shared_data: Path) -> None:
    stripped = load_detector(shared_data / "weights" / "gelan-t-bccd.pt").state_dict()
    unstripped = load_detector(shared_data / "weights" / "gelan-t-bccd-unstripped.pt").state_dict()
    assert stripped.keys() == unstripped.keys()
    assert all(torch.equal(stripped[key], unstripped[key]) for key in stripped if "num_batches" not in key)
