"""OpenVINO and ONNX Runtime engines against torch, and the clock."""

import time

import numpy as np
import pytest
import torch
from deploy_networks import FloatDetector, SmallDetector, SplitConcat

from core.errors import DeployError
from deploy import (
    ONNXRuntime,
    OpenVINORuntime,
    Runtime,
    benchmark_alternately,
    build_engine,
    compare_arrays,
    engine_size,
    export_onnx,
)
from deploy.benchmark.timing import benchmark, summarize

SIZE = (64, 96)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    images = torch.rand(3, 3, *SIZE, generator=torch.Generator().manual_seed(2))
    results = {}
    for name, module in (("int8", SmallDetector().eval()), ("fp32", FloatDetector().eval())):
        path = export_onnx(module, folder / f"{name}.onnx", SIZE, "openvino", quantized=name == "int8").path
        with torch.no_grad():
            results[name] = (path, module(images).numpy())
    return images.numpy(), results


@pytest.mark.parametrize("precision", ["int8", "fp32"])
@pytest.mark.parametrize("built", [False, True])
def test_openvino_agrees_with_torch(exported, tmp_path, precision, built):
    images, results = exported
    path, expected = results[precision]
    if built:
        path = build_engine("openvino", path, tmp_path / "engine")
        assert path.suffix == ".xml"
        assert engine_size(path) == path.stat().st_size + path.with_suffix(".bin").stat().st_size
        assert {p.name for p in path.parent.iterdir()} == {path.name, path.with_suffix(".bin").name}
    with OpenVINORuntime(path, threads=1) as runtime:
        assert runtime.precision == precision
        assert runtime.output_names == ("output0",)
        output = np.concatenate([runtime.infer(images[:2]), runtime.infer(images[2:])])
        report = compare_arrays(output, expected, confident_score=0.0)
    assert report.images == 3
    # one step of an int8 activation may fall to the other side; float graphs agree closely
    report.require(box_px=0.5 if precision == "int8" else 1e-3, score=0.01 if precision == "int8" else 1e-5)
    assert report.box_mean_px < (0.02 if precision == "int8" else 1e-4)


def test_openvino_runs_the_quantized_convs_in_int8(exported):
    _, results = exported
    with OpenVINORuntime(results["int8"][0], threads=1, batch=1) as runtime:
        nodes = [node.get_rt_info() for node in runtime._compiled.get_runtime_model().get_ordered_ops()]
    kinds = [(info["layerType"].astype(str), info["runtimePrecision"].astype(str)) for info in nodes]
    convs = [precision for kind, precision in kinds if kind == "Convolution"]
    assert sorted(convs)[0] == "f32"  # the head
    assert len(convs) == 6
    assert set(sorted(convs)[1:]) <= {"i8", "u8"}


def test_openvino_keeps_zero_points_behind_a_concat_of_a_split(tmp_path):
    # OpenVINO 2026.4 gets this block wrong from signed activations on CPUs without AMX
    module = SplitConcat().eval()
    path = export_onnx(module, tmp_path / "m.onnx", SIZE, "openvino", output_names=("x",)).path
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = module(images).numpy()
    with OpenVINORuntime(path, threads=1) as runtime:
        difference = np.abs(runtime.infer(images.numpy()) - expected)
    assert difference.mean() < 0.01 * np.abs(expected).mean()


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_onnxruntime_agrees_with_torch(exported, precision):
    images, results = exported
    path, expected = results[precision]
    with ONNXRuntime(path, threads=1) as runtime:
        assert runtime.precision == precision
        compare_arrays(runtime.infer(images), expected, confident_score=0.0).require(box_px=0.5, score=0.01)
        assert set(runtime.infer_outputs(images)) == {"output0"}


def test_int8_engine_is_smaller(exported, tmp_path):
    _, results = exported
    sizes = {
        name: engine_size(build_engine("openvino", path, tmp_path / name))
        for name, (path, _) in results.items()
    }
    assert sizes["int8"] < sizes["fp32"]


def test_fixed_batch_refuses_another(exported):
    images, results = exported
    with OpenVINORuntime(results["int8"][0], threads=1, batch=2) as runtime:
        assert runtime.infer(images[:2]).shape == (2, 7, 384)
        with pytest.raises(DeployError, match=r"takes images \[2,3,64,96\], got \[3, 3.*dynamic_batch"):
            runtime.infer(images)


@pytest.mark.parametrize("kind", [OpenVINORuntime, ONNXRuntime])
def test_bad_input_is_named(exported, kind):
    images, results = exported
    runtime = kind(results["int8"][0], threads=1)
    with pytest.raises(DeployError, match="float64"):
        runtime.infer(images.astype(np.float64))
    with pytest.raises(DeployError, match=r"\(3, 64, 96\)"):
        runtime.infer(images[0])
    with pytest.raises(DeployError, match=r"3, 3, 32, 32"):
        runtime.infer(np.ascontiguousarray(images[:, :, :32, :32]))
    runtime.close()
    with pytest.raises(DeployError, match="closed"):
        runtime.infer(images)


def test_unknown_names(exported, tmp_path):
    path = exported[1]["int8"][0]
    with pytest.raises(DeployError, match=r"int4.*f32, f16, bf16"):
        OpenVINORuntime(path, precision_hint="int4")
    with pytest.raises(DeployError, match="Unknown runtime 'tflite'"):
        build_engine("tflite", path, tmp_path)
    with pytest.raises(DeployError, match=r"\.bin"):
        OpenVINORuntime(build_engine("openvino", path, tmp_path).rename(tmp_path / "alone.xml"))
    with pytest.raises(DeployError, match="CUDAExecutionProvider"):
        ONNXRuntime(path, provider="cuda")


class Sleeper(Runtime):
    name, precision, output_names, load_seconds = "sleeper", "none", ("output0",), 0.0

    def __init__(self, seconds, log):
        self.seconds, self.log = seconds, log

    @classmethod
    def require(cls):
        pass

    build = open = require

    def infer_outputs(self, images):
        self.log.append(self.seconds)
        time.sleep(self.seconds)
        return {"output0": images}

    def close(self):
        pass


def test_benchmark_counts_calls_and_tells_the_time():
    log = []
    report = benchmark(Sleeper(0.004, log), (2, 3, 8, 8), iterations=6, warmup=2)
    assert len(log) == 8
    assert report.iterations == 6
    assert 4 <= report.median_ms < 8
    assert report.images_per_second == pytest.approx(2 / report.mean_ms * 1000)
    assert benchmark(Sleeper(0.002, []), (1, 3, 8, 8), seconds=0.05).iterations >= 10


def test_alternation_and_ratio():
    log = []
    slow, fast = benchmark_alternately(
        [Sleeper(0.006, log), Sleeper(0.003, log)], (1, 3, 8, 8), iterations=8, warmup=0, calls_per_turn=4
    )
    assert log == [0.006] * 5 + [0.003] * 5 + [0.006] * 5 + [0.003] * 5
    assert slow.median_ms / fast.median_ms == pytest.approx(2, rel=0.3)


def test_statistics_against_hand_computed_values():
    report = summarize("r", "p", 4, [i / 1000 for i in range(1, 101)])
    assert report.median_ms == pytest.approx(50.5)
    assert report.p99_ms == pytest.approx(99.01)
    assert report.p90_ms == pytest.approx(90.1)
    assert report.images_per_second == pytest.approx(4 / 50.5 * 1000)


def test_compare_tells_a_broken_graph_from_one_rounding_by_the_mean():
    reference = np.zeros((1, 6, 100), np.float32)
    one_anchor, everywhere = reference.copy(), reference.copy()
    one_anchor[0, 4, 3] = 0.4
    everywhere[0, 4:] = 0.02
    compare_arrays(one_anchor, reference).require(box_px=1, score=1, mean_score=0.005)
    with pytest.raises(DeployError, match=r"mean score difference 0\.02 \(limit 0\.005\)"):
        compare_arrays(everywhere, reference).require(box_px=1, score=1, mean_score=0.005)


def test_compare_finds_wrong_boxes_behind_right_scores():
    reference = np.zeros((1, 6, 5), np.float32)
    reference[0, :4] = 50
    reference[0, 4, 2] = 0.9
    output = reference.copy()
    output[0, 1, 2] += 7
    output[0, 0, 4] += 9  # an anchor without any score
    report = compare_arrays(output, reference)
    assert (report.box_max_px, report.box_max_px_confident, report.confident_anchors, report.score_max) == (
        9,
        7,
        1,
        0,
    )
    with pytest.raises(DeployError, match=r"largest box difference \[px\] 7 \(limit 1\)"):
        report.require(box_px=1, score=0.01)
    output[0, 0, 0] = np.nan
    with pytest.raises(DeployError, match="not finite"):
        compare_arrays(output, reference)
    with pytest.raises(DeployError, match="shape"):
        compare_arrays(output[:, :, :3], reference)
