"""The stages `export` and `engine` with a network of three convolutions: every form of output, and TensorRT.

TensorRT is the double, here with arithmetic: ONNX Runtime computes what the graph that the builder was given computes.
"""

import ctypes
import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tensorrt_double import PLAN, BufferedMemory, Double, HostDevice
from torch import nn

from configs import compose
from core.errors import ConfigError, DeployError
from core.rows import PTQ
from deploy import OpenVINORuntime, build_engine
from deploy.runtimes.tensorrt import TensorRTRuntime
from pipeline import CustomDetector
from pipeline.input_check import check_input
from pipeline.job import Job
from pipeline.main import run_stage
from pipeline.run.directory import Run
from pipeline.stages import engine
from pipeline.stages.calibrate import calibrate_stage
from pipeline.stages.engine import check_runtimes, engine_stage, open_engines
from pipeline.stages.export import compare_with_torch, export_stage
from pipeline.stages.load import load_stage
from pipeline.stages.place import place_stage
from quant import load_placement

SIZE = 64


class Network(nn.Module):
    """Maps of strides 8, 16 and 32, with class scores that differ from cell to cell."""

    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1), nn.SiLU())
        self.downs = nn.ModuleList(nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU()) for _ in range(2))
        self.boxes = nn.ModuleList(nn.Conv2d(16, 64, 1) for _ in range(3))
        self.classes = nn.ModuleList(nn.Conv2d(16, classes, 1) for _ in range(3))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data *= 3

    def forward(self, images):
        x = self.stem(images)
        maps = [(self.boxes[0](x), self.classes[0](x))]
        for index in (1, 2):
            x = self.downs[index - 1](x)
            maps.append((self.boxes[index](x), self.classes[index](x)))
        return tuple(maps)


def factory(names):
    return CustomDetector(Network(len(names)), strides=(8, 16, 32))


class Upsampling(Network):
    """The same, with a top-down step: upsampling, concat with the finer map, convolution."""

    def __init__(self, classes):
        super().__init__(classes)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.join = nn.Sequential(nn.Conv2d(32, 16, 1), nn.SiLU())

    def forward(self, images):
        fine = self.stem(images)
        middle = self.downs[0](fine)
        maps = [self.join(torch.cat((self.up(middle), fine), 1)), middle, self.downs[1](middle)]
        return tuple((self.boxes[index](x), self.classes[index](x)) for index, x in enumerate(maps))


def upsampling_factory(names):
    return CustomDetector(Upsampling(len(names)), strides=(8, 16, 32))


def total(predict, batches):
    """A measure that any other detection changes: their number, and the sums of their scores and corners."""
    found = torch.cat([one for batch in batches for one in predict(batch.images)]).double()
    return {"value": len(found), "scores": found[:, 4].sum(), "corners": found[:, :4].sum()}


def make_job(folder, *settings):
    """A job whose calibration is done, in a run directory of its own."""
    config = compose(
        [
            "+experiment=demo",
            "model=custom",
            f"model.factory={__name__}:factory",
            f"data.image_size={SIZE}",
            f"data.root={folder.parent / 'synthetic'}",
            "data.synthetic.size=64",
            "data.synthetic.train=8",
            "data.synthetic.val=8",
            "data.workers=0",
            "quant.calibration_images=8",
            f"metric.factory={__name__}:total",
            "evaluate.confidence=0.25",
            "deploy.benchmark_seconds=0.01",
            "deploy.batch=3",
            "deploy.range_images=2",
            *settings,
        ]
    )
    job = Job(config, Run.create(folder, "demo"))
    for stage in (load_stage, place_stage, calibrate_stage):
        stage(job)
    return job


def deploy(job):
    export_stage(job)
    engine_stage(job)
    return {row.name: row for row in job.run.rows()}


@pytest.fixture(scope="module")
def decoded_rows(tmp_path_factory):
    """Rows of OpenVINO and ONNX Runtime with decoded outputs: what the other forms must reproduce."""
    job = make_job(
        tmp_path_factory.mktemp("decoded") / "run",
        "deploy.runtimes=[openvino,onnxruntime]",
    )
    rows = deploy(job)
    assert rows["ptq"].extras["metric"] > 100
    return rows


@pytest.mark.parametrize("form", ["raw", "onnx_nms"])
def test_rows_do_not_depend_on_the_form_of_the_outputs(tmp_path, decoded_rows, form):
    job = make_job(
        tmp_path / "run",
        "deploy.runtimes=[openvino,onnxruntime]",
        "deploy.nms.confidence=0.25",
        "deploy.dynamic_size=true",
        "deploy.opset=18",
    )
    job.config.deploy.outputs = form  # raw is refused for networks of one's own, whose maps may mean anything
    rows = deploy(job)
    for name in ("openvino:int8", "openvino:fp32", "onnxruntime:int8", "onnxruntime:fp32"):
        row, wanted = rows[f"engine:{name}"], decoded_rows[f"engine:{name}"]
        assert row.extras["outputs"] == form
        for figure in ("metric", "scores", "corners"):
            assert row.extras[figure] == pytest.approx(wanted.extras[figure], rel=1e-5), (name, figure)
    model = onnx.load(job.run.path("model.onnx"))
    assert model.opset_import[0].version == 18
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param for dim in dims[2:]] == ["height", "width"]


def test_rows_name_the_precision_hint(tmp_path, decoded_rows):
    assert decoded_rows["engine:openvino:int8"].extras["precision_hint"] == "f32"
    assert decoded_rows["engine:openvino:fp32"].extras["precision_hint"] == "f32"
    assert "precision_hint" not in decoded_rows["engine:onnxruntime:int8"].extras
    job = make_job(tmp_path / "run", "deploy.int8_hint=bf16")
    export_stage(job)
    int8, fp32 = open_engines(job, "openvino")
    assert (int8.precision, int8.precision_hint, fp32.precision_hint) == ("int8", "bf16", "f32")
    with OpenVINORuntime(int8.path, "auto") as left, OpenVINORuntime(fp32.path, "auto") as floating:
        assert left.precision == "int8"
        assert floating.precision == {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}[left.precision_hint]
        assert json.loads(left.metadata["names"])["0"] == job.splits.val.names[0]


def test_a_stopped_stage_does_not_build_its_engines_again(tmp_path, monkeypatch, capfd):
    """Killed in the second build: the first engine stays as it is; one that was changed since is built again."""
    job = make_job(tmp_path / "run", "deploy.runtimes=[openvino,onnxruntime]")
    export_stage(job)
    built, stop_at = [], [2]

    def build(runtime, graph, folder, request):
        built.append((runtime, graph.name))
        if len(built) == stop_at[0]:
            raise KeyboardInterrupt
        return build_engine(runtime, graph, folder, request)

    monkeypatch.setattr(engine, "build_engine", build)
    with pytest.raises(KeyboardInterrupt):
        run_stage(job, engine.ENGINE)
    before = job.run.path("engines/model.xml").stat().st_mtime_ns
    stop_at[0] = 4
    with pytest.raises(KeyboardInterrupt):
        run_stage(job, engine.ENGINE)
    assert job.run.path("engines/model.xml").stat().st_mtime_ns == before
    assert "engines/model.xml: built before" in capfd.readouterr().err
    job.run.path("engines/float.bin").write_bytes(b"damaged")
    run_stage(job, engine.ENGINE)
    openvino = [("openvino", name) for name in ("model.onnx", "float.onnx")]
    assert built[:4] == [openvino[0], openvino[1], openvino[1], built[3]]
    assert built[3][0] == "onnxruntime"
    assert built[4:6] == [openvino[1], built[3]]
    assert job.run.is_done("engine")
    assert not job.run.path("engines/built.json").exists()
    names = ("engines/model.xml", "engines/model.bin", "engines/float.xml", "engines/float.bin")
    assert all(job.run.path(name).stat().st_size > 100 for name in names)
    assert {"engines/model.bin", "engines/parity.json"} <= set(job.run.ledger.get("engine").outputs)


def test_ranges_come_from_training_images(tmp_path):
    scales = {}
    for number in (0, 4):
        job = make_job(tmp_path / str(number), "deploy=onnxruntime", f"deploy.range_images={number}")
        export_stage(job)
        model = onnx.load(job.run.path("model.onnx"))
        scales[number] = {
            tensor.name: float(onnx.numpy_helper.to_array(tensor))
            for tensor in model.graph.initializer
            if tensor.name.endswith("_step")
        }
    different = [name for name, scale in scales[0].items() if scale != scales[4][name]]
    assert len(different) == 1  # the convolution before the SiLU


@pytest.mark.parametrize("group", ["openvino", "onnxruntime", "trt10"])
def test_fixed_point_compares_the_graph_with_torch_by_name(tmp_path, capfd, group):
    job = make_job(tmp_path / "run", f"deploy={group}", "deploy.fixed_point_images=3")
    export_stage(job)
    compare_with_torch(job)
    content = job.run.read_json("fixed_point.json")
    placement = load_placement(job.run.path("placement.yaml"))
    names = [site.name for one in placement.groups for site in one.tensors]
    assert [tensor["name"] for tensor in content["tensors"]] == names
    assert content["tensors"][0]["values"] == 3 * 3 * SIZE * SIZE
    assert content["share"] < 0.01
    assert set(content["steps"]) <= {"1"}
    assert content["local"]["share"] <= content["share"]
    assert f"fixed point: {content['sentence']}" in capfd.readouterr().err
    # the graph keeps its scales, torch gets another one
    model = job.networks.load(PTQ)
    name = next(name for name in model.state_dict() if name.startswith("activation_quantizers.1"))
    model.state_dict()[name].add_(0.2)
    job.networks.save(model, placement, PTQ)
    if group != "onnxruntime":  # where the graph would be exported anew
        compare_with_torch(job)
        changed = job.run.read_json("fixed_point.json")["tensors"]
        assert changed[0]["differing"] == content["tensors"][0]["differing"]
        assert changed[1]["differing_locally"] > 0.3 * changed[1]["values"]
        assert changed[1]["differing"] == changed[1]["differing_locally"]


@pytest.mark.parametrize("settings", [("deploy=trt10",), ("quant=fp8", "deploy=trt11")])
def test_fixed_point_leaves_out_the_pair_behind_a_resize(tmp_path, settings):
    """Its codes are those of the tensor before, which is compared; FP8 codes are compared like integers."""
    job = make_job(
        tmp_path / "run",
        f"model.factory={__name__}:upsampling_factory",
        *settings,
        "deploy.fixed_point_images=3",
    )
    export_stage(job)
    model = onnx.load(job.run.path("model.onnx"))
    assert any("_repeated/" in node.name for node in model.graph.node)
    content = job.run.read_json("fixed_point.json")
    placement = load_placement(job.run.path("placement.yaml"))
    names = [site.name for one in placement.groups for site in one.tensors]
    assert [tensor["name"] for tensor in content["tensors"]] == names
    assert content["share"] < 0.01
    assert set(content["steps"]) <= {"1"}


# --------------------------------------------------------------------------------------------------------- TensorRT
class ComputingDouble(Double):
    """The double with arithmetic: a plan holds its graph, and a run reads and writes the addresses it is given."""

    def answer_parse(self, instance, values):
        self.graph = bytes(values["model"])
        return True

    def answer_build_serialized_network(self, instance, values):
        return BufferedMemory(PLAN + self.graph)

    def answer_deserialize_cuda_engine(self, instance, values):
        graph = bytes(values["serialized_engine"]).removeprefix(PLAN)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        return self.new("ICudaEngine", session=session)

    def answer_create_execution_context(self, instance, values):
        return self.new("IExecutionContext", addresses={}, shapes={}, session=instance._values["session"])

    def answer_get_tensor_shape(self, instance, values):
        zeros = np.zeros(instance._values["shapes"]["images"], np.float32)
        return instance._values["session"].run(None, {"images": zeros})[0].shape

    def answer_execute_async_v3(self, instance, values):
        known = instance._values
        shape = known["shapes"]["images"]
        source = (ctypes.c_float * int(np.prod(shape))).from_address(known["addresses"]["images"])
        images = np.frombuffer(source, np.float32).reshape(shape)
        (result,) = known["session"].run(None, {"images": images})
        ctypes.memmove(known["addresses"]["output0"], np.ascontiguousarray(result).ctypes.data, result.nbytes)
        return True


@pytest.fixture
def tensorrt(monkeypatch):
    """Install the double of a version in the place of TensorRT, and a CPU in the place of the GPU."""

    def install(version):
        double = ComputingDouble(version, input_shape=(-1, 3, SIZE, SIZE))
        monkeypatch.setitem(sys.modules, "tensorrt", double.module)
        monkeypatch.setattr("deploy.runtimes.tensorrt.CudaDevice", HostDevice)
        return double

    return install


@pytest.mark.parametrize(("version", "target"), [("10.3.0", "trt10"), ("11.4.0.106", "trt11")])
def test_tensorrt_goes_through_the_stage(tmp_path, tensorrt, version, target):
    double = tensorrt(version)
    job = make_job(tmp_path / "run", f"deploy={target}", "deploy.float_precisions=[f16,f32]")
    check_runtimes(job)
    rows = deploy(job)
    engines = ["engine:tensorrt:int8", "engine:tensorrt:fp16", "engine:tensorrt:fp32"]
    assert set(rows) == {"ptq", *engines}
    wanted = rows["ptq"].extras["metric"]
    assert rows["engine:tensorrt:int8"].extras["metric"] == pytest.approx(wanted, rel=0.02)
    for name in engines:
        row = rows[name]
        assert row.latency_ms_median > 0
        assert row.extras["parity"]["images"] > 0
    shapes = double.called("IOptimizationProfile.set_shape")
    assert {call["max"] for call in shapes} == {(3, 3, SIZE, SIZE)}
    assert (job.run.path("engines/timing.cache")).is_file()


def test_an_engine_that_disagrees_stops_the_run(tmp_path, tensorrt, monkeypatch):
    tensorrt("10.3.0")
    job = make_job(tmp_path / "run", "deploy=trt10")
    export_stage(job)
    computed = TensorRTRuntime.infer_outputs

    def shifted(runtime, images):
        return {name: value + np.float32(0.1) for name, value in computed(runtime, images).items()}

    monkeypatch.setattr(TensorRTRuntime, "infer_outputs", shifted)
    with pytest.raises(DeployError, match=r"disagrees with torch on 6 images.*mean"):
        engine_stage(job)
    assert not job.run.path("rows/engine-tensorrt-int8.json").exists()


def test_missing_tensorrt_is_told_before_any_work(tmp_path, monkeypatch, tensorrt):
    job = make_job(tmp_path / "run", "deploy=trt10")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(DeployError, match=r"not installed.*docker build"):
        check_input(job)
    tensorrt("11.4.0.106")
    with pytest.raises(DeployError, match="target=trt11"):
        check_input(job)
    job.config.deploy.opset = 13
    job.config.deploy.target = "trt11"
    with pytest.raises(DeployError, match=r"opset=13.*19 to 23"):
        check_input(job)
    job.config.deploy.opset = None
    check_input(job)
    with pytest.raises(ValueError, match=r"model\.onnx is missing.*export"):
        open_engines(job, "tensorrt")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["deploy.runtimes=[tensorrt]"], "deploy.target=openvino: expected trt10"),
        (["deploy.outputs=efficient_nms"], "deploy=trt10 or deploy=trt11"),
        (["deploy=trt10", "deploy.outputs=onnx_nms"], "deploy.outputs=efficient_nms"),
        (["deploy=trt10", "deploy.float_precisions=[bf16]"], "expected f16 or f32"),
        (["model=custom", "model.factory=a:b", "deploy.outputs=raw"], "level maps"),
    ],
)
def test_what_no_runtime_can_do_is_a_configuration_error(settings, words):
    with pytest.raises(ConfigError, match=words):
        compose(["+experiment=demo", *settings])
