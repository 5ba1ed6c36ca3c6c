"""The benchmark command and its scenarios."""

import json
import os
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from deploy_networks import SmallDetector

from core.errors import DeployError
from core.machine import available_processors, describe_machine
from deploy import Runtime, export_onnx
from deploy.benchmark.__main__ import main, parse_spec
from deploy.benchmark.pinning import parse_list, pin_process
from deploy.benchmark.scenarios import run_scenario
from deploy.runtimes.engines import find_image_size

SIZE = (64, 96)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        target: export_onnx(SmallDetector(), folder / f"{target}.onnx", SIZE, target).path
        for target in ("openvino", "onnxruntime")
    }


class Sleeper(Runtime):
    """Takes a millisecond for each image, and remembers the calls."""

    name, precision, output_names, load_seconds = "sleeper", "none", ("output0",), 0.0

    def __init__(self):
        self.batches, self.threads = [], set()

    @classmethod
    def require(cls):
        pass

    build = open = require

    def infer_outputs(self, images):
        self.batches.append(len(images))
        self.threads.add(threading.get_ident())
        time.sleep(0.002 * len(images))
        return {"output0": images}

    def close(self):
        pass


def test_async_runs_streams_at_once():
    one, four = Sleeper(), Sleeper()
    shape = [(1, 3, 8, 8)]
    (slow,) = run_scenario(one, "async", shape, 0.2, 0.0, streams=1)
    (fast,) = run_scenario(four, "async", shape, 0.2, 0.0, streams=4)
    assert len(one.threads) == 1
    assert len(four.threads) == 4
    assert fast.images_per_second / slow.images_per_second == pytest.approx(4, rel=0.4)
    assert fast.median_ms == pytest.approx(
        slow.median_ms, rel=0.5
    )  # a sleeping request does not slow another


def test_elastic_mixes_batches_and_tells_them_apart():
    runtime = Sleeper()
    shapes = [(batch, 3, 8, 8) for batch in (1, 4)]
    small, large = run_scenario(runtime, "elastic", shapes, 0.3, 0.0, streams=1)
    assert (small.batch, large.batch) == (1, 4)
    assert large.median_ms / small.median_ms == pytest.approx(4, rel=0.4)
    changes = sum(a != b for a, b in zip(runtime.batches, runtime.batches[1:], strict=False))
    assert changes > 5
    with pytest.raises(DeployError, match=r"'burst'.*sync, async, elastic"):
        run_scenario(runtime, "burst", shapes, 0.1, 0.0, 1)


def test_command_writes_everything(models, tmp_path, capsys):
    files = [tmp_path / "out.json", tmp_path / "layers.svg"]
    arguments = [
        str(models["openvino"]),
        "--batch",
        "1,2",
        "--time",
        "0.1",
        "--warmup",
        "0",
        "--threads",
        "1",
    ]
    assert main([*arguments, "--per-layer", "--json", str(files[0]), "--plot", str(files[1])]) == 0
    result = json.loads(files[0].read_text())
    assert [row["batch"] for row in result["rows"]] == [1, 2]
    row = result["rows"][0]
    assert row["shape"] == [1, 3, *SIZE]
    assert row["precision"] == "int8"
    assert row["median_ms"] <= row["p90_ms"] <= row["p95_ms"] <= row["p99_ms"]
    assert row["size_bytes"] == models["openvino"].stat().st_size
    assert row["load_seconds"] > 0
    assert row["first_inference_ms"] > 0
    assert "openvino" in row["versions"]
    assert result["machine"]["processors"] >= 1
    convs = [layer for layer in result["layers"] if layer["type"] == "Convolution"]
    assert [layer["precision"] for layer in convs].count("I8") == 5
    bars = ElementTree.parse(files[1]).getroot().iter("{http://www.w3.org/2000/svg}title")
    assert len(list(bars)) == len(result["layers"])
    printed = capsys.readouterr().out
    assert "images/s" in printed
    assert f"{SIZE[0]}x{SIZE[1]}" in printed


def test_onnxruntime_layers_and_comparison(models, tmp_path):
    file = tmp_path / "out.json"
    arguments = [str(models["onnxruntime"]), "--runtime", "onnxruntime", "--time", "0.1", "--warmup", "0"]
    assert main([*arguments, "--per-layer", "--json", str(file)]) == 0
    layers = json.loads(file.read_text())["layers"]
    assert sum(layer["type"] == "QLinearConv" for layer in layers) == 4
    specs = [f"{models['openvino']}@openvino", f"{models['onnxruntime']}@onnxruntime"]
    assert main(["--compare", *specs, "--time", "0.1", "--threads", "1", "--json", str(file)]) == 0
    first, second = json.loads(file.read_text())["rows"]
    assert first["speedup"] == 1.0
    assert second["speedup"] == pytest.approx(first["median_ms"] / second["median_ms"])


def test_errors_end_with_3(models, tmp_path, capsys):
    assert main([str(tmp_path / "none.onnx")]) == 3
    assert "No ONNX file" in capsys.readouterr().err
    assert main([]) == 3
    assert main(["--compare", f"{models['openvino']}@tflite"]) == 3
    assert "tflite" in capsys.readouterr().err


def test_specs_and_sizes(models):
    spec = parse_spec("a/b.onnx@openvino:bf16", "onnxruntime", None)
    assert (spec.path, spec.runtime, spec.precision) == (Path("a/b.onnx"), "openvino", "bf16")
    assert parse_spec("b.xml", "onnxruntime", "cpu").runtime == "onnxruntime"
    assert find_image_size(models["openvino"]) == SIZE


def test_a_file_names_its_own_runtime(models):
    assert {name: parse_spec(str(path), None, None).runtime for name, path in models.items()} == {
        "openvino": "openvino",
        "onnxruntime": "onnxruntime",
    }
    assert parse_spec("model.engine", None, None).runtime == "tensorrt"
    assert parse_spec("model.xml", None, None).runtime == "openvino"
    assert parse_spec(str(models["onnxruntime"]), "openvino", None).runtime == "openvino"


def test_a_closed_pipe_ends_quietly(models):
    command = [sys.executable, "-m", "deploy.check", str(models["openvino"])]
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, "")


def test_runs_as_a_module(models):
    command = [
        sys.executable,
        "-W",
        "error::RuntimeWarning",
        "-m",
        "deploy.benchmark",
        str(models["openvino"]),
    ]
    command += ["--time", "0.1", "--warmup", "0"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "median" in result.stdout


def test_pinning_and_machine():
    assert parse_list("0-3,8\n") == {0, 1, 2, 3, 8}
    assert parse_list("") == set()
    before = available_processors()
    try:
        assert pin_process("none") == before
        assert pin_process("core", 1) <= before
        assert len(available_processors()) == 1
    finally:
        os.sched_setaffinity(0, before)
    with pytest.raises(DeployError, match="socket"):
        pin_process("socket")
    assert describe_machine()["processors"] == len(before)


def test_reports_are_plain_data(models, tmp_path):
    values = run_scenario(Sleeper(), "sync", [(1, 3, 8, 8)], 0.02, 0.0, 1)[0].as_dict()
    assert json.loads(json.dumps(values)) == values
    assert np.isfinite([value for value in values.values() if isinstance(value, float)]).all()
