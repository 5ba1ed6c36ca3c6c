"""Model files of strangers: ONNX graphs, checkpoints, and the sidecars beside them."""

from __future__ import annotations

import json
import pickle
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from core.confinement import confine, limited_time
from core.errors import CheckpointError, DeployError, PlacementError
from deploy.check.report import inspect_graph
from deploy.graph.model import load_onnx
from deploy.graph.untrusted import MAX_NODES
from deploy.runtimes.sidecars import read_sidecar
from deploy.runtimes.tensorrt_rtx import TensorRTRTXRuntime
from models.checkpoints.describe import describe_checkpoint
from pipeline.prediction.predictors import read_names
from quant import load_placement

REPOSITORY = Path(__file__).resolve().parents[2]
node = helper.make_node


def detector(*nodes: onnx.NodeProto, **stored: np.ndarray) -> ModelProto:
    """A graph from images [1, 3, 64, 64] to output0; without nodes a convolution and a reshape."""
    weights = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype(np.float32)
    stored = {"w": weights, "shape": np.array([1, 5, -1]), **stored}
    default = (
        node("Conv", ["images", "w"], ["c"], strides=[8, 8]),
        node("Reshape", ["c", "shape"], ["output0"]),
    )
    graph = helper.make_graph(
        list(nodes or default),
        "detector",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def external(model: ModelProto, location: str) -> ModelProto:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    return model


def with_function(*nodes: onnx.NodeProto, inner: str = "F") -> ModelProto:
    model = detector(node(inner, ["images"], ["output0"], domain="own"))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    model.functions.append(helper.make_function("own", "F", ["a"], ["b"], list(nodes), opsets))
    model.opset_import.append(opsets[1])
    return model


def function_reads_a_file() -> ModelProto:
    tensor = TensorProto(name="k", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../../../../../etc/passwd"
    return with_function(node("Constant", [], ["k"], value=tensor), node("Add", ["a", "k"], ["b"]))


def function_bomb() -> ModelProto:
    """Eight functions of ten calls of the one before: 10^8 operators."""
    model = detector(node("F7", ["images"], ["output0"], domain="own"))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    for level in range(8):
        called, domain = (f"F{level - 1}", "own") if level else ("Relu", "")
        names = ["a", *(f"t{index}" for index in range(9)), "b"]
        calls = [node(called, [names[i]], [names[i + 1]], domain=domain) for i in range(10)]
        model.functions.append(helper.make_function("own", f"F{level}", ["a"], ["b"], calls, opsets))
    model.opset_import.append(opsets[1])
    return model


def changed(edit: Callable[[ModelProto], object]) -> ModelProto:
    model = detector()
    edit(model)
    return model


def set_dims(model: ModelProto, *dims: int) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    del tensor.dims[:]
    tensor.dims.extend(dims)


HOSTILE_GRAPHS: dict[str, tuple[Callable[[], ModelProto], str]] = {
    "external data in a function": (function_reads_a_file, "outside the model's folder"),
    "zero byte in a path": (lambda: external(detector(), "a\0b"), "outside the model's folder"),
    "long path": (lambda: external(detector(), "x" * 5000), "outside the model's folder"),
    "size without data": (lambda: changed(lambda m: set_dims(m, 5, 3, 8, 8)), "should have 960"),
    "huge size without data": (lambda: changed(lambda m: set_dims(m, 2**40)), "should have 1099511627776"),
    "negative size": (lambda: changed(lambda m: set_dims(m, -1, 3)), r"has the shape \[-1, 3\]"),
    "unknown type": (
        lambda: changed(lambda m: setattr(m.graph.initializer[0], "data_type", 77)), "unknown data type 77",
    ),
    "unknown input type": (
        lambda: changed(lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 77)), "unknown data type 77",
    ),
    "giant input": (
        lambda: changed(
            lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[2], "dim_value", 2**40)
        ), "has a dimension of 1099511627776",
    ),
    "Q without inputs": (lambda: detector(node("QuantizeLinear", [], ["output0"])), "has 0 inputs"),
    "DQ with one input": (lambda: detector(node("DequantizeLinear", ["images"], ["output0"])), "has 1 inputs"),
    "convolution without outputs": (lambda: detector(node("Conv", ["images", "w"], [])), "has 0 outputs"),
    "attribute of another type": (
        lambda: detector(node("Concat", ["images", "images"], ["output0"], axis="one")), "another type",
    ),
    "attribute that lacks": (lambda: detector(node("Concat", ["images"], ["output0"])), "lacks its attribute axis"),
    "cycle": (lambda: detector(node("Add", ["images", "output0"], ["output0"])), "cycle"),
    "function bomb": (function_bomb, "100000000 operators"),
    "function that calls itself": (
        lambda: with_function(node("F", ["a"], ["b"], domain="own")), "calls itself",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE_GRAPHS)
def test_hostile_graphs_are_refused(kind: str, tmp_path: Path) -> None:
    make, words = HOSTILE_GRAPHS[kind]
    path = tmp_path / "model.onnx"
    path.write_bytes(make().SerializeToString())
    with pytest.raises(DeployError, match=words):
        inspect_graph(path)


def test_a_sound_graph_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(detector().SerializeToString())
    assert inspect_graph(path).summary.num_convs == 1


@pytest.mark.parametrize("part", ["input", "output"])
def test_a_graph_without_inputs_or_outputs_has_a_finding(part: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(changed(lambda m: getattr(m.graph, part).pop()).SerializeToString())
    assert "nothing-to-check" in [finding.rule for finding in inspect_graph(path).findings]


def test_a_chain_in_reverse_order_is_checked_in_seconds(tmp_path: Path) -> None:
    names = ["images", *(f"t{index}" for index in range(19_999)), "output0"]
    nodes = [node("Relu", [a], [b], name=b) for a, b in pairwise(names)]
    path = tmp_path / "model.onnx"
    path.write_bytes(detector(*reversed(nodes)).SerializeToString())
    assert len(nodes) == 20_000 < MAX_NODES
    assert [entry.name for entry in load_onnx(path).graph.node] == names[1:]
    assert inspect_graph(path).summary.num_nodes == 20_000


# -------------------------------------------------------------------------------------------------------- confinement
def confined(code: str) -> subprocess.CompletedProcess[str]:
    """Run code as the child of `run_confined`; `work` is what it does."""
    head = "import sys\nimport core.confinement as c\nfrom core.confinement import confine, limited_time, "
    head += "run_confined\n"
    tail = "\nsys.exit(run_confined(work))\n"
    return subprocess.run(
        [sys.executable, "-c", head + code + tail],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("work", "code", "words"),
    [
        ("return 4", 4, ""),
        ("sys.exit(2)", 2, ""),
        ("confine([]); return len(bytearray(8 << 30))", 3, "asks for more memory"),
        ("confine([], trust=True); return 5 * bool(len(bytearray(1 << 31)))", 5, ""),
        (
            "c.BASE_SECONDS = 0.5; confine([])\n    with limited_time():\n        while True: pass",
            3,
            "took longer",
        ),
        ("import os; os.abort()", 3, "SIGABRT"),
        ("raise KeyError('x')", 1, "KeyError"),
    ],
)
def test_the_end_of_a_confined_process_is_explained(work: str, code: int, words: str) -> None:
    done = confined(f"def work():\n    {work}")
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)


def test_outside_of_a_confined_command_nothing_is_limited() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    confine([Path("x.onnx")])
    with limited_time():
        pass
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


GREEDY = {
    "ConstantOfShape of 4 billion": (
        [node("ConstantOfShape", ["n"], ["big"]), node("ReduceSum", ["big"], ["s"], keepdims=0)], {"n": [4 * 10**9]},
    ),
    "Expand to 10^11": (
        [node("Expand", ["one", "n"], ["big"]), node("ReduceSum", ["big"], ["s"], keepdims=0)],
        {"one": np.float32(1), "n": [1, 3, 200_000, 200_000]},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "command"), list(zip(GREEDY, ("predict", "benchmark"), strict=True)))
def test_graphs_that_allocate_at_run_time_are_ended(kind: str, command: str, tmp_path: Path) -> None:
    nodes, stored = GREEDY[kind]
    model = detector(*nodes, node("Add", ["images", "s"], ["output0"]), **stored)
    path, picture = tmp_path / "model.onnx", tmp_path / "a.bmp"
    path.write_bytes(model.SerializeToString())
    assert __import__("cv2").imwrite(str(picture), np.zeros((64, 64, 3), np.uint8))
    arguments = {
        "predict": [
            "pipeline.predict",
            str(path),
            str(picture),
            "--out",
            str(tmp_path / "out"),
            "--threads",
            "1",
        ],
        "benchmark": ["deploy.benchmark", f"{path}@onnxruntime", "--time", "0.1", "--warmup", "0"],
    }[command]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 3
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 30
    assert after.ru_maxrss < 4 * 2**20  # kB; libraries, and the limit


# ------------------------------------------------------------------------------------------------ checkpoints, sidecars
def archive(path: Path, data: bytes, entries: int = 0) -> Path:
    """A torch archive; further entries have names of 5,000 characters, so that few make a large directory."""
    with zipfile.ZipFile(path, "w") as stream:
        stream.writestr("a/data.pkl", data)
        for number in range(entries):
            stream.writestr(f"a/data/{number:05000d}", b"")
    return path


def test_a_checkpoint_of_many_entries_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = archive(tmp_path / "x.pt", pickle.dumps({}), 2000)
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("the directory was read"))
    with pytest.raises(CheckpointError, match="a directory of more than 5000000 bytes"):
        describe_checkpoint(path)


@pytest.mark.parametrize(
    "data",
    [
        b")" + b"\x85" * 400_000 + b".",
        b"]" * 400_000 + b"a" * 399_999 + b".",
        b"}K\x01" * 150_000 + b"}" + b"s" * 150_000 + b".",
    ],
    ids=["tuples", "lists", "dictionaries"],
)  # fmt: skip
def test_deep_pickles_are_refused_in_seconds(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        describe_checkpoint(archive(tmp_path / "x.pt", b"\x80\x02" + data))


@pytest.mark.parametrize("text", ['{"names": 3}', '{"activation": []}', '{"names": [1]}', '{"head": {}}', "[]",
                                  "[" * 9999, '{"batch_norm_eps": "x"}', '{"sha256": 5}', "9" * 5000,
                                  "\0"])  # fmt: skip
def test_a_manifest_that_was_edited_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(2, np.float32)}, path)
    path.with_name("x.safetensors.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"x\.safetensors\.json"):
        describe_checkpoint(path)


@pytest.mark.parametrize("change", [{"metadata": 3}, {"metadata": {"octet.batch": 4}}, {"capabilities": "SM89"},
                                    {"compiled": [3]}, {"precision": 8}, {"capabilities": [1]}])  # fmt: skip
def test_a_sidecar_that_was_edited_is_refused(change: dict, tmp_path: Path) -> None:
    path = tmp_path / "x.plan"
    path.write_bytes(b"plan")
    sidecar = {
        "precision": "int8",
        "metadata": {"octet.batch": "4"},
        "capabilities": ["SM89"],
        "compiled": [],
    }
    path.with_name("x.plan.json").write_text(json.dumps(sidecar))
    assert TensorRTRTXRuntime.stored_batch(path) == 4
    path.with_name("x.plan.json").write_text(json.dumps(sidecar | change))
    with pytest.raises(DeployError, match=r"x\.plan\.json is not an engine's description"):
        TensorRTRTXRuntime.stored_details(path)
    if "compiled" not in change:
        with pytest.raises(DeployError):
            read_sidecar(path)


@pytest.mark.parametrize("text", ["5", "[1]", "{" * 1000, "[" * 100_000, "{0.5: 'a'}", "{1: 'a'}", "{-1: 'a'}",
                                  "9" * 5000, "{0: []}", "__import__('os').system('touch executed')"])  # fmt: skip
def test_odd_class_names_of_a_model_file_are_refused(text: str) -> None:
    with pytest.raises(DeployError, match="class names"):
        read_names(text)


PLACEMENT = {
    "groups": [
        {
            "name": "a",
            "tensors": [{"name": "a", "node": "a", "users": ["x"]}],
            "layers": ["x"],
            "bits": 8,
            "signed": True,
        }
    ],
    "weights": [{"layer": "x", "axis": 0, "group": "a", "bits": 8}],
    "matmuls": [{"name": "m", "node": "m", "groups": ["a", "a"]}],
    "kept_float": {"y": "policy"},
    "concats": {"c": True},
}


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("groups", 0, "bits"), 3.5, "bits of a is 3.5, expected a whole number"),
        (("groups", 0, "signed"), "no", "signed of a is 'no', expected true or false"),
        (("groups", 0, "tensors", 0, "node"), ["a"], r"node of a tensor of a is \['a'\], expected a name"),
        (("groups", 0, "name"), 4, "name of a group is 4"),
        (("groups", 0, "layers"), "x", "layers of a is 'x', expected a list"),
        (("weights", 0, "group"), "b", "layer 'x' reads the group 'b', which is not among the groups"),
        (("weights", 0, "axis"), True, "axis of x is True"),
        (("matmuls", 0, "groups"), ["a", "b"], "matmul 'm' reads the group 'b'"),
        (("concats", "c"), "no", "concats of 'c' is 'no'"),
        (("kept_float",), ["y"], "kept_float"),
        (("groups",), None, "groups is None"),
        (("weights", 0), "x", "a weight is 'x', expected a map"),
    ],
)
def test_a_placement_that_was_edited_is_refused_by_name(
    place: tuple, value: object, words: str, tmp_path: Path
) -> None:
    content = json.loads(json.dumps(PLACEMENT))
    (tmp_path / "good.yaml").write_text(json.dumps(content))
    assert load_placement(tmp_path / "good.yaml").weights[0].group == "a"
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / "bad.yaml").write_text(json.dumps(content))
    with pytest.raises(PlacementError, match=words):
        load_placement(tmp_path / "bad.yaml")
