"""The predict command on images, folders and videos: the boxes drawn are those of torch, and bad input is told."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from core.errors import DeployError
from core.image_size import ImageSize
from data import Rle, decode_mask
from deploy import build_engine, export_onnx
from models import build_detector, fold_detector, save_detector
from pipeline import predict
from pipeline.prediction.predictors import Options, open_predictor, read_names

NAMES = ("cat", "dog")
SIZE = 64


class Detector(nn.Module):
    """Images to [B, 6, 64]: one box a cell of 8 pixels, sized and scored by the brightness of the cell."""

    def forward(self, images: Tensor) -> Tensor:
        cells = nn.functional.avg_pool2d(images, 8)
        grid = torch.arange(8.0) * 8 + 4
        y, x = torch.meshgrid(grid, grid, indexing="ij")
        place = torch.stack([x, y])[None] + 0 * cells[:, :2]
        size = 8 + 16 * cells[:, 1:2]
        return torch.cat([place, size, size, cells[:, 0:1], cells[:, 2:3]], 1).flatten(2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in two formats, pictures, and a video of three frames."""
    folder = tmp_path_factory.mktemp("predict")
    metadata = {"names": json.dumps(dict(enumerate(NAMES)))}
    export_onnx(Detector(), folder / "m.onnx", (SIZE, SIZE), "openvino", metadata, quantized=False)
    build_engine("openvino", folder / "m.onnx", folder)
    (folder / "images" / "deep").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in ("images/a.png", "images/a.bmp", "images/deep/b.png"):
        small = generator.integers(0, 255, (6, 10, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / name), cv2.resize(small, (100, 60), interpolation=cv2.INTER_NEAREST))
    video = cv2.VideoWriter(str(folder / "v.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 64))
    for _ in range(3):
        video.write(generator.integers(0, 255, (64, 96, 3), dtype=np.uint8))
    video.release()
    return folder


def place(row: list[float]) -> tuple[float, float, float]:
    """Where a row stands in a list: the class, then the score, which hardly two boxes share, then the left edge."""
    return row[0], round(row[5], 4), row[1]


def by_hand(path: Path) -> list[list[float]]:
    """Detections at confidence 0.5 and IoU 0.7: letterbox, decode, NMS and the way back, in a few lines."""
    image = cv2.cvtColor(
        cv2.imread(str(path)), cv2.COLOR_BGR2RGB
    )  # 60 x 100, ratio 0.64: 38 x 64, 13 rows above
    canvas = np.full((SIZE, SIZE, 3), 114, np.uint8)
    canvas[13:51] = cv2.resize(image, (64, 38), interpolation=cv2.INTER_LINEAR)
    (output,) = Detector()(torch.from_numpy(canvas).permute(2, 0, 1)[None] / 255)
    centre, size = output[:2].T, output[2:4].T
    corners = torch.cat([centre - size / 2, centre + size / 2], 1)
    rows = []
    for label in range(2):
        chosen = torch.nonzero(output[4 + label] > 0.5).flatten()
        kept = chosen[torchvision.ops.nms(corners[chosen], output[4 + label, chosen], 0.7)]
        for index in kept:
            x1, y1, x2, y2 = corners[index].tolist()
            left, right = (min(max(x / 0.64, 0), 100) for x in (x1, x2))
            top, bottom = (min(max((y - 13) / 0.64, 0), 60) for y in (y1, y2))
            rows.append([label + 1, left, top, right - left, bottom - top, float(output[4 + label, index])])
    return sorted(rows, key=place)


@pytest.mark.parametrize(
    ("file", "runtime"), [("m.onnx", "openvino"), ("m.onnx", "onnxruntime"), ("m.xml", None)]
)
def test_detections_are_those_of_torch(world: Path, tmp_path: Path, file: str, runtime: str | None) -> None:
    chosen = ["--runtime", runtime] if runtime else []
    arguments = [
        str(world / file),
        str(world / "images"),
        "--out",
        str(tmp_path),
        "--confidence",
        "0.5",
        *chosen,
    ]
    assert predict.main(arguments) == 0
    content = json.loads((tmp_path / "detections.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["a.bmp", "a.png", "deep/b.png"]
    assert [category["name"] for category in content["categories"]] == list(NAMES)
    for image in content["images"]:
        assert (image["height"], image["width"]) == (60, 100)
        found = sorted(
            (
                [a["category_id"], *a["bbox"], a["score"]]
                for a in content["annotations"]
                if a["image_id"] == image["id"]
            ),
            key=place,
        )
        assert len(found) > 3
        np.testing.assert_allclose(found, by_hand(world / "images" / image["file_name"]), atol=0.02)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")} == {
        "a.png", "a.png.png", "deep/b.png",
    }  # fmt: skip


def test_a_video_and_a_comparison(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(world / "m.xml"), str(world / "v.mp4"), "--out", str(tmp_path), "--confidence", "0.4"]
    assert predict.main([*arguments, "--compare", str(world / "m.onnx")]) == 0
    content = json.loads((tmp_path / "detections.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["frame 1", "frame 2", "frame 3"]
    number = len(content["annotations"])
    assert number > 0
    assert content["info"]["matched"] == content["info"]["their_detections"] == number
    agreement = content["info"]["agreement"]
    assert (agreement["reference"], agreement["matched"], agreement["drop_in"]) == (number, 1.0, True)
    assert abs(agreement["score_shift"]) < 1e-4
    assert f"{number} of them match one of the {number} detections" in capsys.readouterr().err
    video = cv2.VideoCapture(str(tmp_path / "v.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert video.get(cv2.CAP_PROP_FRAME_WIDTH) == 2 * 96 * 5  # side by side, enlarged to 320 rows


class Segmenter(nn.Module):
    """The detector above with two prototypes, the two halves; a box's class says which half is its mask."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        rows = Detector()(images)
        right = (
            16.0 * (torch.arange(16) >= 8).expand(len(images), 1, 16, 16) - 8 + 0 * images[:, :1, :16, :16]
        )
        first = (rows[:, 4:5] > rows[:, 5:6]).float()
        scores = rows[:, 4:] * torch.cat([first, 1 - first], 1)
        return torch.cat([rows[:, :4], scores, -10 * first, 10 * first - 10], 1), torch.cat(
            [right, -right], 1
        )


@pytest.mark.parametrize("names", [True, False])
def test_masks_are_written_and_drawn(world: Path, tmp_path: Path, names: bool) -> None:
    metadata = {"task": "segment"} | ({"names": json.dumps(dict(enumerate(NAMES)))} if names else {})
    outputs = ("output0", "output1")
    export_onnx(
        Segmenter(),
        tmp_path / "s.onnx",
        (SIZE, SIZE),
        "openvino",
        metadata,
        quantized=False,
        output_names=outputs,
    )
    arguments = [str(tmp_path / "s.onnx"), str(world / "images" / "a.png"), "--out", str(tmp_path)]
    assert predict.main([*arguments, "--confidence", "0.5"]) == 0
    content = json.loads((tmp_path / "detections.json").read_text())
    assert [category["name"] for category in content["categories"]] == (list(NAMES) if names else ["0", "1"])
    filled = 0
    for annotation in content["annotations"]:
        code = annotation["segmentation"]
        mask = decode_mask(Rle(tuple(code["size"]), code["counts"].encode()))
        assert mask.shape == (60, 100)
        assert annotation["area"] == mask.sum()
        x, y, width, height = annotation["bbox"]
        half = slice(0, 50) if annotation["category_id"] == 1 else slice(50, 100)
        expected = np.zeros_like(mask)
        centres_y, centres_x = np.arange(60) + 0.5, np.arange(100) + 0.5
        inside = np.ix_(
            (centres_y >= y) & (centres_y < y + height), (centres_x >= x) & (centres_x < x + width)
        )
        expected[inside] = True
        cut = np.zeros_like(mask)
        cut[:, half] = True
        assert (mask ^ (expected & cut)).sum() <= height + 1  # bounds are rounded in the file
        filled += int(mask.any())
    assert filled > 3


@pytest.mark.slow
def test_a_checkpoint_beside_another_model(world: Path, tmp_path: Path) -> None:
    detector = fold_detector(build_detector("yolov9t", 2, "silu", NAMES))
    save_detector(detector, tmp_path / "d.safetensors")
    options = Options(confidence=0.001, size=ImageSize.of(SIZE))
    predictor = open_predictor(tmp_path / "d.safetensors", options)
    image = cv2.cvtColor(cv2.imread(str(world / "images" / "a.png")), cv2.COLOR_BGR2RGB)
    found = predictor.detect(np.asarray(image, np.uint8)).boxes
    assert predictor.names == NAMES
    assert found.shape[1] == 6
    assert float(found[:, [0, 2]].max()) <= 100


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.onnx", "images"], "No model at"),
        (["m.onnx", "none.jpg"], "Nothing at"),
        (["m.onnx", "broken.mp4"], "cannot be decoded"),
        (["m.onnx", "text.txt"], "text.txt"),
        (["text.txt", "images"], "text.txt"),
        (["broken.onnx", "images"], "broken.onnx"),
        (["images", "images"], "not a run directory"),
        (["m.xml", "images", "--runtime", "onnxruntime"], "openvino does"),
        (["m.onnx", "images", "--runtime", "torch"], "torch runs checkpoints"),
        (["m.onnx", "images", "--runtime", "tensorrt"], "deploy.engine build"),
        (["m.onnx", "images", "--compare", "float"], "is not in a run directory"),
        (["m.onnx", "broken.png"], "broken.png"),
    ],
)
def test_bad_input_is_told(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    for name in ("broken.mp4", "broken.onnx", "broken.png"):
        (world / name).write_bytes(b"no such thing")
    (world / "text.txt").write_text("hello\n")
    model, source, *rest = arguments
    code = predict.main([str(world / model), str(world / source), *rest, "--out", str(tmp_path / "out")])
    assert code == (2 if words == "not a run directory" else 3)  # a wrong argument; anything else is data
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out" / "detections.json").exists()


def test_a_folder_that_cannot_be_made_is_told(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for source, out in (("images", tmp_path / "file"), ("v.mp4", tmp_path / "file" / "below")):
        code = predict.main([str(world / "m.xml"), str(world / source), "--out", str(out)])
        assert code == 3
        assert f"error: {out} cannot be created" in capsys.readouterr().err


def test_names_of_other_tools() -> None:
    assert read_names("{0: 'cat', 1: 'dog'}") == ("cat", "dog")
    assert read_names("") == ()
    with pytest.raises(DeployError, match="class names"):
        read_names("cat, dog")
