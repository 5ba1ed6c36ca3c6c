"""Files that are no checkpoint, and checkpoints of networks that are not loaded: one line that says what they are."""

import gzip
import io
import json
import logging
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from model_fixtures import fixture_state, official_state
from safetensors.torch import save_file
from torch import Tensor, nn

from core.errors import CheckpointError
from models import build_detector, load_detector, read_checkpoint
from models.checkpoints.loading import detector_from_checkpoint
from models.checkpoints.reading import Checkpoint


def onnx_graph() -> bytes:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value], [value])
    return bytes(onnx.helper.make_model(graph).SerializeToString())


def torchscript() -> bytes:
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Conv2d(1, 1, 1)), stream)
    return stream.getvalue()


def zip_of(**entries: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name.replace("__", "."), data)
    return stream.getvalue()


HEADER = json.dumps({"task": "detect"}).encode()
FILES = {
    "empty": (b"", r"empty \(0 bytes\); .* download or copy it again"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
    "HTML page": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "HTML page; .* download the file"),
    "HTML page with a mark": (b"\xef\xbb\xbf<html lang='en'>", "HTML page"),
    "OpenVINO": (b'<?xml version="1.0"?>\n<net name="m" version="11">', "XML file of an OpenVINO model; .*weights"),
    "other XML": (b'<?xml version="1.0"?><svg/>', "an XML file"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
    "gzip": (gzip.compress(b"weights"), "gzip; unpack"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(64), "zstd; unpack"),
    "tar": (bytes(257) + b"ustar" + bytes(300), "tar archive"),
    "ONNX": (onnx_graph(), "an ONNX graph; an export"),
    "engine": (b"ftrt" + bytes(64), "a TensorRT engine; an export"),
    "plan for RTX": (b"vtrt" + bytes(64), "TensorRT for RTX engine; an export"),
    "engine with a header": (len(HEADER).to_bytes(4, "little") + HEADER + b"ftrt", "TensorRT engine with a header"),
    "TensorFlow Lite": (b"\x1c\x00\x00\x00TFL3" + bytes(64), "TensorFlow Lite"),
    "TorchScript": (torchscript(), "TorchScript archive; .* exported from"),
    "Keras": (zip_of(config__json=b"{}", model__weights__h5=b"x"), "Keras archive"),
    "JSON": (b'{"names": ["a"]}', "a JSON file"),
    "text": (b"path/to/weights.pt\n", "a text file"),
    "PNG": (b"\x89PNG\r\n\x1a\n", "PNG image"),
}  # fmt: skip


@pytest.mark.parametrize("ending", [".pt", ".safetensors", ".npz"])
@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_checkpoint_is_named(kind: str, ending: str, tmp_path: Path) -> None:
    content, message = FILES[kind]
    path = tmp_path / f"weights{ending}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 180


def test_content_decides_not_the_ending(tmp_path: Path) -> None:
    state = {"a": torch.arange(3.0)}
    save_file(state, tmp_path / "a.pt")
    np.savez(tmp_path / "b.npz", a=state["a"].numpy())
    (tmp_path / "b.npz").rename(tmp_path / "b.pt")
    torch.save(state, tmp_path / "c.safetensors")
    for name, found in (("a.pt", "safetensors"), ("b.pt", "npz"), ("c.safetensors", "torch")):
        checkpoint = read_checkpoint(tmp_path / name)
        assert checkpoint.metadata["format"] == found
        assert torch.equal(checkpoint.state["a"], state["a"])


# -- networks that are not loaded


def head_with(branch_channels: int) -> dict[str, Tensor]:
    """A YOLOv8-n head with a fourth branch, as pose and OBB networks have it."""
    state = official_state(build_detector("yolov8n", 1))
    state["model.22.cv4.0.2.bias"] = torch.zeros(branch_channels)
    return state


NETWORKS: dict[str, tuple[dict[str, Tensor], str | None]] = {
    "a pose": (head_with(51), None),
    "an OBB": (head_with(1), None),
    "a classification": ({"model.9.linear.weight": torch.zeros(2, 4), "model.0.conv.weight": torch.zeros(1)}, None),
    "a pose (": ({"model.0.conv.weight": torch.zeros(1)}, "ultralytics.nn.tasks.PoseModel"),
    "RT-DETR": ({"model.28.enc_score_head.weight": torch.zeros(2)}, None),
    "YOLO-World": ({"model.22.cv4.0.logit_scale": torch.zeros(1)}, "ultralytics.nn.tasks.WorldModel"),
    "YOLOv7": ({"model.105.ia.0.implicit": torch.zeros(2), "model.105.m.0.weight": torch.zeros(1)}, None),
    "an anchor-based YOLO": ({"model.24.m.0.weight": torch.zeros(2), "model.24.anchors": torch.zeros(3)}, None),
    "YOLOX": ({"backbone.backbone.dark2.0.conv.weight": torch.zeros(2)}, None),
    "a network of MMDetection": ({"bbox_head.conv_cls.weight": torch.zeros(2)}, None),
    "a detector of torchvision": ({"backbone.body.conv1.weight": torch.zeros(2)}, None),
    "a language model": ({"model.embed_tokens.weight": torch.zeros(2)}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_another_network_is_refused_by_name(name: str, caplog: pytest.LogCaptureFixture) -> None:
    state, model_class = NETWORKS[name]
    with caplog.at_level(logging.INFO), pytest.raises(CheckpointError) as caught:
        detector_from_checkpoint(Checkpoint(state, {"model_class": model_class}), "x.pt")
    message = str(caught.value)
    assert message.startswith(f"x.pt: The checkpoint is {name}")
    assert "which is not loaded: loaded are yolov9, yolov8, yolo11" in message
    assert "model=custom" in message
    assert "\n" not in message
    assert len(message) < 320
    assert caplog.messages == []  # nothing was converted, and no line says so


class RTDETRDetectionModel(nn.Module):
    """A pickled model of another network: several activations, several eps."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.BatchNorm2d(2, eps=1e-3), nn.BatchNorm2d(2, eps=1e-5))
        for part, activation in zip(self.model, (nn.GELU(), nn.SiLU()), strict=True):
            part.act = activation


def test_a_pickled_model_is_named_whatever_it_is_made_of(tmp_path: Path) -> None:
    model = RTDETRDetectionModel()
    torch.save({"model": model}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="The checkpoint is RT-DETR, which is not loaded"):
        load_detector(tmp_path / "a.pt")
    assert read_checkpoint(tmp_path / "a.pt").state.keys() == model.state_dict().keys()
    state = official_state(build_detector("yolov8n", 2))
    for metadata, message in (
        (
            {"activation_classes": ["torch.nn.modules.activation.GELU"]},
            "activations are torch.*GELU; expected SiLU",
        ),
        ({"batch_norm_epsilons": [1e-5, 1e-3]}, r"several eps: \[1e-05, 0.001\]; expected one"),
    ):
        with pytest.raises(CheckpointError, match=message):
            detector_from_checkpoint(Checkpoint(state, metadata), "x.pt")


def test_an_unknown_network_shows_five_keys_and_the_count() -> None:
    state = {f"part{index}.weight": torch.zeros(1) for index in range(400)}
    with pytest.raises(
        CheckpointError, match=r"of no network that is known; its keys start with part0.*, and 395"
    ):
        detector_from_checkpoint(Checkpoint(state), "x.pt")
    half = official_state(build_detector("yolov8n", 80))
    half = {
        key: tensor
        for key, tensor in half.items()
        if not key.startswith(("model.2.", "model.4.", "model.6.", "model.8."))
    }
    with pytest.raises(CheckpointError, match=r"the closest, yolov8n, differs in \d+ keys") as caught:
        detector_from_checkpoint(Checkpoint(half), "x.pt")
    assert len(str(caught.value)) < 500


# -- the same network, marked by a tool


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module.model.", "model._orig_mod."]
)
def test_prefixes_and_profiler_buffers_are_taken_off(prefix: str) -> None:
    detector = build_detector("yolov8n", 2).eval()
    state = {prefix + key.removeprefix("model."): tensor for key, tensor in official_state(detector).items()}
    for layer in ("0", "22.cv3.0.2"):
        state[f"{prefix}{layer}.total_ops"] = state[f"{prefix}{layer}.total_params"] = torch.zeros(1)
    loaded = detector_from_checkpoint(Checkpoint(state), "x.pt", activation="silu")
    assert loaded.architecture == "yolov8n"
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.state_dict().values(), detector.state_dict().values(), strict=True)
    )


def test_weights_of_multimedia_keep_the_main_head(
    shared_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = fixture_state(shared_data / "parity", "mit-v9-t")
    with caplog.at_level(logging.INFO):
        detector_from_checkpoint(Checkpoint(state), "x.pt", activation="silu")
    dropped = sum(int(key.split(".")[0]) > 22 for key in state)
    assert f"left out the auxiliary branch ({dropped} tensors)" in caplog.text
    del state["4.conv2.0.bottleneck.1.conv1.conv2.bn.bias"]
    with pytest.raises(CheckpointError, match=r"missing: model\.4\.cv2\.0\.m\.1\.cv1\.conv2\.bn\.bias"):
        detector_from_checkpoint(Checkpoint(state), "x.pt")


# -- what a pickled model says beside its tensors


def test_a_changed_activation_or_stride_is_refused() -> None:
    state = official_state(build_detector("yolo11n", 2))
    activated = {"model.9.cv1": True, "model.10.m.0.attn.qkv": False}
    detector_from_checkpoint(Checkpoint(state, {"activated": activated, "strides": (8, 16, 32)}), "x.pt")
    for wrong in ({"model.9.cv1": False}, {"model.10.m.0.attn.qkv": True}):
        with pytest.raises(CheckpointError, match=f"after {next(iter(wrong))}: a changed network"):
            detector_from_checkpoint(Checkpoint(state, {"activated": {**activated, **wrong}}), "x.pt")
    with pytest.raises(CheckpointError, match=r"states strides \(4, 8, 16\); yolo11n has \(8, 16, 32\)"):
        detector_from_checkpoint(Checkpoint(state, {"strides": (4, 8, 16)}), "x.pt")


@pytest.mark.parametrize(
    ("file", "architecture", "num_classes"),
    [
        ("yolo11n-bccd.pt", "yolo11n", 3),
        ("ultralytics-yolov8n-untrained.pt", "yolov8n", 80),
        ("ultralytics-yolov8n-seg-untrained.pt", "yolov8n-seg", 80),
    ],
)
def test_files_of_ultralytics_load(shared_data: Path, file: str, architecture: str, num_classes: int) -> None:
    path = shared_data / "weights" / file
    metadata = read_checkpoint(path).metadata
    assert metadata["strides"] == (8, 16, 32)
    assert all(metadata["activated"].values()) == (architecture != "yolo11n")
    detector = load_detector(path)
    assert (detector.architecture, detector.num_classes, detector.activation) == (
        architecture,
        num_classes,
        "silu",
    )
