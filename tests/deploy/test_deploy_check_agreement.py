"""Placement and check apply the same rules: what `place` makes of a small network, exported, has no findings."""

import onnx
import pytest
import torch
from placed import placed_file
from torch import nn
from torch.nn import functional as F

from core.choices import FP8, INTEGER
from core.operators import ACTIVATIONS, OPERATORS, Kind
from deploy import check_graph
from deploy.graph.view import View
from quant import PlacementOptions, Rule, place


class Chain(nn.Module):
    """conv on the image -> the part in question -> SiLU -> two convs."""

    def __init__(self, part, inputs, outputs):
        super().__init__()
        self.first, self.part = nn.Conv2d(3, inputs, 3, padding=1), part
        self.last, self.output = nn.Conv2d(outputs, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = F.silu(self.part(F.silu(self.first(x))))
        return self.output(F.silu(self.last(x)))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(16, 8, 1),
        nn.Conv2d(16, 8, (1, 3)),  # narrow, and its kernel is not square
        nn.Conv2d(20, 12, 1),
        nn.Conv2d(60, 60, 3),  # as in yolov9m: wide enough to be padded
        nn.Conv2d(180, 90, 1),
        nn.Conv2d(60, 60, (1, 3)),
        nn.Conv2d(16, 1, 1),  # as in a distribution focal loss
        nn.Conv2d(16, 16, 3, groups=16),
        nn.Conv2d(16, 16, 1, groups=16),
        nn.Conv2d(64, 64, 1, groups=2),
        nn.Conv2d(12, 12, 3, groups=12),
    ],
    ids=lambda c: f"{c.in_channels}-{c.out_channels}-g{c.groups}-k{c.kernel_size[0]}x{c.kernel_size[1]}",
)
def test_the_check_names_the_narrow_convs_that_placement_leaves_float(conv, tmp_path):
    """All convs quantized on request: findings, in the names that a policy takes, are what `place` leaves out."""
    network = Chain(conv, conv.in_channels, conv.out_channels).eval()
    left_float = [name for name, reason in place(network).kept_float.items() if reason.startswith("narrow")]
    path = placed_file(network, tmp_path / "all.onnx", options=PlacementOptions(quantize_narrow=True))
    findings = [f for f in check_graph(path) if f.rule == "narrow-conv"]
    assert [f.name for f in findings] == left_float
    rules = [Rule(f.name, keep_float=True) for f in findings]
    path = placed_file(
        network, tmp_path / "ruled.onnx", options=PlacementOptions(quantize_narrow=True), rules=rules
    )
    assert [f.rule for f in check_graph(path) if f.rule == "narrow-conv"] == []


@pytest.mark.parametrize(
    ("layer", "grid", "target", "is_unsupported"),
    [
        (nn.ConvTranspose2d(16, 16, 2, 2), INTEGER, "openvino", True),
        (nn.ConvTranspose2d(16, 16, 2, 2), FP8, "trt11", True),
        (nn.Conv2d(16, 16, 7, groups=16), FP8, "trt11", True),
        (nn.Conv2d(16, 16, 7, groups=16), INTEGER, "trt11", False),
        (nn.Conv2d(16, 16, 5, groups=16), FP8, "trt11", False),
    ],
)
def test_the_check_names_what_no_engine_runs_and_is_silent_where_it_is_float(
    layer, grid, target, is_unsupported, tmp_path
):
    network = Chain(layer, 16, 16).eval()
    rules = (Rule("input.*", grid=grid),)  # FP8 leaves the layer that reads the image in float by itself
    options = {
        "all": PlacementOptions(grid=grid, quantize_narrow=True),
        "placed": PlacementOptions(grid=grid),
    }
    found = {}
    for name, chosen in options.items():
        path = placed_file(network, tmp_path / f"{name}.onnx", target, chosen, rules)
        found[name] = [(f.rule, f.name) for f in check_graph(path) if f.name == "part"]
    assert found == {"all": [("unsupported", "part")] if is_unsupported else [], "placed": []}


class Sum(nn.Module):
    """A sum inside a network, made of the two summands that `summands` makes of a tensor."""

    def __init__(self, summands):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.b, self.c = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.thin, self.wide = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 32, 1)
        self.last, self.output = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)
        self.summands = summands

    def forward(self, x):
        left, right = self.summands(self, F.silu(self.first(x)))
        return self.output(F.silu(self.last(left + right)))


# how the summands are made, and how many summands of each sum are quantized
SUMS = {
    "skip and branch": (lambda m, x: (x, F.silu(m.b(F.silu(m.a(x))))), [1]),
    "two branches": (lambda m, x: (F.silu(m.a(x)), F.silu(m.c(F.silu(m.b(x))))), [1]),
    "branch through a concat": (lambda m, x: (torch.cat([m.thin(m.a(x)), m.thin(x)], 1), x), [2]),
    "half of a split": (lambda m, x: (m.a(x), m.wide(x).chunk(2, 1)[0]), [1]),
    "enlarged": (lambda m, x: (m.a(x), F.interpolate(F.max_pool2d(m.b(x), 2), scale_factor=2.0)), [1]),
    "a sum of a sum": (lambda m, x: (x + m.a(x), F.silu(m.b(x))), [1, 1]),
    "a branch that others read": (lambda m, x: (x + (y := F.silu(m.a(x))), F.silu(m.b(y))), [2, 1]),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_that_placement_makes_have_no_findings(name, tmp_path):
    make, num_quantized = SUMS[name]
    path = placed_file(Sum(make), tmp_path / "m.onnx")
    view = View(onnx.load(path))
    sums = [node for node in view.graph.nodes if node.op_type == "Add"]
    assert [
        sum(all(view.dequantizer(root) for root in view.roots(summand)) for summand in node.input)
        for node in sums
    ] == num_quantized
    assert check_graph(path) == []


class Moved(nn.Module):
    """conv -> an operator that only moves values -> conv."""

    def __init__(self, move, channels):
        super().__init__()
        self.first, self.move = nn.Conv2d(3, 64, 3, padding=1), move
        self.last, self.output = nn.Conv2d(channels, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.output(F.silu(self.last(self.move(F.silu(self.first(x))))))


MOVES = {
    "max-pool": (nn.MaxPool2d(2), 64),
    "pixel shuffle": (nn.PixelShuffle(2), 16),
    "flatten and unflatten": (nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (32, 32))), 64),
    "enlarge": (nn.Upsample(scale_factor=2), 64),
    "part": (lambda x: x[:, 16:], 48),
    "row": (lambda x: x[:, :, 3].unsqueeze(2), 64),
    "transpose": (lambda x: x.transpose(2, 3), 64),
    "view": (lambda x: x.view(-1, 64, 16, 64), 64),
    "expand": (lambda x: x[:, :, :, :1].expand(-1, -1, -1, 8), 64),
    "stack": (lambda x: torch.stack([x, x], 1).flatten(1, 2), 128),
    "split": (lambda x: torch.cat(x.split(16, 1)[::-1], 1), 64),
}


@pytest.mark.parametrize("target", ["trt10", "onnxruntime"])
@pytest.mark.parametrize("name", MOVES)
def test_the_check_looks_through_what_placement_looks_through(name, target, tmp_path):
    path = placed_file(Moved(*MOVES[name]), tmp_path / "m.onnx", target)
    assert check_graph(path) == []


def test_each_operator_has_one_kind():
    """No ONNX type, function, method or module is listed twice; a MatMul is a layer where an operand is constant."""
    for form in ("modules", "functions", "methods", "onnx"):
        names = [name for operators in OPERATORS.values() for name in getattr(operators, form)]
        twice = {name for name in names if names.count(name) > 1}
        assert twice == ({"MatMul"} if form == "onnx" else set())
    assert not ACTIVATIONS & {name for operators in OPERATORS.values() for name in operators.onnx}
    assert set(OPERATORS) == set(Kind) - {Kind.FLOAT}
