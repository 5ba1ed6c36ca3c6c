"""The integer graph for ONNX Runtime: which kernels really run, and what the extra rounding costs."""

import collections

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from deploy_networks import QuantizedConv, ReluResidual, SmallDetector, SplitConcat
from torch import nn
from torch.nn import functional as F

from deploy import ONNXRuntime, export_onnx
from deploy.targets.integer import Grid, Histogram, assumed_histogram, choose_grid, silu

SIZE = (64, 96)


def export(module, path, images=(), target="onnxruntime", names=("x",)):
    return export_onnx(module, path, SIZE, target, output_names=names, images=images)


def kernels(path, folder):
    """Operators of the graph that ONNX Runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    model = onnx.load(folder / "optimized.onnx")
    return collections.Counter(node.op_type for node in model.graph.node)


def test_every_quantized_conv_is_an_integer_kernel(tmp_path):
    path = export(SplitConcat(), tmp_path / "m.onnx").path
    counts = kernels(path, tmp_path)
    # the last conv's SiLU is a graph output: it has no grid, and stays in float
    assert (counts["QLinearConv"], counts["QLinearSigmoid"], counts["QLinearMul"]) == (3, 3, 3)
    assert counts["Conv"] + counts["FusedConv"] == 1
    signed = kernels(export(SplitConcat(), tmp_path / "s.onnx", target="trt10").path, tmp_path)
    assert signed["QLinearConv"] == 0  # why the pass exists


def test_the_detector_runs_in_integers_and_agrees(tmp_path):
    module = SmallDetector().eval()
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(2))
    report = export(module, tmp_path / "m.onnx", [images.numpy()], names=("output0",))
    counts = kernels(report.path, tmp_path)
    assert counts["QLinearConv"] == 5  # all but the last, which the plan leaves in float
    assert report.parity is not None
    assert report.parity.images == 2
    with torch.no_grad():
        expected = module(images).numpy()
    with ONNXRuntime(report.path, threads=1) as runtime:
        difference = np.abs(runtime.infer(images.numpy()) - expected)
    assert difference[:, :4].mean() < 0.2
    assert difference[:, 4:].max() < 0.02
    # the parity in the report is that of the unoptimized graph against the graph before the pass: the same figures
    assert report.parity.box_mean_px == pytest.approx(difference[:, :4].mean(), rel=0.2)


class ReluHead(nn.Module):
    """A quantized conv, ReLU, and a float conv that is the answer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.answer = QuantizedConv(3, 16, 1 / 127), nn.Conv2d(16, 4, 1)

    def forward(self, images):
        hidden = self.hidden
        x = hidden.quantized_input(images)
        x = F.conv2d(x, hidden.quantized_weight(), hidden.conv.bias, 1, hidden.conv.padding)
        return self.answer(F.relu(x))


@pytest.mark.parametrize(("given", "integer"), [(True, 1), (False, 0)])
def test_a_conv_in_front_of_a_float_layer_needs_images(tmp_path, given, integer):
    """Behind ReLU its grid starts at 0, so that no code is lost to negative values, and the ReLU is gone."""
    module = ReluHead().eval()
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(4))
    path = export(module, tmp_path / "m.onnx", [images.numpy()] if given else []).path
    counts = kernels(path, tmp_path)
    assert counts["QLinearConv"] == integer
    with torch.no_grad():
        expected = module(images).numpy()
    with ONNXRuntime(path, threads=1) as runtime:
        difference = np.abs(runtime.infer(images.numpy()) - expected)
    assert difference.mean() < (3e-3 if given else 1e-5) * np.abs(expected).mean()
    if given:
        model = onnx.load(path)
        constants = {entry.name: onnx.numpy_helper.to_array(entry) for entry in model.graph.initializer}
        zeros = [constants[n.input[2]] for n in model.graph.node if n.op_type == "QuantizeLinear"]
        assert [int(zero) for zero in zeros] == [128, 0]  # the image's, and the result's
        assert "Relu" not in {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("branch", [False, True])
def test_relu_networks_lose_one_rounding_at_a_sum_at_most(tmp_path, branch):
    module = ReluResidual(branch=branch).eval()
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(3))
    path = export(module, tmp_path / "m.onnx").path
    counts = kernels(path, tmp_path)
    assert counts["QLinearConv"] == 3  # the last conv is a graph output
    assert counts["QLinearAdd"] == 1
    assert "Relu" not in counts
    with torch.no_grad():
        expected = module(images).numpy()
    with ONNXRuntime(path, threads=1) as runtime:
        difference = np.abs(runtime.infer(images.numpy()) - expected)
    # a value near the middle of two steps may fall to the other side, no more
    assert difference.mean() < (1e-3 if branch else 0.02) * np.abs(expected).mean()


def test_calibrated_ranges_are_nearer_than_assumed_ones(tmp_path):
    module = SplitConcat().eval()
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = module(images).numpy()
    errors = []
    for given in ([images.numpy()], []):
        path = export(module, tmp_path / "m.onnx", given).path
        with ONNXRuntime(path, threads=1) as runtime:
            errors.append(np.abs(runtime.infer(images.numpy()) - expected).mean())
    assert errors[0] < errors[1]


def test_chosen_grid_beats_every_grid_of_an_exhaustive_search_nearby():
    rng = np.random.default_rng(0)
    values = rng.normal(-0.5, 1.5, 20000)
    counts, edges = np.histogram(values, 1024)
    histogram = Histogram(float(edges[0]), float(edges[-1]), counts.astype(np.float64))
    scale = 0.03

    def error(grid):
        return np.mean(
            (np.minimum(silu(grid.round(values)), 127 * scale) - np.minimum(silu(values), 127 * scale)) ** 2
        )

    chosen = choose_grid(histogram, scale)
    others = [
        error(Grid((high - low) / 255, round(-low / (high - low) * 255)))
        for low in np.linspace(values.min(), -0.3, 12)
        for high in np.linspace(1.0, values.max(), 12)
    ]
    assert error(chosen) < 1.1 * min(others)


def test_assumed_histogram_covers_the_results_grid():
    grid = choose_grid(assumed_histogram(0.05), 0.05)
    assert grid.scale * (255 - grid.zero_point) > 0.6 * 127 * 0.05
    assert grid.round(np.array([-0.278]))[0] == pytest.approx(-0.278, abs=grid.scale)
