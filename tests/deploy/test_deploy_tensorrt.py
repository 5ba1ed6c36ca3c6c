"""The TensorRT code against the real API of five versions: without a GPU, nothing here is built or run."""

import json
import platform
import shutil
import sys

import numpy as np
import pytest
import tensorrt_surface
from deploy_networks import FloatDetector, SmallDetector
from tensorrt_double import PLAN, SURFACE, TIMINGS, Double, HostDevice

from core.errors import DeployError
from deploy import export_onnx
from deploy.runtimes.tensorrt import TensorRTRuntime
from deploy.runtimes.tensorrt_api import RULES, VersionRules, import_tensorrt, parse_version, rules_of
from deploy.runtimes.tensorrt_builder import BuildOptions, build_tensorrt, fill_shape

SIZE = (64, 96)
VERSIONS = list(SURFACE)
OLD = [version for version in VERSIONS if not version.startswith("11")]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    made = {
        target: export_onnx(SmallDetector(), folder / f"{target}.onnx", SIZE, target).path
        for target in ("trt10", "trt11", "openvino")
    }
    made["float"] = export_onnx(FloatDetector(), folder / "float.onnx", SIZE, "trt10", quantized=False).path
    return made


def graph_for(graphs, version):
    return graphs["trt11" if version.startswith("11") else "trt10"]


@pytest.mark.parametrize("version", VERSIONS)
def test_build_and_run_on_every_version(graphs, tmp_path, version):
    double = Double(version)
    cache = tmp_path / "timing.cache"
    options = BuildOptions(max_batch=8, timing_cache=cache, optimization_level=3)
    path = build_tensorrt(graph_for(graphs, version), tmp_path, options, double.module)
    assert path.read_bytes() == PLAN
    assert cache.read_bytes() == TIMINGS
    (shapes,) = double.called("IOptimizationProfile.set_shape")
    assert (shapes["min"], shapes["opt"], shapes["max"]) == ((1, 3, 64, 96), (1, 3, 64, 96), (8, 3, 64, 96))
    flags = [call["flag"].name for call in double.called("IBuilderConfig.set_flag")]
    assert flags == ([] if version.startswith("11") else ["INT8", "FP16"])
    sidecar = json.loads((tmp_path / f"{path.name}.json").read_text())
    assert (sidecar["tensorrt"], sidecar["precision"]) == (version, "int8")
    assert sidecar["metadata"]["octet.image_size"] == "64x96"

    with TensorRTRuntime(path, device=HostDevice(), profile=True, trt=double.module) as runtime:
        images = np.zeros((2, 3, *SIZE), np.float32)
        assert runtime.infer(images).shape == (2, 7, 126)
        assert runtime.infer(images[:1]).shape == (1, 7, 126)
        assert len(double.called("ICudaEngine.create_execution_context")) == 1
        assert runtime.layer_times()[0].milliseconds == 0.5
        assert runtime.layer_information()["Bindings"] == ["images", "output0"]
        runtime.write_layers(tmp_path / "layers.json")
        with pytest.raises(DeployError, match=r"does not take images \[17, .*profile is \[\[1, 3"):
            runtime.infer(np.zeros((17, 3, *SIZE), np.float32))
    with pytest.raises(DeployError, match="closed"):
        runtime.infer(images)
    # the second build reads the timings of the first
    build_tensorrt(graph_for(graphs, version), tmp_path, options, double.module)
    caches = [
        bytes(call["serialized_timing_cache"]) for call in double.called("IBuilderConfig.create_timing_cache")
    ]
    assert caches == [b"", TIMINGS]


@pytest.mark.parametrize("version", ["8.6.1", "11.4.0.106"])
def test_cuda_graphs_have_a_context_for_each_shape(graphs, tmp_path, version):
    double, device = Double(version), HostDevice()
    path = build_tensorrt(graph_for(graphs, version), tmp_path, BuildOptions(), double.module)
    runtime = TensorRTRuntime(path, use_cuda_graph=True, device=device, trt=double.module)
    for batch in (1, 2, 1, 2):
        runtime.infer(np.zeros((batch, 3, *SIZE), np.float32))
    assert device.captured == 2
    assert len(double.called("ICudaEngine.create_execution_context")) == 2
    # for each shape one run to warm up and one under capture; all four results come from replays
    assert len(double.called("IExecutionContext.execute_async_v3")) == 4


def test_network_flags_by_version(graphs, tmp_path):
    def flags(version, target):
        double = Double(version)
        build_tensorrt(graphs[target], tmp_path, BuildOptions(), double.module)
        return double.called("Builder.create_network")[0]["flags"], len(
            double.called("IBuilderConfig.set_flag")
        )

    explicit = 1 << SURFACE["8.6.1"]["enums"]["NetworkDefinitionCreationFlag"]["EXPLICIT_BATCH"]
    typed = 1 << SURFACE["10.3.0"]["enums"]["NetworkDefinitionCreationFlag"]["STRONGLY_TYPED"]
    assert flags("8.6.1", "trt10") == (explicit, 2)
    assert flags("10.3.0", "trt10") == (0, 2)
    assert flags("10.3.0", "trt11") == (typed, 0)
    assert flags("11.4.0.106", "trt11") == (0, 0)


def test_a_removed_flag_turns_the_double_red(graphs, tmp_path, monkeypatch):
    # what a build written for TensorRT 10 would do on 11
    monkeypatch.setitem(RULES, 11, VersionRules(False, True, False, True, 25))
    with pytest.raises(AttributeError, match="INT8"):
        build_tensorrt(graphs["trt10"], tmp_path, BuildOptions(), Double("11.4.0.106").module)
    monkeypatch.setitem(RULES, 11, VersionRules(True, True, True, False, 25))
    with pytest.raises(AttributeError, match="EXPLICIT_BATCH"):
        build_tensorrt(graphs["trt11"], tmp_path, BuildOptions(), Double("11.4.0.106").module)
    monkeypatch.setitem(RULES, 8, VersionRules(True, True, False, True, 19))
    with pytest.raises(AttributeError, match="STRONGLY_TYPED"):
        build_tensorrt(graphs["trt11"], tmp_path, BuildOptions(), Double("8.6.1").module)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_double_refuses_what_the_real_one_refuses(version):
    trt = Double(version).module

    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)

    builder = trt.Builder(Logger())
    config = builder.create_builder_config()
    with pytest.raises(TypeError, match="incompatible"):
        trt.Builder("logger")
    with pytest.raises(TypeError, match="incompatible"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, "4 GiB")
    with pytest.raises(TypeError, match="incompatible"):
        config.set_memory_pool_limit(pool=trt.MemoryPoolType.WORKSPACE, size=1)
    with pytest.raises(TypeError, match="incompatible"):
        config.set_flag(trt.MemoryPoolType.WORKSPACE)
    with pytest.raises(AttributeError):
        config.max_workspace_sizes = 1
    with pytest.raises(AttributeError):
        builder.build_cuda_engines()
    with pytest.raises(TypeError, match="No constructor"):
        trt.ICudaEngine()


def test_removed_calls_are_gone_from_the_surface():
    # facts of the release notes, against the table this project is written by
    methods = {version: SURFACE[version]["classes"]["IExecutionContext"]["methods"] for version in VERSIONS}
    assert "execute_async_v2" in methods["8.6.1"]
    assert not any("execute_async_v2" in methods[version] for version in VERSIONS if version != "8.6.1")
    assert all("execute_async_v3" in methods[version] for version in VERSIONS)
    for version in VERSIONS:
        enums, rules = SURFACE[version]["enums"], rules_of(version)
        assert ("INT8" in enums["BuilderFlag"]) == ("FP16" in enums["BuilderFlag"]) == rules.precision_flags
        network = enums["NetworkDefinitionCreationFlag"]
        assert "EXPLICIT_BATCH" in network or not rules.explicit_batch_flag
        assert ("STRONGLY_TYPED" in network) == rules.can_be_strongly_typed


@pytest.mark.parametrize(
    ("version", "graph", "options", "message"),
    [
        ("8.6.1", "trt11", BuildOptions(), "opset 17 at most"),
        ("8.6.1", "trt10", BuildOptions(strongly_typed=True), "no strongly typed networks"),
        ("11.4.0.106", "trt10", BuildOptions(strongly_typed=False), "strongly typed networks only"),
        ("10.3.0", "openvino", BuildOptions(), "exported for openvino.*target=trt10"),
        ("10.3.0", "float", BuildOptions(), "needs a graph with Q/DQ"),
        ("10.3.0", "trt10", BuildOptions(precision="int4"), "int4.*int8, fp16, fp32"),
        ("10.3.0", "trt10", BuildOptions(best_batch=32), "does not hold"),
    ],
)
def test_what_does_not_fit_is_said(graphs, tmp_path, version, graph, options, message):
    with pytest.raises(DeployError, match=message):
        build_tensorrt(graphs[graph], tmp_path, options, Double(version).module)
    assert not list(tmp_path.iterdir())


def test_float_builds_set_their_own_flags(graphs, tmp_path):
    for precision, expected in (("fp16", ["FP16"]), ("fp32", [])):
        double = Double("10.3.0")
        build_tensorrt(graphs["float"], tmp_path, BuildOptions(precision=precision), double.module)
        assert [call["flag"].name for call in double.called("IBuilderConfig.set_flag")] == expected


def test_refusals_of_tensorrt_are_passed_on(graphs, tmp_path):
    with pytest.raises(DeployError, match="parser error 0; parser error 1"):
        build_tensorrt(graphs["trt10"], tmp_path, BuildOptions(), Double("10.3.0", refuse_parse=True).module)
    with pytest.raises(DeployError, match=r"cannot build .*trt10\.onnx"):
        build_tensorrt(graphs["trt10"], tmp_path, BuildOptions(), Double("10.3.0", refuse_plan=True).module)


def test_an_engine_of_another_version_or_content_is_refused(graphs, tmp_path):
    path = build_tensorrt(graphs["trt10"], tmp_path, BuildOptions(), Double("10.3.0").module)
    with pytest.raises(DeployError, match=r"TensorRT 10\.3\.0, here is 10\.16\.1\.11"):
        TensorRTRuntime(path, device=HostDevice(), trt=Double("10.16.1.11").module)
    path.write_bytes(PLAN + b"!")
    with pytest.raises(DeployError, match="built with content"):
        TensorRTRuntime(path, device=HostDevice(), trt=Double("10.3.0").module)
    (tmp_path / f"{path.name}.json").write_text("{}")
    with pytest.raises(DeployError, match="not an engine's description"):
        TensorRTRuntime(path, device=HostDevice(), trt=Double("10.3.0").module)


def test_outputs_of_unknown_size_are_named(graphs, tmp_path):
    double = Double("10.3.0", output_shape=(-1, 3))
    path = build_tensorrt(graphs["trt10"], tmp_path, BuildOptions(), double.module)
    runtime = TensorRTRuntime(path, device=HostDevice(), trt=double.module)
    with pytest.raises(DeployError, match=r"'output0' has the shape .*efficient_nms"):
        runtime.infer(np.zeros((1, 3, *SIZE), np.float32))


def test_versions_and_shapes():
    assert parse_version("10.16.1.11") == (10, 16)
    with pytest.raises(DeployError, match=r"8\.5\.3 is too old"):
        rules_of("8.5.3")
    assert rules_of("12.0.0") == RULES[11]
    with pytest.raises(DeployError, match="not a TensorRT version"):
        parse_version("ten")
    assert fill_shape((-1, 3, -1, -1), 2, (64, 96)) == (2, 3, 64, 96)
    with pytest.raises(DeployError, match="not a batch of images"):
        fill_shape((-1, 10), 1, SIZE)


def test_without_tensorrt_the_way_to_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(DeployError, match="NVIDIA's container"):
        import_tensorrt()


@pytest.mark.install
@pytest.mark.parametrize("version", VERSIONS)
def test_stored_surface_is_that_of_the_real_bindings(tmp_path, version):
    tools = [tool for tool in ("gcc", "nm", "readelf") if shutil.which(tool) is None]
    if tools or sys.version_info[:2] != (3, 11) or platform.machine() != "x86_64":
        pytest.skip(f"the bindings of {version} need Python 3.11 on x86_64 and {tools or 'no further tool'}")
    target = tensorrt_surface.install(version, tmp_path)
    assert tensorrt_surface.read(target) == SURFACE[version]
