"""TensorRT for RTX as a runtime: real plans are built and inspected here; running them is tried on the double only."""

import hashlib
import importlib.util
import json
import logging

import numpy as np
import onnx
import pytest
import test_deploy_engine_stage as stages
import torch
from deploy_networks import FloatDetector, SmallDetector
from tensorrt_double import PLAN, Double, HostDevice

from configs import compose
from core.choices import CAPABILITIES
from core.errors import ConfigError, DeployError
from core.rows import PTQ, ResultRow, engine_key, shipped_rows
from core.runtimes import RUNTIMES, runtime_for
from deploy import EngineRequest, build_engine, export_onnx, open_engine
from deploy.engine import main
from deploy.runtimes.engines import find_image_size, runtime_of
from deploy.runtimes.tensorrt_builder import BuildOptions, sidecar_path
from deploy.runtimes.tensorrt_rtx import TensorRTRTXRuntime
from pipeline.prediction.predictors import choose_runtime
from pipeline.run.directory import Run
from pipeline.run.files import find_engine
from pipeline.stages.engine import check_runtimes
from pipeline.stages.report import report_stage
from report.html import headline
from report.tables import format_table, markdown_results

SIZE = (64, 96)
rtx = pytest.mark.skipif(
    not importlib.util.find_spec("tensorrt_rtx"),
    reason="TensorRT for RTX is not installed: pip install 'octet[tensorrt-rtx]'",
)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    path = tmp_path_factory.mktemp("graph") / "small.onnx"
    return export_onnx(SmallDetector(), path, SIZE, "tensorrt_rtx").path


@pytest.fixture(scope="module")
def plan(graph):
    """A plan for one GPU; built once for all tests that read it."""
    request = EngineRequest(precision="int8", batch=2, image_size=SIZE, compute_capabilities=("SM89",))
    return build_engine("tensorrt_rtx", graph, graph.parent, request)


# -- the stage


@rtx
@without_gpu
def test_the_stage_builds_plans_without_a_gpu(tmp_path):
    job = stages.make_job(
        tmp_path / "run", "deploy=tensorrt_rtx", "deploy.compute_capabilities=[SM86,SM120]", "min_ap=0"
    )
    check_runtimes(job)
    rows = stages.deploy(job)
    assert set(rows) == {"ptq", "engine:tensorrt_rtx:int8", "engine:tensorrt_rtx:fp16"}
    row = rows["engine:tensorrt_rtx:int8"]
    assert (row.ap, row.value, row.latency_ms_median, row.images_per_second) == (None, None, None, None)
    assert row.extras["built_for"] == ["SM86", "SM120"]
    graph = onnx.load(job.run.path("model.onnx"))
    names = {initializer.name for initializer in graph.graph.initializer}
    convolutions = [node for node in graph.graph.node if node.op_type == "Conv"]
    # weights that a DequantizeLinear reads are no initializers of the Conv itself
    quantized = sum(node.input[1] not in names for node in convolutions)
    assert 0 < quantized < len(convolutions)
    for capability in ("SM86", "SM120"):
        found = row.extras["compiled"][capability]
        assert found["convolutions"] == {"fp16": len(convolutions) - quantized, "int8": quantized}
        assert found["findings"] == 0
        assert found["moved_megabytes"] > 0 < found["fp16_moved_megabytes"]
    plan = job.run.path("engines/tensorrt_rtx-int8/model.plan")
    assert row.size_bytes == plan.stat().st_size > 1000
    sidecar = json.loads(plan.with_name("model.plan.json").read_text())
    assert sidecar["onnx_sha256"] == hashlib.sha256(job.run.path("model.onnx").read_bytes()).hexdigest()
    assert sidecar["engine_sha256"] == hashlib.sha256(plan.read_bytes()).hexdigest()
    assert sidecar["shapes"]["largest"] == [3, 3, stages.SIZE, stages.SIZE]
    report_stage(job)
    words = "built for SM86, SM120; not run here"
    assert words in job.run.path("report.md").read_text()
    assert words in job.run.path("report.html").read_text()


@rtx
@without_gpu
def test_engines_with_fp8_codes_are_called_so(tmp_path, monkeypatch, capsys):
    job = stages.make_job(
        tmp_path / "run",
        "deploy=tensorrt_rtx",
        "quant=fp8",
        "deploy.compute_capabilities=[SM89]",
        "deploy.fixed_point_images=0",
    )
    rows = stages.deploy(job)
    assert set(rows) == {"ptq", "engine:tensorrt_rtx:fp8", "engine:tensorrt_rtx:fp16"}
    assert "fp8" in rows["engine:tensorrt_rtx:fp8"].extras["compiled"]["SM89"]["convolutions"]
    plan = job.run.path("engines/tensorrt_rtx-fp8/model.plan")
    assert json.loads(sidecar_path(plan).read_text())["precision"] == "fp8"
    assert find_engine(job.run, RUNTIMES["tensorrt_rtx"], "model.onnx") == plan
    # no GPU, so that detections come from torch, and a line says so
    assert choose_runtime(job) == "torch"  # the stage is not done by the run's own account
    assert capsys.readouterr().err.count("need a GPU") == 0
    monkeypatch.setattr(Run, "is_done", lambda run, stage: stage == "engine")
    assert choose_runtime(job) == "torch"
    line = "TensorRT for RTX engines need a GPU, and torch sees none. Using torch; --runtime chooses another."
    assert line in capsys.readouterr().err
    job.config.deploy.runtimes = ["tensorrt_rtx", "openvino"]
    assert choose_runtime(job) == "openvino"
    assert "Using OpenVINO" in capsys.readouterr().err


def built_rows():
    extras = {"built_for": ["SM86", "SM89", "SM120"]}
    return [
        ResultRow(PTQ, ap=0.5),
        ResultRow(engine_key("tensorrt_rtx", "int8"), size_bytes=10, extras=extras),
        ResultRow(engine_key("tensorrt_rtx", "fp16"), size_bytes=20, extras=extras),
    ]


def test_tables_say_what_was_built_in_place_of_a_latency():
    rows = built_rows()
    text = format_table(rows)
    assert max(map(len, text.splitlines())) <= 120
    (line,) = [line for line in markdown_results(rows).splitlines() if "int8" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == [
        "-",
        "-",
        "-",
        "-",
        "built for SM86, SM89, SM120; not run here",
        "-",
        "-",
        "0.00 (50%)",
    ]
    words = " ".join(" ".join(line.split()[-4:]) for line in text.splitlines())
    assert "not run here" in words
    # an engine that did not run is not what the figures are taken from
    assert [row.key for row in shipped_rows(rows)] == [PTQ]
    assert [tile["remark"] for tile in headline(rows)] == ["ptq"]
    ran = ResultRow(engine_key("openvino", "int8"), ap=0.4, latency_ms_median=2.0)
    assert [row.key for row in shipped_rows([*rows, ran])] == [ran.key]


# -- files and refusals


def test_the_registry_knows_plans(tmp_path):
    assert runtime_for("tensorrt_rtx").name == "tensorrt_rtx"
    assert runtime_for("trt11").name == "tensorrt"
    assert RUNTIMES["tensorrt_rtx"].engine_name("float.onnx", "f16") == "tensorrt_rtx-fp16/float.plan"
    assert runtime_of(tmp_path / "model.plan") == "tensorrt_rtx"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["deploy=tensorrt_rtx", "deploy.outputs=onnx_nms"], "graphs for tensorrt_rtx cannot have it"),
        (
            ["deploy=trt11", "deploy.runtimes=[tensorrt_rtx]", "deploy.outputs=efficient_nms"],
            "with tensorrt_rtx",
        ),
        (["deploy.runtimes=[tensorrt_rtx]"], "deploy=tensorrt_rtx sets both"),
        (["deploy=tensorrt_rtx", "deploy.compute_capabilities=[SM90]"], "SM90"),
        (["deploy=tensorrt_rtx", "deploy.float_precisions=[bf16]"], "expected f16 or f32"),
    ],
)
def test_settings_are_checked_before_any_work(settings, words):
    with pytest.raises(ConfigError, match=words):
        compose(["+experiment=demo", *settings])


def refuse(words, path, tmp_path, **request):
    with pytest.raises(DeployError, match=words):
        build_engine("tensorrt_rtx", path, tmp_path, EngineRequest(**request))
    assert not list(tmp_path.glob("*.plan"))


@pytest.mark.parametrize(
    ("outputs", "operator"), [("onnx_nms", "NonMaxSuppression"), ("efficient_nms", "EfficientNMS_TRT")]
)
def test_nms_is_refused_before_the_build(tmp_path, outputs, operator):
    path = export_onnx(SmallDetector(), tmp_path / "nms.onnx", SIZE, "trt11", outputs=outputs).path
    refuse(f"NMS in it .{operator}.*outputs=decoded", path, tmp_path)


def test_other_refusals_come_before_the_build(graph, tmp_path):
    path = export_onnx(SmallDetector(), tmp_path / "open.onnx", SIZE, "tensorrt_rtx", dynamic_size=True).path
    refuse(
        "smallest images of the plan are 1x1.*from 160x160",
        path,
        tmp_path,
        options=BuildOptions(min_size=(1, 1)),
    )
    refuse("SM90: expected one of SM75, SM80", graph, tmp_path, compute_capabilities=("SM90",))
    refuse("is quantized; export it with", graph, tmp_path, precision="f16")
    plain = export_onnx(FloatDetector(), tmp_path / "float.onnx", SIZE, "trt10", quantized=False).path
    refuse("needs a graph with Q/DQ", plain, tmp_path, precision="int8")
    unsigned = export_onnx(SmallDetector(), tmp_path / "unsigned.onnx", SIZE, "openvino").path
    refuse("exported for openvino.*target=tensorrt_rtx", unsigned, tmp_path)


@rtx
def test_turing_is_warned_of_before_the_build(graph, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        request = EngineRequest(image_size=SIZE, compute_capabilities=("SM75",))
        path = build_engine("tensorrt_rtx", graph, tmp_path, request)
    assert "SM75: no INT8 convolutions there" in caplog.records[0].message
    details = TensorRTRTXRuntime.stored_details(path)
    assert "int8" not in details["compiled"]["SM75"]["convolutions"]
    assert details["compiled"]["SM75"]["findings"] > 0


@rtx
def test_a_plan_has_one_graph_for_all_of_its_gpus(graph, tmp_path, caplog):
    """What is said of each GPU is what this plan does there, not what a plan of its own would do."""
    with caplog.at_level(logging.WARNING):
        request = EngineRequest(image_size=SIZE, compute_capabilities=("SM89", "SM75"))
        path = build_engine("tensorrt_rtx", graph, tmp_path, request)
    assert "on all GPUs of this plan (SM89, SM75)" in caplog.records[0].message
    compiled = TensorRTRTXRuntime.stored_details(path)["compiled"]
    assert list(compiled) == ["SM89", "SM75"]
    assert all("int8" not in build["convolutions"] for build in compiled.values())
    sidecar = json.loads(sidecar_path(path).read_text())
    kernels = [kernel for kernel in sidecar["kernels"] if kernel["kind"] != "shape_call"]  # of the open batch
    assert len(kernels) == compiled["SM89"]["kernels"]


@rtx
def test_the_command_builds_float_plans(tmp_path, capsys):
    path = export_onnx(FloatDetector(), tmp_path / "float.onnx", SIZE, "trt10", quantized=False).path
    for precision in ("fp16", "fp32"):
        folder = tmp_path / precision
        options = f"--runtime tensorrt_rtx --precision {precision} --capabilities SM89".split()
        assert main(["build", str(path), str(folder), *options]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == str(folder / "float.plan")
        sidecar = json.loads((folder / "float.plan.json").read_text())
        assert (sidecar["precision"], sidecar["capabilities"]) == (precision, ["SM89"])
        assert sidecar["compiled"] == []
        assert "/stem/Conv" in {node for kernel in sidecar["kernels"] for node in kernel["nodes"]}
    sizes = [(tmp_path / precision / "float.plan").stat().st_size for precision in ("fp16", "fp32")]
    assert sizes[0] < sizes[1]


@rtx
@without_gpu
def test_a_plan_needs_a_gpu_to_run(plan):
    assert not TensorRTRTXRuntime.can_run()
    assert find_image_size(plan) == SIZE
    with pytest.raises(DeployError, match="needs a GPU and its driver"):
        open_engine("tensorrt_rtx", plan)


@rtx
def test_the_command_tells_the_version(plan, capsys):
    assert main(["version", "--runtime", "tensorrt_rtx"]) == 0
    assert capsys.readouterr().out.strip() == json.loads(sidecar_path(plan).read_text())["tensorrt_rtx"]
    assert main(["layers", "model.xml", "--json", "layers.json"]) == 3
    assert "OpenVINO is another runtime" in capsys.readouterr().err


# -- running, on the double


@rtx
def test_a_plan_runs_with_calls_that_the_library_has(plan, tmp_path, monkeypatch):
    """The double has TensorRT 11's surface; each call that the runtime makes is looked up in the real module."""
    import tensorrt_rtx

    double = Double("11.4.0.106")
    path = tmp_path / "model.plan"
    path.write_bytes(PLAN)
    sidecar = json.loads(plan.with_name(f"{plan.name}.json").read_text())
    sidecar |= {"tensorrt_rtx": double.version, "engine_sha256": hashlib.sha256(PLAN).hexdigest()}
    (tmp_path / "model.plan.json").write_text(json.dumps(sidecar))
    with TensorRTRTXRuntime(path, device=HostDevice(), trt=double.module) as runtime:
        assert runtime.infer(np.zeros((2, 3, *SIZE), np.float32)).shape == (2, 7, 126)
        assert runtime.details["built_for"] == ["SM89"]
        assert runtime.versions["tensorrt_rtx"] == double.version
        assert runtime.precision == "int8"
    calls = {name.rstrip("=") for name, _ in double.log}
    assert "IExecutionContext.execute_async_v3" in calls
    for call in calls:
        found = tensorrt_rtx
        for part in call.split("."):
            found = getattr(found, part)
    monkeypatch.setattr("deploy.runtimes.tensorrt_rtx.gpu_capability", lambda: "SM120")
    with pytest.raises(DeployError, match=r"built for SM89, this GPU is SM120.*capabilities=\[SM120\]"):
        TensorRTRTXRuntime(path, device=HostDevice(), trt=double.module)
    (tmp_path / "model.plan.json").write_text(json.dumps({**sidecar, "tensorrt_rtx": "1.0"}))
    with pytest.raises(DeployError, match=r"built with TensorRT for RTX 1\.0, here is 11\.4"):
        TensorRTRTXRuntime(path, device=HostDevice(), trt=double.module)


@rtx
def test_capabilities_are_those_of_the_library():
    import tensorrt_rtx

    assert set(CAPABILITIES) == set(tensorrt_rtx.ComputeCapability.__members__) - {"CURRENT", "NONE"}
