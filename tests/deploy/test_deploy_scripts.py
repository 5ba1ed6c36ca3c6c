"""The shell scripts, with a Python that writes down what it is asked to do; and linters where they are installed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FAKE = """#!{python}
import json, os, pathlib, sys
arguments = sys.argv[1:]
with open({log!r}, "a") as stream:
    stream.write(json.dumps(arguments) + "\\n")

def write(flag, text):
    if flag in arguments:
        pathlib.Path(arguments[arguments.index(flag) + 1]).write_text(text)

if arguments[0] == "-":
    sys.argv = arguments
    exec(compile(sys.stdin.read(), "stdin", "exec"))
elif arguments[:2] == ["-m", "deploy.engine"]:
    if arguments[2] == "version":
        if {version!r} is None:
            sys.exit("TensorRT is not installed.")
        print({version!r})
    elif arguments[2] == "precision":
        print({codes!r})
    elif arguments[2] == "build":
        print("a line of TensorRT's")
        ending = ".plan" if "tensorrt_rtx" in arguments else ".engine"
        path = pathlib.Path(arguments[4]) / (pathlib.Path(arguments[3]).stem + ending)
        side = {{"num_kernels": 7, "convolutions": {{"fp16": 1, "int8": 3}}, "moved_bytes": 2e6}}
        build = {{"capability": "SM89", "engine": side, "fp16": {{**side, "moved_bytes": 1e6}}}}
        path.with_name(path.name + ".json").write_text(json.dumps({{"compiled": [build]}}))
        print(path)
elif arguments[0] == "export.py":
    pathlib.Path(next(a for a in arguments if a.startswith("output=")).split("=")[1]).touch()
elif arguments[0] == "-c":
    sys.exit({gpu!r} is False)  # whether torch sees a GPU
elif arguments[0] == "train_qat.py":
    run = pathlib.Path(next(a for a in arguments if a.startswith("run_dir=")).split("=")[1])
    run.mkdir(parents=True)
    (run / "float.onnx").touch()
elif arguments[:2] == ["-m", "pipeline.run.files"]:
    os.execv(sys.executable, [sys.executable, *arguments])
elif arguments[:2] == ["-m", "pipeline.evaluate"]:
    write("--json", json.dumps({{"model": arguments[2], "ap": 0.5984, "ap50": 0.8879}}))
write("--table", "| batch | a | b |\\n")
"""


@pytest.fixture
def world(tmp_path):
    """A run, a data set, and a function that calls a script with a fake Python of a TensorRT version."""
    run, data, log = tmp_path / "run", tmp_path / "data", tmp_path / "log"
    run.mkdir()
    data.mkdir()
    for name in ("float.onnx", "model.onnx"):
        (run / name).touch()
    (run / "export.json").write_text(json.dumps({"exports": [{"path": "model.onnx", "target": "openvino"}]}))

    def call(script, *arguments, version="10.3.0", gpu=True, codes="int8"):
        fake = tmp_path / "python"
        settings = {"version": version, "gpu": gpu, "codes": codes}
        fake.write_text(FAKE.format(python=sys.executable, log=str(log), **settings))
        fake.chmod(0o755)
        log.write_text("")
        environment = {**os.environ, "PYTHON": str(fake)}
        command = [str(ROOT / "scripts" / script), *map(str, arguments)]
        result = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
        )
        return result, [json.loads(line) for line in log.read_text().splitlines()]

    return call, run, data


@pytest.mark.parametrize(
    ("version", "target"), [("8.6.1", "trt10"), ("10.3.0", "trt10"), ("11.4.0.106", "trt11")]
)
def test_val_trt_goes_through_its_steps(world, version, target):
    call, run, data = world
    result, commands = call(
        "val_trt.sh", run, data, 320, "--batch", "1,12,4", "--generate-graph", version=version
    )
    assert result.returncode == 0, result.stderr
    out = run / "tensorrt"
    assert result.stdout.splitlines()[-1] == str(out)
    shown = [" ".join(command) for command in commands]
    assert f"target={target}" in shown[1]
    assert shown[2].startswith("-m deploy.check")
    builds = [text for text in shown if "deploy.engine build" in text]
    assert [("--precision int8" in text, "--max-batch 12" in text) for text in builds] == [
        (True, True),
        (False, True),
    ]
    assert f"{out}/int8.onnx" in builds[0]
    assert f"{run}/float.onnx" in builds[1]
    (comparison,) = [text for text in shown if "--compare" in text]
    assert f"{out}/float.engine@tensorrt {out}/int8.engine@tensorrt" in comparison
    assert "--batch 1,12,4" in comparison
    assert any("deploy.engine layers" in text for text in shown)
    report = (out / "report.md").read_text()
    assert f"TensorRT {version}, 320 pixels" in report
    assert "| int8.engine | 0.5984 | 0.8879 |" in report
    assert "| batch | a | b |" in report


def test_val_trt_names_files_by_the_codes_of_the_graph(world):
    call, run, data = world
    result, commands = call("val_trt.sh", run, data, 320, version="11.4.0", codes="fp8")
    assert result.returncode == 0, result.stderr
    out = run / "tensorrt"
    assert sorted(path.name for path in out.glob("*.onnx")) == ["fp8.onnx"]
    builds = [" ".join(command) for command in commands if command[2:3] == ["build"]]
    assert f"{out}/fp8.onnx" in builds[0]
    assert "--precision fp8" in builds[0]
    (comparison,) = [command for command in commands if "--compare" in command]
    assert compared(comparison) == [f"{out}/float.engine@tensorrt", f"{out}/fp8.engine@tensorrt"]
    assert "| fp8.engine | 0.5984 | 0.8879 |" in (out / "report.md").read_text()


def test_val_trt_quantizes_a_checkpoint_first(world, tmp_path):
    call, _, data = world
    weights = tmp_path / "model w.pt"
    weights.touch()
    made = ROOT / "runs" / "val_trt" / "model w-640"
    try:
        result, commands = call("val_trt.sh", weights, data, 640)
        assert result.returncode == 0, result.stderr
        training = commands[1]
        assert training[:2] == ["train_qat.py", "+experiment=detector"]
        assert f"weights={weights}" in training
        assert "data.image_size=640" in training
        assert "stages=[float,calibrate,export]" in training
        assert not any("layers" in command for command in commands)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def test_val_trt_takes_a_rectangle(world, tmp_path):
    call, _, data = world
    weights = tmp_path / "wide.pt"
    weights.touch()
    try:
        result, commands = call("val_trt.sh", weights, data, "384x640")
        assert result.returncode == 0, result.stderr
        shown = [" ".join(command) for command in commands]
        assert "data.image_size=[384,640]" in commands[1]
        assert len([text for text in shown if "--size 384x640" in text]) == 2
        assert any("--compare" in text and "--shapes 384x640 " in text for text in shown)
    finally:
        shutil.rmtree(ROOT / "runs" / "val_trt" / "wide-384x640", ignore_errors=True)
    for wrong in ("384x", "384x650", "x640", "384x640x3", "0x640"):
        assert call("val_trt.sh", weights, data, wrong)[0].returncode == 2


@pytest.mark.parametrize("gpu", [False, True])
def test_val_trt_takes_tensorrt_for_rtx(world, gpu):
    call, run, data = world
    arguments = (run, data, 320, "--runtime", "tensorrt_rtx", "--graph")
    result, commands = call("val_trt.sh", *arguments, version="1.7.1.116", gpu=gpu)
    assert result.returncode == 0, result.stderr
    out = run / "tensorrt_rtx"
    assert result.stdout.splitlines()[-1] == str(out)
    shown = [" ".join(command) for command in commands]
    assert shown[0] == "-m deploy.engine version --runtime tensorrt_rtx"
    assert any("target=tensorrt_rtx" in text for text in shown)
    builds = [text for text in shown if "deploy.engine build" in text]
    assert len(builds) == 2
    assert all("--runtime tensorrt_rtx" in text for text in builds)
    report = (out / "report.md").read_text()
    assert "# TensorRT for RTX 1.7.1.116, 320 pixels" in report
    assert "| SM89 | 7 | 1 fp16, 3 int8 | 2.0 | 1.0 |" in report
    ran = [text for text in shown if any(name in text for name in ("evaluate", "--compare", "engine layers"))]
    assert len(ran) == (4 if gpu else 0)
    assert ("Not run here: torch sees no GPU." in report) != gpu
    assert ("| int8.plan | 0.5984 | 0.8879 |" in report) == gpu
    if gpu:
        (comparison,) = [text for text in ran if "--compare" in text]
        assert f"{out}/float.plan@tensorrt_rtx {out}/int8.plan@tensorrt_rtx" in comparison
        assert "--graph" not in comparison


def test_val_trt_tells_a_folder_that_cannot_be_written(world):
    call, run, data = world
    (run / "tensorrt").touch()  # a file in the place of the folder
    result, commands = call("val_trt.sh", run, data, 320)
    assert result.returncode == 3
    assert f"{run}/tensorrt cannot be written by user" in result.stderr
    assert "docker run --user" in result.stderr
    assert len(commands) == 1


def test_val_trt_without_tensorrt_names_the_container(world):
    call, run, data = world
    result, commands = call("val_trt.sh", run, data, 320, version=None)
    assert result.returncode == 3
    assert "docker build -t octet ." in result.stderr
    assert len(commands) == 1
    assert not (run / "tensorrt").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["RUN", "DATA"], 2, "Usage"),
        (["RUN", "DATA", "333"], 2, "multiple of 32"),
        (["RUN", "DATA", "0"], 2, "multiple of 32"),
        (["RUN", "DATA", "320", "--batch", "1;4"], 2, "not a list"),
        (["RUN", "DATA", "320", "--fast"], 2, "--fast"),
        (["RUN", "DATA", "320", "--runtime", "openvino"], 2, "none of tensorrt, tensorrt_rtx"),
        (["none", "DATA", "320"], 3, "No run directory or checkpoint at 'none'"),
        (["RUN", "none", "320"], 3, "No data set at 'none'"),
    ],
)
def test_val_trt_arguments(world, arguments, code, message):
    call, run, data = world
    places = {"RUN": run, "DATA": data}
    result, commands = call("val_trt.sh", *[places.get(a, a) for a in arguments])
    assert (result.returncode, message in result.stderr, commands) == (code, True, [])


def test_benchmark_script(world):
    call, run, _ = world
    result, commands = call("benchmark.sh", run, "--batch", "1,4", "--time", "2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(run / "latency-openvino.md")
    assert commands[0] == ["-m", "pipeline.run.files", str(run), "--runtime", "openvino"]
    (command,) = commands[1:]
    assert command[command.index("--compare") + 1 : command.index("--runtime")] == [
        f"{run}/float.onnx@openvino",
        f"{run}/float.onnx@openvino:bf16",
        f"{run}/model.onnx@openvino",
    ]
    assert call("benchmark.sh", run, "--runtime", "tensorrt")[0].returncode == 3
    assert call("benchmark.sh", run, "--runtime", "tflite")[0].returncode == 2
    assert call("benchmark.sh")[0].returncode == 2
    assert call("benchmark.sh", run / "none")[0].returncode == 3


def compared(command):
    return command[command.index("--compare") + 1 : command.index("--runtime")]


def test_benchmark_script_times_the_graph_of_the_runtime(world):
    call, run, _ = world
    result, commands = call("benchmark.sh", run, "--runtime", "onnxruntime")
    assert result.returncode == 3  # not the graph that was written for OpenVINO
    assert f"python export.py run={run} target=onnxruntime" in result.stderr
    assert not any("deploy.benchmark" in command for command in commands)
    (run / "export").mkdir()
    graph = run / "export" / "model-onnxruntime.onnx"  # where export.py writes it
    graph.touch()
    result, commands = call("benchmark.sh", run, "--runtime", "onnxruntime")
    assert result.returncode == 0, result.stderr
    assert compared(commands[-1]) == [f"{run}/float.onnx@onnxruntime", f"{graph}@onnxruntime"]
    assert f"timing {graph}@onnxruntime" in result.stderr
    (run / "model-onnxruntime.onnx").touch()  # of the stage `export`, for a run with both runtimes
    names = {"openvino": "model.onnx", "onnxruntime": "model-onnxruntime.onnx"}
    exports = [{"path": path, "target": target} for target, path in names.items()]
    (run / "export.json").write_text(json.dumps({"exports": exports}))
    _, commands = call("benchmark.sh", run, "--runtime", "onnxruntime")
    assert compared(commands[-1])[-1] == f"{run}/model-onnxruntime.onnx@onnxruntime"


def test_benchmark_script_times_tensorrt_engines(world):
    call, run, _ = world
    (run / "export.json").write_text(json.dumps({"exports": [{"path": "model.onnx", "target": "trt10"}]}))
    built = [
        run / "engines" / "tensorrt-fp16" / "float.engine",
        run / "engines" / "tensorrt-int8" / "model.engine",
    ]
    result, _ = call("benchmark.sh", run, "--runtime", "tensorrt")
    assert "scripts/val_trt.sh" in result.stderr
    for own in (built, [run / "tensorrt" / "float.engine", run / "tensorrt" / "int8.engine"]):
        for path in own:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        _, commands = call("benchmark.sh", run, "--runtime", "tensorrt")
        assert compared(commands[-1]) == [f"{path}@tensorrt" for path in own]


@pytest.mark.parametrize("script", ["val_trt.sh", "benchmark.sh"])
def test_python_is_the_repositorys_environment(world, tmp_path, script):
    _, run, data = world
    copy = tmp_path / "repository"
    shutil.copytree(ROOT / "scripts", copy / "scripts")
    python = copy / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho called >>'{tmp_path}/calls'\nexit 3\n")
    python.chmod(0o755)
    arguments = [run] if script == "benchmark.sh" else [run, data, 320]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    command = [str(copy / "scripts" / script), *map(str, arguments)]
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 3
    assert (tmp_path / "calls").read_text() == "called\n"


@pytest.mark.parametrize("script", ["val_trt.sh", "benchmark.sh"])
def test_help(world, script):
    result, _ = world[0](script, "--help")
    assert result.returncode == 0
    assert "Usage: scripts/" in result.stdout
    assert "set -" not in result.stdout


def installed(linter):
    """Path of a linter of the `dev` extra, which stands beside Python, or of one that the machine has."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(linter, path=beside)
    if found is None:
        pytest.skip(f"{linter} is not installed: pip install -c constraints.txt -e '.[dev]'")
    return found


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.sh")))
def test_shellcheck_finds_nothing(script):
    subprocess.run([installed("shellcheck"), str(ROOT / "scripts" / script)], check=True)


def test_dockerfile():
    text = (ROOT / "Dockerfile").read_text()
    assert "ARG TAG=" in text
    assert text.rindex("USER 10001") > text.rindex("COPY")
    subprocess.run([installed("hadolint"), str(ROOT / "Dockerfile")], check=True)
