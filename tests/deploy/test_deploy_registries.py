"""A runtime and a target are data: both are added here from outside, and go through every stage that names them."""

import subprocess
import sys

import onnx
import pytest
import test_deploy_engine_stage as stages

from configs import compose
from core.errors import ConfigError, DeployError
from core.registry import Registry, resolve
from core.runtimes import RUNTIMES, RuntimeEntry, runtime_for
from core.targets import TARGETS, Target
from pipeline.stages.engine import check_runtimes

ECHO = '''
from deploy.graph.passes import PassResult
from deploy.runtimes.onnxruntime import ONNXRuntime
from deploy.targets.unsigned import unsigned_activations


def passes(model, request):
    yield unsigned_activations
    model.doc_string = "made for echo"
    yield count_nodes


def count_nodes(graph):
    return PassResult(edits=len(graph.nodes))


class Echo(ONNXRuntime):
    """Engines are ONNX files of another name."""

    name = "echo"
    required = []

    @classmethod
    def require(cls, target=None):
        cls.required.append(target)

    @classmethod
    def build(cls, onnx_path, out_dir, request):
        path = out_dir / f"{onnx_path.stem}.echo"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(onnx_path.read_bytes())
        return path

    @property
    def details(self):
        return {"echo": self.path.parent.name}
'''


@pytest.fixture
def echo(tmp_path, monkeypatch):
    """The module of a target and a runtime that no file of the product knows, and their entries."""
    (tmp_path / "echo_module.py").write_text(ECHO)
    monkeypatch.syspath_prepend(tmp_path)
    target = Target("echo-graph", opset=18, passes="echo_module:passes")
    runtime = RuntimeEntry(
        "echo",
        title="Echo",
        factory="echo_module:Echo",
        library="echo",
        targets=("echo-graph",),
        suffixes=(".echo",),
        float_precisions=("f32", "f16"),
        fixes_precision=True,
    )
    monkeypatch.setitem(TARGETS, target.name, target)
    monkeypatch.setitem(RUNTIMES, runtime.name, runtime)
    return resolve(runtime.factory)


def test_a_new_runtime_and_target_go_through_the_stages(tmp_path, echo):
    job = stages.make_job(
        tmp_path / "run",
        "deploy.target=echo-graph",
        "deploy.runtimes=[echo,openvino]",
        "deploy.float_precisions=[f16]",
    )
    check_runtimes(job)
    assert echo.required == ["echo-graph"]
    rows = stages.deploy(job)
    model = onnx.load(job.run.path("model.onnx"))
    assert model.doc_string == "made for echo"
    assert model.opset_import[0].version == 18
    zero_points = {t.data_type for t in model.graph.initializer if t.name.endswith("zero_point_unsigned")}
    assert zero_points == {onnx.TensorProto.UINT8}
    assert job.run.path("engines/echo-int8/model.echo").is_file()
    assert job.run.path("engines/echo-fp16/float.echo").is_file()
    row = rows["engine:echo:int8"]
    assert row.extras["echo"] == "echo-int8"
    assert row.latency_ms_median > 0
    assert row.extras["metric"] == pytest.approx(rows["ptq"].extras["metric"], rel=0.02)
    assert row.extras["metric"] == pytest.approx(rows["engine:openvino:int8"].extras["metric"], rel=0.02)


def test_settings_of_a_new_runtime_are_checked(echo):
    for settings, words in (
        (["deploy.runtimes=[ecco]"], "ecco.*closest: echo"),
        (["deploy.runtimes=[echo]", "deploy.float_precisions=[bf16]"], "with echo: expected f16 or f32"),
        (
            ["deploy.target=echo-graph", "deploy.outputs=efficient_nms"],
            "graphs for echo-graph cannot have it",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            compose(["+experiment=demo", *settings])
    assert runtime_for("echo-graph").name == "echo"


def test_a_registry_names_what_it_has():
    registry = Registry("thing", [Target("alpha", opset=17), Target("beta", opset=17)], DeployError)
    assert registry["beta"].opset == 17
    assert "gamma" not in registry
    with pytest.raises(
        DeployError, match=r"Unknown thing 'bet'; expected one of alpha, beta \(closest: beta\)\."
    ):
        registry["bet"]


def test_entries_name_code_that_exists():
    for target in TARGETS.values():
        assert target.passes is None or callable(resolve(target.passes))
        assert target.float_target is None or target.float_target in TARGETS
    for runtime in RUNTIMES.values():
        assert resolve(runtime.factory).name == runtime.name
        assert set(runtime.targets) <= set(TARGETS)


@pytest.mark.parametrize("module", ["deploy.check.command", "pipeline.run.files"])
def test_small_commands_start_without_torch(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'openvino', 'onnxruntime'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
