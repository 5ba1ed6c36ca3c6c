"""A command imports what it needs and no more: modules are counted, because seconds depend on the machine.

Importing torch takes two seconds of CPU time, importing torchvision or torch._dynamo two more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest

from data import generate_synthetic

REPOSITORY = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "torchvision", "torch._dynamo", "onnx", "cv2", "openvino", "onnxruntime", "plotly")
CPU_SECONDS = 2.0  # of `train_qat.py --help`: 0.25 measured, 5 when it imported the job
CHILD = """
import json, runpy, sys, time
target = sys.argv[1]
sys.argv = sys.argv[1:]
run = runpy.run_path if target.endswith(".py") else runpy.run_module
try:
    run(target, run_name="__main__")
    code = 0
except SystemExit as error:
    code = error.code or 0
found = [name for name in {heavy!r} if name in sys.modules]
print(json.dumps({{"code": code, "heavy": found, "cpu": time.process_time()}}), file=sys.stderr)
"""


def start(*arguments: str | Path, cwd: Path = REPOSITORY) -> dict[str, object]:
    """Run a command in a separate process; its exit code, the heavy modules that it imported, and its CPU time."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(heavy=HEAVY), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stderr.strip(), done
    return json.loads(done.stderr.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a picture, and an ONNX file with one convolution."""
    folder = tmp_path_factory.mktemp("startup")
    generate_synthetic(folder / "data", 1, 1, 64, 0)
    cv2.imwrite(str(folder / "photo.png"), np.zeros((64, 64, 3), np.uint8))
    weight = onnx.numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")
    images, output = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("images", [1, 3, 64, 64]), ("output0", [1, 4, 62, 62]))
    )
    conv = onnx.helper.make_node("Conv", ["images", "w"], ["output0"], kernel_shape=[3, 3])
    graph = onnx.helper.make_graph([conv], "g", [images], [output], [weight])
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), str(folder / "m.onnx"))
    return folder


WITHOUT = {
    "job help": (["train_qat.py", "--help"], 0, []),
    "job configuration": (["train_qat.py", "--cfg", "job", "+experiment=demo"], 0, []),
    "job typo": (["train_qat.py", "+experiment=demmo"], 2, []),
    "export help": (["export.py", "--help"], 0, []),
    "predict help": (["pipeline.predict", "--help"], 0, []),
    "predict nothing": (["pipeline.predict", "nowhere.onnx", "{folder}/photo.png"], 3, []),
    "evaluate help": (["pipeline.evaluate", "--help"], 0, []),
    "evaluate nothing": (["pipeline.evaluate", "nowhere.onnx"], 3, []),
    "data help": (["data", "--help"], 0, ["cv2"]),
    "data": (["data", "{folder}/data"], 0, ["cv2"]),
    "check help": (["deploy.check", "--help"], 0, ["onnx"]),
    "check": (["deploy.check", "{folder}/m.onnx"], 0, ["onnx"]),
    "benchmark help": (["deploy.benchmark", "--help"], 0, ["onnx"]),
    "inspect help": (["models.checkpoints", "--help"], 0, []),
    "engine help": (["deploy.engine", "build", "--help"], 0, ["onnx"]),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_a_command_that_needs_no_torch_does_not_import_it(folder: Path, name: str) -> None:
    arguments, code, heavy = WITHOUT[name]
    found = start(*(argument.format(folder=folder) for argument in arguments))
    assert (found["code"], found["heavy"]) == (code, heavy)


def test_help_takes_little_cpu_time() -> None:
    found = start("train_qat.py", "--help")
    assert isinstance(found["cpu"], float)
    assert found["cpu"] < CPU_SECONDS


def test_a_prediction_imports_torch_without_torchvision_and_the_compiler(
    folder: Path, tmp_path: Path
) -> None:
    """A whole prediction, NMS included, of a checkpoint."""
    from models import build_detector, save_detector

    save_detector(build_detector("yolov9t", 3), folder / "w.safetensors")
    found = start(
        "pipeline.predict", folder / "w.safetensors", folder / "photo.png", "--size", "64",
        "--confidence", "0.001", "--device", "cpu", "--out", tmp_path,
    )  # fmt: skip
    assert found["code"] == 0
    assert json.loads((tmp_path / "detections.json").read_text())["annotations"], "NMS has not run"
    assert not {"torchvision", "torch._dynamo", "openvino", "onnxruntime"} & set(found["heavy"])  # type: ignore[call-overload]


def test_loading_a_folded_checkpoint_does_not_import_the_compiler(tmp_path: Path) -> None:
    """Its network is made without numbers first, and torch's arithmetic on shapes alone would import torch._dynamo."""
    from models import build_detector, fold_detector, save_detector

    save_detector(fold_detector(build_detector("yolov9t", 3)), tmp_path / "w.safetensors")
    script = tmp_path / "load.py"
    script.write_text(
        f"from models import load_detector\nload_detector({str(tmp_path / 'w.safetensors')!r})\n"
    )
    found = start(script)
    assert (found["code"], found["heavy"]) == (0, ["torch"])
