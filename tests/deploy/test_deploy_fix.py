"""`deploy.check --fix`: every fix on a hand-made graph, held to the same graph made by hand without the fault.

Each case builds both; the mended graph has to give the outputs of the second to the bit (ONNX Runtime, node by node),
with as many Q and DQ nodes. Fixes that must not change values give those of the first as well.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import onnx
import onnxruntime
import pytest
from fix_graphs import SIZE, Builder
from onnx import TensorProto, numpy_helper

import deploy.check.fix
from core.targets import TARGETS
from deploy.check.command import main
from deploy.check.fix import Fix, fix_file, fix_model
from deploy.check.report import inspect_model
from deploy.graph.model import load_onnx
from deploy.graph.passes import E4M3, PassResult, count_qdq

IMAGES = np.random.default_rng(1).random((2, 3, SIZE, SIZE), np.float32)
SINGLE = float(np.float32(0.02))


def scale_shape(b, good):
    return b.model(b.conv(b.pair(b.stem(), shape=() if good else (1,))))


def resize(b, good):
    x = b.up(b.pair(b.stem()))
    return b.model(b.conv(b.pair(x) if good else x))


def resize_before_concat(b, good):
    x = b.pair(b.stem())
    small = b.pair(b.op("Relu", [b.conv(x, stride=2)]))
    small = b.up(b.op("MaxPool", [small], kernel_shape=[3, 3], pads=[1] * 4))
    joined = b.op("Concat", [b.pair(small) if good else small, x], axis=1)
    return b.model(b.conv(joined, 32))


def duplicate(b, good):
    x = b.stem()
    first = b.pair(x)
    return b.model(b.conv(first), b.conv(first if good else b.pair(x)))


def quantized_bias(b, good):
    codes, scale = b.rng.integers(-2000, 2000, 16).astype(np.int32), np.float32(0.001)
    if good:
        bias = b.constant(codes.astype(np.float32) * scale)
    else:
        bias = b.op("DequantizeLinear", [b.constant(codes), b.constant(scale), b.constant(np.int32(0))])
    return b.model(b.conv(b.pair(b.stem()), bias=bias))


def unread(b, good):
    x = b.stem()
    if not good:
        b.pair(x)
    return b.model(b.conv(x))


def relu_behind(b, good):
    x = b.conv(b.pair(b.stem()))
    x = b.pair(b.op("Relu", [x])) if good else b.op("Relu", [b.pair(x)])
    return b.model(b.conv(x))


SAME_VALUES = (scale_shape, resize, resize_before_concat, duplicate, quantized_bias, unread, relu_behind)


def two_scales_of_a_tensor(b, good):
    x = b.stem()
    first = b.pair(x, 0.03 if good else 0.02)
    return b.model(b.conv(first), b.conv(first if good else b.pair(x, 0.03)))


def scales_of_a_concat(b, good):
    x = b.pair(b.stem())
    parts = [b.op("Relu", [b.conv(x)]) for _ in range(3)]
    scales = (0.03,) * 3 if good else (0.01, 0.03, 0.02)
    joined = b.op("Concat", [b.pair(p, s) for p, s in zip(parts, scales, strict=True)], axis=1)
    return b.model(b.conv(joined, 48))


def scales_over_two_concats(b, good):
    """The middle tensor is in both concats, so that all three have one scale."""
    x = b.pair(b.stem())
    parts = [b.op("Relu", [b.conv(x)]) for _ in range(3)]
    scales = (0.03,) * 3 if good else (0.03, 0.02, 0.01)
    left, middle, right = (b.pair(p, s) for p, s in zip(parts, scales, strict=True))
    pairs = [b.op("Concat", [left, middle], axis=1), b.op("Concat", [middle, right], axis=1)]
    return b.model(*(b.conv(pair, 32) for pair in pairs))


def fp8_scales_of_a_concat(b, good):
    b.opset, zero = 19, np.zeros((), E4M3)
    x = b.pair(b.stem())
    parts = [b.op("Relu", [b.conv(x)]) for _ in range(2)]
    scales = (0.03, 0.03) if good else (0.01, 0.03)
    joined = b.op("Concat", [b.pair(p, s, zero) for p, s in zip(parts, scales, strict=True)], axis=1)
    value = b.weight(32, 16)
    scale = b.constant(np.float32(np.abs(value).max() / 448))
    codes = b.constant((value / np.float32(np.abs(value).max() / 448)).astype(E4M3))
    return b.model(b.conv(joined, weight=b.op("DequantizeLinear", [codes, scale, b.constant(zero)])))


def codes_named_by_an_attribute(b, good):
    """Q without a zero point, as in files of opset 21 and up."""
    b.opset, x = 21, b.stem()

    def pair(scale):
        scale = b.constant(np.float32(scale))
        codes = b.op("QuantizeLinear", [x, scale], output_dtype=TensorProto.INT8)
        return b.op("DequantizeLinear", [codes, scale])

    first = pair(0.03 if good else 0.02)
    return b.model(b.conv(first), b.conv(first if good else pair(0.03)))


def inside_silu(b, good):
    x = b.conv(b.pair(b.stem()))
    return b.model(b.conv(b.pair(b.silu(x if good else b.pair(x, 0.05)))))


def behind_sigmoid(b, good):
    x = b.conv(b.pair(b.stem()))
    gate = b.op("Sigmoid", [x])
    return b.model(b.conv(b.pair(b.op("Mul", [x, gate if good else b.pair(gate, 1 / 127)]))))


def inside_last_sigmoid(b, good):
    x = b.conv(b.pair(b.stem()))
    return b.finish([b.op("Sigmoid", [x if good else b.pair(x, 0.05)])])


def float_weights(b, good):
    value = b.weight(16, 16)
    value[3] = 0  # keeps the old scale
    scale = np.float32(np.abs(value).max() / 127)
    scales = (
        np.array([max(float(abs(c).max()) / 127, 0) or scale for c in value], np.float32) if good else scale
    )
    parameters = [b.constant(scales), b.constant(np.zeros(scales.shape, np.int8))]
    axis = {"axis": 0} if good else {}
    codes = b.op("QuantizeLinear", [b.constant(value), *parameters], **axis)
    return b.model(b.conv(b.pair(b.stem()), weight=b.op("DequantizeLinear", [codes, *parameters], **axis)))


def unsigned(b, good):
    """Codes 0 to 255 with zero point 100 hold -100 to 155 steps; 155 steps are the 127 of the symmetric grid."""
    x = b.stem()
    return b.model(b.conv(b.pair(x, SINGLE * 155 / 127) if good else b.pair(x, 0.02, np.uint8(100))))


def shifted(b, good):
    """Codes -128 to 127 with zero point 50 hold -178 to 77 steps."""
    x = b.stem()
    return b.model(b.conv(b.pair(x, SINGLE * 178 / 127) if good else b.pair(x, 0.02, np.int8(50))))


def at_output(b, good):
    x = b.conv(b.pair(b.stem()))
    return b.finish([x if good else b.pair(x, 0.1)])


def in_decode(b, good):
    x = b.conv(b.pair(b.stem()))
    return b.finish([b.op("Softmax", [x if good else b.pair(x, 0.1)], axis=1)])


def both_summands(b, good):
    x = b.pair(b.stem())
    branch = b.silu(b.conv(b.pair(b.silu(b.conv(x)))))
    return b.model(b.conv(b.pair(b.op("Add", [x, branch if good else b.pair(branch, 0.01)]))))


def neither_summand(b, good):
    x = b.stem()
    skip = b.pair(x)
    branch = b.silu(b.conv(b.pair(b.silu(b.conv(skip)))))
    return b.model(b.conv(b.pair(b.op("Add", [skip if good else x, branch]))))


CASES = (
    *SAME_VALUES, two_scales_of_a_tensor, scales_of_a_concat, scales_over_two_concats, fp8_scales_of_a_concat,
    codes_named_by_an_attribute, inside_silu, behind_sigmoid,
    inside_last_sigmoid, float_weights, unsigned, shifted, at_output, in_decode, both_summands, neither_summand,
)  # fmt: skip


def run(model):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return [session.run(None, {"images": image[None]}) for image in IMAGES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_mended_graph_is_the_graph_without_the_fault(case):
    faulty, wanted = case(Builder(), False), case(Builder(), True)
    original = faulty.SerializeToString()
    mended, report = fix_model(faulty)
    assert faulty.SerializeToString() == original
    assert report.fixes
    onnx.checker.check_model(mended, full_check=True)
    assert len(report.before.findings) > len(report.after.findings)
    assert [f.rule for f in report.after.findings] == [f.rule for f in inspect_model(wanted).findings]
    assert count_qdq(mended) == count_qdq(wanted)
    np.testing.assert_equal(run(mended), run(wanted))
    if case in SAME_VALUES:
        np.testing.assert_equal(run(mended), run(faulty))
    else:
        with pytest.raises(AssertionError):
            np.testing.assert_equal(run(mended), run(faulty))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_mending_twice_changes_nothing(case):
    mended, _ = fix_model(case(Builder(), False))
    again, report = fix_model(mended)
    assert report.fixes == ()
    assert again is mended


def test_per_channel_weights_are_nearer_to_the_float_ones():
    mended, _ = fix_model(float_weights(Builder(), False))
    errors = []
    for model in (float_weights(Builder(), False), mended):
        constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        node = next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] in constants)
        value, scale = constants[node.input[0]], constants[node.input[1]].reshape(-1, 1, 1, 1)
        errors.append(float(np.abs(np.clip(np.rint(value / scale), -127, 127) * scale - value).mean()))
    assert errors[1] < errors[0] / 2


# -- what is left as it is


def silu_before_float_conv(b):
    x = b.silu(b.pair(b.conv(b.pair(b.stem())), 0.05))
    return b.model(b.op("Conv", [x, b.constant(b.weight(16, 16))], pads=[1] * 4))


def weight_codes_per_tensor(b):
    value = b.weight(16, 16)
    return b.model(b.conv(b.pair(b.stem()), weight=b.codes(value, np.abs(value).max() / 127)))


def concat_with_a_zero_point(b):
    """Codes that another operator reads as well, so that the pair cannot be given another grid."""
    x = b.pair(b.stem())
    left, right = (b.op("Relu", [b.conv(x)]) for _ in range(2))
    scale, zero = b.constant(np.float32(0.03)), b.constant(np.int8(-100))
    codes = b.op("QuantizeLinear", [right, scale, zero])
    right = b.op("DequantizeLinear", [codes, scale, zero])
    extra = b.op("Cast", [codes], to=TensorProto.FLOAT)
    return b.model(b.conv(b.op("Concat", [b.pair(left, 0.02), right], axis=1), 32), extra)


LEFT = (
    (silu_before_float_conv, "q-inside-conv"),
    (weight_codes_per_tensor, "per-tensor-weight"),
    (concat_with_a_zero_point, "zero-point"),
)


@pytest.mark.parametrize(("case", "rule"), LEFT, ids=lambda value: getattr(value, "__name__", value))
def test_what_needs_data_is_left_and_named(case, rule, tmp_path, capsys):
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(case(Builder()), path)
    assert main([str(path), "--fix", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "nothing to fix without data" in printed
    assert f"left: {rule} 1 (" in printed
    assert load_onnx(out) == load_onnx(path)


def test_a_good_graph_is_written_unchanged(good, tmp_path):
    report = fix_file(good, tmp_path / "out.onnx")
    assert report.fixes == ()
    assert (tmp_path / "out.onnx").read_bytes() == good.read_bytes()


def test_external_data_comes_into_the_written_file(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    onnx.save(
        scale_shape(Builder(), False),
        folder / "in.onnx",
        save_as_external_data=True,
        location="weights",
        size_threshold=0,
    )
    fix_file(folder / "in.onnx", tmp_path / "out.onnx")
    np.testing.assert_equal(run(load_onnx(tmp_path / "out.onnx")), run(scale_shape(Builder(), True)))


def test_a_fix_that_adds_findings_is_taken_back(monkeypatch):
    def worse(graph):
        for node in [node for node in graph.nodes if node.op_type == "Conv"]:
            graph.constants["float"] = np.ones((16, 16, 3, 3), np.float32)
            node.input[1] = "float"
        graph.reindex()
        removed = graph.prune()
        return PassResult(0, -removed, 1)

    monkeypatch.setattr(deploy.check.fix, "FIXES", (Fix(("scale-shape",), worse, "worse"),))
    model = scale_shape(Builder(), False)
    mended, report = fix_model(model)
    assert mended is model
    assert (report.fixes, report.taken_back) == ((), ("worse",))
    assert report.after == report.before


def test_constants_in_blocks_are_left():
    """Opset 21: one scale for every 4 codes; the bias beside it is mended."""
    b = Builder(21)
    codes, scale = b.constant(np.ones((4, 8), np.int8)), b.constant(np.full((4, 2), 0.5, np.float32))
    blocked = b.op("DequantizeLinear", [codes, scale], axis=1, block_size=4)
    zero = b.constant(np.int32(0))
    bias = b.op("DequantizeLinear", [b.constant(np.ones(16, np.int32)), b.constant(np.float32(0.1)), zero])
    x = b.op("ReduceMean", [b.conv(b.pair(b.stem()), bias=bias)], keepdims=0)
    model = b.finish([b.op("Mul", [x, blocked])])
    model.graph.output[0].type.tensor_type.ClearField("shape")
    mended, report = fix_model(model)
    assert [fix.dequantize for fix in report.fixes] == [-1]
    np.testing.assert_equal(run(mended), run(model))


# -- the two rules about TensorRT's compiler


@pytest.mark.parametrize(
    ("case", "rule"), [(scale_shape, "scale-shape"), (resize, "resize"), (resize_before_concat, "resize")]
)
def test_rules_of_the_compiler_are_for_tensorrt(case, rule):
    model = case(Builder(), False)
    for target in (None, *(name for name, entry in TARGETS.items() if entry.signed_only)):
        assert [f.rule for f in inspect_model(model, target=target).findings] == [rule]
    assert inspect_model(model, target="openvino").findings == ()
    assert rule not in [f.rule for f in inspect_model(model, target="onnxruntime").findings]
    assert fix_model(model, target="openvino")[0] is model


def test_shapes_of_q_and_dq_are_no_mismatch():
    """[1] at the Q alone: the compiler takes it, and the values are equal."""
    model = scale_shape(Builder(), False)
    graph = model.graph
    node = next(
        n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[1] == graph.node[5].input[1]
    )
    scalars = [numpy_helper.from_array(np.float32(0.02), "s"), numpy_helper.from_array(np.int8(0), "z")]
    graph.initializer.extend(scalars)
    node.input[1:] = ["s", "z"]
    assert inspect_model(model).findings == ()


@pytest.mark.skipif(not importlib.util.find_spec("tensorrt_rtx"), reason="TensorRT for RTX is not installed")
def test_the_compiler_agrees():
    """Layers that TensorRT for RTX runs in float because of the two faults run in INT8 once mended."""
    from deploy.compile.report import inspect_build

    b = Builder()
    x = b.pair(b.stem(), shape=(1,))
    small = b.op("Relu", [b.conv(b.pair(b.op("Relu", [b.conv(x)])), stride=2)])
    joined = b.op("Concat", [b.up(b.pair(small)), b.pair(b.op("Relu", [b.conv(x)]))], axis=1)
    model = b.model(b.conv(joined, 32), size=64)
    counts = [inspect_build(m, "SM89").engine.convolutions for m in (model, fix_model(model)[0])]
    assert counts[0]["int8"] == 2
    assert counts[1] == {"fp32": 1, "int8": 5}
