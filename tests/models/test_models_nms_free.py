"""Networks with a one-to-many and a one-to-one head: against recorded outputs, one head alone, choice without NMS."""

from pathlib import Path

import numpy as np
import pytest
import torch
from model_fixtures import fixture_images, fixture_output, fixture_state, official_state
from torch import Tensor

from models import (
    Detector,
    best_pairs,
    build_detector,
    fold_detector,
    load_detector,
    save_detector,
    select_head,
)
from models.boxes import Decode, centre_to_corners
from models.checkpoints.loading import detector_from_checkpoint
from models.checkpoints.reading import Checkpoint

DUAL = [
    *("yolov10n", "yolo26n", "yolo26n-seg"),
    pytest.param("yolo26m", marks=pytest.mark.exhaustive),
]
ONE2MANY_KEYS = ("model.23.cv2.", "model.23.cv3.", "model.23.cv4.")


def load(folder: Path, name: str, dropped: tuple[str, ...] = ()) -> Detector:
    state = {key: value for key, value in fixture_state(folder, name).items() if not key.startswith(dropped)}
    return detector_from_checkpoint(Checkpoint(state), name, activation="silu").double()


def run(detector: Detector, images: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        result = detector(images)
    return result if isinstance(result, tuple) else (result,)


def as_corners(decoded: Tensor) -> Tensor:
    boxes = centre_to_corners(decoded[:, :4].transpose(1, 2)).transpose(1, 2)
    return torch.cat((boxes, decoded[:, 4:]), dim=1)


def assert_same_detections(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Rows [N, 6] by falling score; rows whose scores differ by less than 1e-9 may be ordered otherwise."""
    assert (found[:, 4] - expected[:, 4]).abs().max() < max(tolerance, 1e-9)
    near = (found[:, None, 4] - expected[None, :, 4]).abs() < max(tolerance, 1e-9)
    distance = (found[:, None] - expected[None]).abs().amax(dim=2).masked_fill(~near, torch.inf)
    assert distance.amin(dim=0).max() < tolerance
    assert distance.amin(dim=1).max() < tolerance


@pytest.mark.parametrize("name", DUAL)
def test_both_heads_equal_the_official_network(shared_data: Path, name: str) -> None:
    folder = shared_data / "parity"
    images = fixture_images(folder).double()
    detector = load(folder, name)
    assert (detector.architecture, detector.heads) == (name, ("one2many", "one2one"))
    assert detector.deployed_head == "one2one"
    masks = 32 if name.endswith("-seg") else 0
    detections = fixture_output(folder, name, "detections")
    for head, array in (("one2many", "output"), ("one2one", "one2one")):
        chosen = select_head(detector, head)
        expected = fixture_output(folder, name, array)
        for form, tolerance in ((chosen, 1e-6), (fold_detector(chosen), 1e-4)):
            decoded, *rest = run(form, images)
            compared = decoded if head == "one2many" else as_corners(decoded)
            assert (compared - expected).abs().max() < tolerance
            if masks:
                prototypes = fixture_output(folder, name, "prototypes")
                assert (rest[0] - prototypes).abs().max() < tolerance
            if head == "one2one":
                rows = 84 if masks else decoded.shape[1]
                for (found, anchors), wanted, image in zip(
                    best_pairs(decoded[:, :rows], 0.0), detections, decoded, strict=True
                ):
                    whole = torch.cat((found, image[rows:, anchors].t()), dim=1)
                    assert whole.shape == wanted.shape
                    assert_same_detections(whole, wanted, tolerance)


@pytest.mark.parametrize("name", ["yolo12n"])
def test_area_attention_equals_the_official_network(shared_data: Path, name: str) -> None:
    folder = shared_data / "parity"
    images, expected = fixture_images(folder).double(), fixture_output(folder, name)
    detector = load(folder, name)
    assert (detector.architecture, detector.heads) == (name, ("one2many",))
    assert (run(detector, images)[0] - expected).abs().max() < 1e-6
    assert (run(fold_detector(detector), images)[0] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["yolov10n", "yolo26n-seg"])
def test_checkpoints_without_the_one_to_many_head_load(shared_data: Path, name: str) -> None:
    """As fusing leaves them: batch normalisation folded, kernels merged, one head, nothing that only training uses."""
    folder = shared_data / "parity"
    images = fixture_images(folder).double()
    whole = load(folder, name)
    fused = load(folder, name, ONE2MANY_KEYS)
    assert (fused.architecture, fused.heads, fused.deployed_head) == (name, ("one2one",), "one2one")
    expected = run(whole, images)
    for found, wanted in zip(run(fused, images), expected, strict=True):
        assert torch.equal(found, wanted)
    official = official_state(fold_detector(fused.float()))
    assert not any("running_mean" in key for key in official)
    folded = detector_from_checkpoint(Checkpoint(official), name, activation="silu").double()
    assert (folded.heads, folded.folded) == (("one2one",), True)
    if name == "yolov10n":
        assert official["model.22.m.0.cv1.2.conv.weight"].shape == (256, 1, 7, 7)
    assert (run(folded, images)[0] - expected[0]).abs().max() < 1e-2  # weights were folded in float32


def test_the_deployed_head_survives_saving(tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = build_detector("yolo26n", 2).eval()
    images = torch.rand(1, 3, 64, 64)
    detector.deploy_head("one2many")
    save_detector(detector, tmp_path / "both.safetensors")
    loaded = load_detector(tmp_path / "both.safetensors")
    assert (loaded.heads, loaded.deployed_head) == (("one2many", "one2one"), "one2many")
    alone = select_head(loaded, "one2many")
    save_detector(fold_detector(alone), tmp_path / "one.safetensors")
    again = load_detector(tmp_path / "one.safetensors")
    assert (again.heads, again.head_style, again.folded) == (("one2many",), "one2many", True)
    for form in (loaded, alone, again):
        torch.testing.assert_close(run(form, images)[0], run(detector, images)[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="yolo26n has the head one2many, not one2one"):
        select_head(again, "one2one")


def test_one_head_reads_detached_features() -> None:
    torch.manual_seed(0)
    network = build_detector("yolo26n", 2).network
    raw = network(torch.rand(1, 3, 64, 64))
    body = [parameter for name, parameter in network.named_parameters() if not name.startswith("head.")]
    one = sum(part.square().sum() for level in raw["one2one"] for part in level)
    many = sum(part.square().sum() for level in raw["one2many"] for part in level)
    assert all(g is None for g in torch.autograd.grad(one, body, retain_graph=True, allow_unused=True))
    assert all(g is not None for g in torch.autograd.grad(many, body, retain_graph=True, allow_unused=True))
    head = [parameter for name, parameter in network.named_parameters() if name.startswith("head.one2one")]
    assert all(g is not None for g in torch.autograd.grad(one, head, allow_unused=True))


def test_a_head_alone_passes_gradients_on() -> None:
    network = select_head(build_detector("yolo26n", 2), "one2one").network
    raw = network(torch.rand(1, 3, 64, 64))
    sum(part.square().sum() for level in raw for part in level).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_distances_are_decoded_without_bins() -> None:
    """One cell at a time: the box is the cell's centre, less and plus the four distances, times the stride."""
    generator = torch.Generator().manual_seed(0)
    raw = tuple(
        (
            torch.randn(2, 4, h, w, generator=generator, dtype=torch.float64),
            torch.randn(2, 3, h, w, generator=generator, dtype=torch.float64),
        )
        for h, w in ((4, 6), (2, 3))
    )
    decoded = Decode((8, 16), reg_max=1)(raw)
    anchor = 0
    for stride, (box, cls) in zip((8, 16), raw, strict=True):
        for y in range(box.shape[2]):
            for x in range(box.shape[3]):
                for image in range(2):
                    left, top, right, bottom = box[image, :, y, x].tolist()
                    wanted = [
                        (x + 0.5 + (right - left) / 2) * stride,
                        (y + 0.5 + (bottom - top) / 2) * stride,
                        (left + right) * stride,
                        (top + bottom) * stride,
                        *(1 / (1 + np.exp(-cls[image, :, y, x].numpy()))),
                    ]
                    np.testing.assert_allclose(decoded[image, :, anchor].numpy(), wanted, rtol=1e-12)
                anchor += 1


def pairs_by_hand(image: np.ndarray, confidence: float, limit: int) -> list[list[float]]:
    rows = []
    for anchor in range(image.shape[1]):
        cx, cy, w, h = image[:4, anchor]
        for label, score in enumerate(image[4:, anchor]):
            if score > confidence:
                rows.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2, score, label])
    return sorted(rows, key=lambda row: -row[4])[:limit]


@pytest.mark.parametrize(("confidence", "limit"), [(0.0, 7), (0.6, 300), (0.999, 300)])
def test_best_pairs_are_those_of_a_sort(confidence: float, limit: int) -> None:
    decoded = torch.rand(2, 4 + 3, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for (found, anchors), image in zip(best_pairs(decoded, confidence, limit), decoded, strict=True):
        wanted = pairs_by_hand(image.numpy(), confidence, limit)
        np.testing.assert_allclose(found.numpy().reshape(-1, 6), np.reshape(wanted, (-1, 6)))
        assert [
            image[4 + int(label), anchor] for label, anchor in zip(found[:, 5], anchors, strict=True)
        ] == list(found[:, 4])


def test_wrong_shapes_and_thresholds_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4, 9\); expected \[B, 4 \+ classes, anchors\]"):
        best_pairs(torch.zeros(2, 4, 9), 0.1)
    with pytest.raises(ValueError, match="confidence=1; expected 0 <= confidence < 1"):
        best_pairs(torch.zeros(2, 6, 9), 1)
