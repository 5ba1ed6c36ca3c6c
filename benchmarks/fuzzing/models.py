"""Models: checkpoints and their manifests, sidecars of engines, ONNX graphs."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save

from benchmarks.fuzzing.datasets import picture
from benchmarks.fuzzing.mutations import Read, as_text, mutate_bytes, mutate_value, to_json
from core.confinement import run_confined
from core.errors import DeployError
from deploy.check.report import inspect_graph
from deploy.runtimes.sidecars import read_sidecar
from deploy.runtimes.tensorrt_rtx import TensorRTRTXRuntime
from models.checkpoints.describe import describe_checkpoint
from pipeline.predict import main as predict
from pipeline.prediction.predictors import read_names


@cache
def checkpoints() -> dict[str, bytes]:
    """Small checkpoints by file name."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = {f"model.{key}": value for key, value in module.state_dict().items()}
    files: dict[str, bytes] = {"plain.safetensors": save(state)}
    for name, content in (("state.pt", state), ("module.pt", {"model": module, "epoch": 3, "names": ["a"]})):
        stream = io.BytesIO()
        torch.save(content, stream)
        files[name] = stream.getvalue()
    stream = io.BytesIO()
    torch.save(state, stream, _use_new_zipfile_serialization=False)
    files["legacy.pt"] = stream.getvalue()
    stream = io.BytesIO()
    np.savez(stream, **{key: value.numpy() for key, value in state.items()})
    return {**files, "arrays.npz": stream.getvalue()}


def make_checkpoint(chance: random.Random, folder: Path) -> Read:
    """A checkpoint: its bytes, or one entry of its archive with sound checksums, or a pickle of something else."""
    name = chance.choice(list(checkpoints()))
    data, path = checkpoints()[name], folder / name
    if zipfile.is_zipfile(io.BytesIO(data)) and chance.random() < 0.7:
        stream = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(stream, "w") as after:
            chosen = chance.choice(before.namelist())
            for entry in before.namelist():
                content = before.read(entry)
                after.writestr(entry, mutate_bytes(chance, content) if entry == chosen else content)
        data = stream.getvalue()
    elif chance.random() < 0.2:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as after:
            after.writestr(
                "a/data.pkl", pickle.dumps(mutate_value(chance, {"model": {"x": 1}, "names": ["a"]}), 2)
            )
        data = stream.getvalue()
    else:
        data = mutate_bytes(chance, data)
    path.write_bytes(data)
    if chance.random() < 0.3:
        path.with_name(f"{name}.json").write_text("{}")
    return lambda: describe_checkpoint(path)


def make_manifest(chance: random.Random, folder: Path) -> Read:
    """The manifest beside a `.safetensors` file, and the sidecar of an engine."""
    manifest = {
        "architecture": "yolov9t",
        "activation": "silu",
        "names": ["a"],
        "head": "one2many",
        "batch_norm_eps": 1e-3,
    }
    path = folder / "plain.safetensors"
    path.write_bytes(checkpoints()["plain.safetensors"])
    path.with_name("plain.safetensors.json").write_bytes(as_text(chance, manifest, to_json))
    return lambda: describe_checkpoint(path)


def make_sidecar(chance: random.Random, folder: Path) -> Read:
    """The sidecar of a TensorRT engine."""
    numbers = {"num_kernels": 3, "convolutions": {"int8": 2}, "moved_bytes": 10}
    sidecar = {
        "precision": "int8", "gpu": "x", "tensorrt_rtx": "1.7", "engine_sha256": "0", "capabilities": ["SM89"],
        "metadata": {"octet.batch": "1", "octet.image_size": "64x64", "names": "{0: 'a'}"},
        "compiled": [{"capability": "SM89", "engine": numbers, "fp16": numbers, "findings": []}],
    }  # fmt: skip
    path = folder / "x.plan"
    path.write_bytes(b"plan")
    (folder / "x.plan.json").write_bytes(as_text(chance, sidecar, to_json))

    def look() -> None:
        read_sidecar(path)
        TensorRTRTXRuntime.stored_size(path)
        TensorRTRTXRuntime.stored_batch(path)
        TensorRTRTXRuntime.stored_details(path)

    return look


def make_names(chance: random.Random, folder: Path) -> Read:
    """Class names as a model file's metadata has them."""
    base = chance.choice(('{"0": "cat", "1": "dog"}', "{0: 'cat', 1: 'dog'}"))
    text = mutate_bytes(chance, base.encode()).decode("utf-8", "replace")
    return lambda: read_names(text)


@cache
def graph() -> bytes:
    """A detector of 64 x 64 pixels with Q/DQ, a branch and a function."""
    value = helper.make_tensor_value_info
    weights = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype(np.float32)
    stored = {
        "w": weights,
        "shape": np.array([1, 5, -1]),
        "s": np.float32(0.02),
        "z": np.int8(0),
        "yes": np.array(True),
    }
    double = helper.make_function(
        "own",
        "Double",
        ["x"],
        ["y"],
        [helper.make_node("Add", ["x", "x"], ["y"])],
        [helper.make_opsetid("", 17)],
    )
    branches = [
        helper.make_graph(
            [helper.make_node(kind, ["d"], [f"b{kind}"])], kind, [], [value(f"b{kind}", 1, None)]
        )
        for kind in ("Sigmoid", "Relu")
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["f"]),
        helper.make_node("Conv", ["f", "w"], ["c"], name="conv", strides=[8, 8]),
        helper.make_node("Double", ["c"], ["d"], domain="own"),
        helper.make_node("If", ["yes"], ["chosen"], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Reshape", ["chosen", "shape"], ["output0"]),
    ]
    made = helper.make_graph(
        nodes,
        "detector",
        [value("images", TensorProto.FLOAT, [1, 3, 64, 64])],
        [value("output0", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    model = helper.make_model(made, opset_imports=opsets, functions=[double], ir_version=8)
    for key, text in (("names", "{0: 'a'}"), ("octet.outputs", "decoded"), ("octet.target", "onnxruntime")):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, text
    return bytes(model.SerializeToString())


def mutate_message(chance: random.Random, message: Any) -> None:
    """Change one field somewhere inside a protobuf message."""
    fields = [(descriptor, value) for descriptor, value in message.ListFields()]
    if not fields:
        return
    descriptor, value = chance.choice(fields)
    is_many = hasattr(value, "append") and not isinstance(value, str | bytes)
    if is_many and chance.random() < 0.25:
        index = chance.randrange(len(value))
        if chance.random() < 0.5:
            del value[index]
        else:
            value.append(value[index])
    elif descriptor.message_type is not None:
        mutate_message(chance, chance.choice(list(value)) if is_many else value)
    else:
        old = value[0] if is_many else value
        new: Any = chance.choice((0, 1, -1, 2, 7, 77, 2**31 - 1, 2**31, 2**40, 2**62))
        if isinstance(old, str):
            new = chance.choice(
                ("", "x", "a\0b", "../../etc/passwd", "images", "output0", "w", "Loop", "Conv", "c", "9" * 50)
            )
        elif isinstance(old, bytes):
            new = mutate_bytes(chance, old)
        elif isinstance(old, float):
            new = chance.choice((0.0, -1.0, float("nan"), float("inf")))
        try:
            if is_many:
                value[chance.randrange(len(value))] = new
            else:
                setattr(message, descriptor.name, new)
        except (ValueError, TypeError, OverflowError):
            pass  # a number that the field does not take


def graph_case(chance: random.Random, folder: Path) -> Path:
    """A mutated graph on disk."""
    path = folder / "model.onnx"
    if chance.random() < 0.3:
        path.write_bytes(mutate_bytes(chance, graph()))
        return path
    model = onnx.ModelProto.FromString(graph())
    for _ in range(chance.randint(1, 4)):
        mutate_message(chance, model)
    path.write_bytes(model.SerializeToString())
    return path


def make_graph_check(chance: random.Random, folder: Path) -> Read:
    """An ONNX file for the graph check."""
    path = graph_case(chance, folder)
    return lambda: inspect_graph(path)


def make_graph_run(chance: random.Random, folder: Path) -> Read:
    """An ONNX file for predict, confined as the command confines it."""
    path, image = graph_case(chance, folder), folder / "a.png"
    image.write_bytes(picture("PNG"))
    arguments = [str(path), str(image), "--out", str(folder / "out"), "--threads", "1"]

    def look() -> None:
        code = run_confined(lambda: predict(arguments))
        if code == 3:
            raise DeployError("refused")
        if code:
            raise RuntimeError(f"exit code {code}")

    return look
