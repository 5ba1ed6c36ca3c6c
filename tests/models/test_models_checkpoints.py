"""Checkpoints of every kind end up as the same networks; what doesn't fit is explained."""

import copy
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from model_fixtures import fixture_images, fixture_state, official_state, quantized_model
from safetensors.torch import save_file
from torch import nn

from core.errors import CheckpointError
from models import Detector, build_detector, fold_detector, load_detector, read_checkpoint, save_detector
from models.checkpoints.command import main
from models.checkpoints.describe import describe_checkpoint
from models.checkpoints.loading import detector_from_checkpoint
from models.checkpoints.reading import Checkpoint
from models.facts import count_parameters


def assert_same_weights(a: Detector, b: Detector) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def small() -> Detector:
    torch.manual_seed(0)
    return build_detector("yolov9t", 2, "silu", ("a", "b")).eval()


@pytest.fixture(scope="module")
def folded(small: Detector) -> Detector:
    return fold_detector(small)


@pytest.mark.parametrize("prefix", ["", "model.", "module.model.", "model.model."])
def test_plain_state_dicts_of_any_prefix(small: Detector, tmp_path: Path, prefix: str) -> None:
    state = {prefix + key.removeprefix("model."): tensor for key, tensor in official_state(small).items()}
    torch.save(state, tmp_path / "state.pt")
    assert_same_weights(load_detector(tmp_path / "state.pt"), small)


@pytest.mark.parametrize("entry", ["model", "ema", "state_dict", "model_state_dict"])
def test_state_dicts_inside_a_training_checkpoint(small: Detector, tmp_path: Path, entry: str) -> None:
    torch.save({entry: official_state(small), "epoch": 3, "optimizer": None}, tmp_path / "state.pt")
    assert_same_weights(load_detector(tmp_path / "state.pt"), small)


def test_safetensors_without_a_manifest(folded: Detector, tmp_path: Path) -> None:
    save_file(
        {key: tensor.contiguous() for key, tensor in official_state(folded).items()},
        tmp_path / "a.safetensors",
    )
    detector = load_detector(tmp_path / "a.safetensors")
    assert detector.folded
    assert detector.names == ("class0", "class1")
    assert_same_weights(detector, folded)


def test_folded_arrays_with_underscores_and_grouped_kernels(folded: Detector, tmp_path: Path) -> None:
    arrays = {}
    for key, tensor in official_state(folded).items():
        grouped = key.endswith(("cv2.0.1.conv.weight", "cv2.0.2.weight"))
        arrays[key.replace(".", "_")] = (tensor.unflatten(0, (4, -1)) if grouped else tensor).numpy()
    np.savez(tmp_path / "a.npz", **arrays)
    assert_same_weights(load_detector(tmp_path / "a.npz"), folded)


def test_published_folded_weights(shared_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = shared_data / "weights" / "yolov9t-relu-3cls.npz"
    detector = load_detector(path, activation="relu")
    assert (detector.architecture, detector.num_classes, detector.folded) == ("yolov9t", 3, True)
    assert detector.activation == "relu"
    with caplog.at_level(logging.WARNING):
        load_detector(path)
    assert "does not state its activation" in caplog.text


def test_half_precision_becomes_single(small: Detector, tmp_path: Path) -> None:
    torch.save({key: tensor.half() for key, tensor in official_state(small).items()}, tmp_path / "half.pt")
    detector = load_detector(tmp_path / "half.pt")
    weight = detector.get_parameter("network.backbone.stem1.conv.weight")
    assert weight.dtype == torch.float32
    assert torch.equal(weight, small.get_parameter("network.backbone.stem1.conv.weight").half().float())


def test_ultralytics_checkpoint_computes_what_ultralytics_computes(shared_data: Path) -> None:
    """Figures recorded once from Ultralytics 8.3.3 in float64 on the parity images."""
    detector = load_detector(shared_data / "weights" / "ultralytics-yolov9t-ball.pt").double()
    assert (detector.head_style, detector.names) == ("ultralytics", ("ball",))
    with torch.no_grad():
        output = detector(fixture_images(shared_data / "parity").double())
    recorded = {
        (0, 0, 0): 4.412398504776802,
        (0, 4, 0): 6.834997641518039e-05,
        (1, 2, 335): 486.0019505061829,
        (1, 4, 200): 3.4707790223289926e-05,
        (0, 3, 260): 195.44619295083322,
    }
    for index, value in recorded.items():
        assert float(output[index]) == pytest.approx(value, rel=1e-9)
    assert float(output.sum()) == pytest.approx(175271.0885288253, rel=1e-9)


@pytest.mark.parametrize("style", ["official", "ultralytics", "ultralytics-legacy"])
def test_every_head_survives_saving(tmp_path: Path, style: str) -> None:
    detector = build_detector("yolov9s", 7, "relu", head_style=style)
    save_detector(detector, tmp_path / "a.safetensors")
    back = load_detector(tmp_path / "a.safetensors")
    assert (back.architecture, back.head_style) == ("yolov9s", style)
    assert_same_weights(back, detector)


def test_contradictions_say_what_fits(small: Detector, tmp_path: Path) -> None:
    save_detector(small, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit yolov9c; .* those of yolov9t"):
        load_detector(tmp_path / "a.safetensors", architecture="yolov9c")
    with pytest.raises(CheckpointError, match=r"has 2 classes .*; 5 are expected"):
        load_detector(tmp_path / "a.safetensors", num_classes=5)
    with pytest.raises(CheckpointError, match="was trained with silu, not relu"):
        load_detector(tmp_path / "a.safetensors", activation="relu")
    with pytest.raises(ValueError, match="'yolov4n' is unknown"):
        load_detector(tmp_path / "a.safetensors", architecture="yolov4n")


def test_missing_left_over_and_misshapen_keys_are_listed(small: Detector) -> None:
    state = official_state(small)
    state["model.4.extra.weight"] = state.pop("model.4.cv1.conv.weight")
    state["model.5.cv1.conv.weight"] = torch.zeros(1, 2, 3, 3)
    with pytest.raises(CheckpointError) as caught:
        detector_from_checkpoint(Checkpoint(state), "x.pt")
    message = str(caught.value)
    assert "closest is yolov9t" in message
    assert "missing: model.4.cv1.conv.weight" in message
    assert "left over: model.4.extra.weight" in message
    assert "model.5.cv1.conv.weight (1, 2, 3, 3) instead of (96, 64, 3, 3)" in message


def test_training_checkpoint_names_what_it_keeps_and_misses(
    shared_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = fixture_state(shared_data / "parity", "yolov9-c")
    with caplog.at_level(logging.INFO):
        detector_from_checkpoint(Checkpoint(dict(state)), "x.pt", activation="silu")
    assert "kept the main head (cv4, cv5, dfl2 of layer 38)" in caplog.text
    assert "dropped the auxiliary branch (layers 23 to 37" in caplog.text
    del state["model.38.cv4.1.0.conv.weight"], state["model.3.cv1.conv.weight"]
    state["model.38.cv6.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        detector_from_checkpoint(Checkpoint(state), "x.pt")
    assert (
        "missing: model.3.cv1.conv.weight, model.38.cv4.1.0.conv.weight; left over: model.38.cv6.weight"
        in str(caught.value)
    )


def test_numbers_must_be_finite(small: Detector) -> None:
    state = {key: tensor.clone() for key, tensor in official_state(small).items()}
    state["model.0.conv.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(
        CheckpointError, match=r"not all numbers are finite in network\.backbone\.stem1\.conv\.weight"
    ):
        detector_from_checkpoint(Checkpoint(state), "x.pt")


def test_quantized_checkpoint_gives_weights_and_ranges(
    folded: Detector, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"model": quantized_model(folded)}, tmp_path / "qat.pt")
    assert len(read_checkpoint(tmp_path / "qat.pt").amax) > 100
    with caplog.at_level(logging.INFO):
        detector = load_detector(tmp_path / "qat.pt")
    assert_same_weights(detector, folded)
    weights = [key for key in official_state(folded) if key.endswith("weight")]
    assert len(detector.amax) == 2 * len(weights)
    stem = folded.get_parameter("network.backbone.stem1.conv.weight")
    assert torch.equal(detector.amax["backbone.stem1.conv.weight"], stem.abs().amax((1, 2, 3)))
    assert detector.amax["backbone.stem1.conv.input"].shape == ()
    assert float(detector.amax["backbone.stem1.conv.input"]) == 0.5
    assert (
        "no counterpart for 1 quantizers: model.4.cv2.0.m.0.repaddop._input0_quantizer._amax" in caplog.text
    )
    save_detector(detector, tmp_path / "a.safetensors")
    back = load_detector(tmp_path / "a.safetensors")
    assert back.amax.keys() == detector.amax.keys()
    assert all(torch.equal(back.amax[key], tensor) for key, tensor in detector.amax.items())
    ranges = 2 * len(weights)
    expected = f"yes, {ranges + 1} ranges: {ranges} of convolutions, 1 without a counterpart here"
    assert describe_checkpoint(tmp_path / "qat.pt")["quantized"] == expected
    assert describe_checkpoint(tmp_path / "a.safetensors")["quantized"] == (
        f"yes, {ranges} ranges: {ranges} of convolutions"
    )


def test_description_of_a_trained_checkpoint(shared_data: Path) -> None:
    facts = describe_checkpoint(shared_data / "weights" / "gelan-t-bccd-unstripped.pt")
    assert facts["entry"] == "ema"
    assert facts["network"] == "yolov9t (official head, with batch normalisation)"
    assert facts["classes"] == "3: RBC, WBC, Platelets"
    assert facts["quantized"] == "no"
    assert "float16" in facts["tensors"]


@pytest.mark.parametrize("name", ["gelan-t-bccd.pt", "yolov9t-relu-3cls.npz", "ultralytics-yolov9t-ball.pt"])
def test_the_parameters_told_are_those_of_the_loaded_network(shared_data: Path, name: str) -> None:
    facts = describe_checkpoint(shared_data / "weights" / name)
    assert facts["parameters"] == f"{count_parameters(load_detector(shared_data / 'weights' / name)):,}"
    assert ("not stated" in facts["activation"]) == name.endswith(".npz")


def test_command_describes_converts_and_fails(
    small: Detector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(official_state(small), tmp_path / "a.pt")
    assert main([str(tmp_path / "a.pt"), "--convert", str(tmp_path / "b.safetensors")]) == 0
    assert "yolov9t (official head, with batch normalisation)" in capsys.readouterr().out
    assert_same_weights(load_detector(tmp_path / "b.safetensors"), small)
    assert main([str(tmp_path / "absent.pt")]) == 3
    assert "does not exist" in capsys.readouterr().err


def test_damaged_weights_of_our_own_are_noticed(small: Detector, tmp_path: Path) -> None:
    save_detector(small, tmp_path / "a.safetensors")
    data = bytearray((tmp_path / "a.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is not the file that a\.safetensors\.json describes"):
        load_detector(tmp_path / "a.safetensors")


def test_ranges_go_with_the_layers_through_folding(small: Detector, caplog: pytest.LogCaptureFixture) -> None:
    """Ranges that are the weights' own maxima must be those of the folded weights afterwards."""
    detector = copy.deepcopy(small)
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    convolutions = {n: m for n, m in detector.network.named_modules() if isinstance(m, nn.Conv2d)}
    detector.amax = {f"{n}.weight": m.weight.detach().abs().amax((1, 2, 3)) for n, m in convolutions.items()}
    merged = next(name.removesuffix(".dense.conv") for name in convolutions if name.endswith(".dense.conv"))
    detector.amax |= {f"{merged}.dense.conv.input": torch.tensor(2.0)}
    detector.amax |= {f"{merged}.pointwise.conv.input": torch.tensor(3.0)}
    with caplog.at_level(logging.INFO):
        folded = fold_detector(detector)
    layers = {n: m for n, m in folded.network.named_modules() if isinstance(m, nn.Conv2d)}
    compared = 0
    for name, layer in layers.items():
        if f"{name}.weight" in folded.amax:
            expected = layer.weight.detach().abs().amax((1, 2, 3))
            assert torch.allclose(folded.amax[f"{name}.weight"], expected, rtol=1e-5)
            compared += 1
    assert compared == len(layers) - sum(name.endswith(".dense.conv") for name in convolutions)
    assert float(folded.amax[f"{merged}.conv.input"]) == 3.0
    assert {key.rpartition(".")[0] for key in folded.amax} <= set(layers)
    assert f"ranges of merged kernels left out: {merged}.dense.conv.weight" in caplog.text


@pytest.mark.parametrize("size", [100, 1000])
def test_a_damaged_safetensors_file_says_what_to_do(folded: Detector, tmp_path: Path, size: int) -> None:
    """Cut in the header, and behind it."""
    save_detector(folded, tmp_path / "a.safetensors")
    with (tmp_path / "a.safetensors").open("r+b") as stream:
        stream.truncate(size)
    with pytest.raises(
        CheckpointError, match=r"not a readable .*: copy it again\. If a run made it, remove it"
    ):
        load_detector(tmp_path / "a.safetensors")
