"""The graph check never passes what it cannot judge: operators, codes, weights and shapes that it does not know."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.check.command import format_report, main
from deploy.check.fix import fix_model
from deploy.check.report import inspect_model
from deploy.graph.model import load_onnx

IMAGE = (1, 16, 8, 8)
MICROSOFT = "com.microsoft"


def constant(name, value, kind=None):
    if kind is None:
        return numpy_helper.from_array(np.asarray(value), name)
    array = np.asarray(value)
    return helper.make_tensor(name, kind, array.shape, array.reshape(-1).tolist())


def model_of(
    nodes, constants, inputs=(("x", IMAGE),), outputs=("y",), opset=21, kind=TensorProto.FLOAT, **more
):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        constants,
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10, **more)


def parameters(codes=TensorProto.INT8, weight_codes=None):
    return [
        constant("scale", np.float32(0.05)),
        constant("zero", 0, codes),
        constant("w_scale", np.full(16, 0.01, np.float32)),
        constant("w_zero", np.zeros(16, int), weight_codes or codes),
        constant("w", np.ones((16, 16, 3, 3), int), weight_codes or codes),
    ]


def quantized_conv(domain="", source="x", result="y"):
    """Q, DQ on the data, DQ on the weight, Conv: what the check counts as an INT8 conv."""

    def node(kind, inputs, output):
        name = f"{result}/{kind}/{output}"
        more = {"axis": 0} if inputs[0] == "w" else {}
        return helper.make_node(kind, inputs, [f"{result}_{output}"], name, domain=domain, **more)

    return [
        node("QuantizeLinear", [source, "scale", "zero"], "q"),
        node("DequantizeLinear", [f"{result}_q", "scale", "zero"], "d"),
        node("DequantizeLinear", ["w", "w_scale", "w_zero"], "wd"),
        helper.make_node(
            "Conv", [f"{result}_d", f"{result}_wd"], [result], f"{result}/Conv", pads=[1, 1, 1, 1]
        ),
    ]


def convolution_model(codes=TensorProto.INT8, weight_codes=None, shape=IMAGE, domain="", **more):
    """Two quantized convs, so that one of them is not at the output."""
    nodes = [*quantized_conv(domain, "x", "h"), *quantized_conv(domain, "h", "y")]
    return model_of(nodes, parameters(codes, weight_codes), (("x", shape),), **more)


def integer_model():
    """Image to codes, ConvInteger, back to float: dynamic quantization as ONNX Runtime's tools write it."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"], "dyn"),
        helper.make_node("ConvInteger", ["xq", "w", "xz"], ["i"], "conv"),
        helper.make_node("Cast", ["i"], ["f"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "xs"], ["y"], "mul"),
    ]
    return model_of(nodes, parameters())


def operator_model(kind, domain=""):
    """Q, an operator on codes, DQ: the operator form of static quantization."""
    inputs = {
        "QLinearConv": ["q", "scale", "zero", "w", "w_scale", "w_zero", "scale", "zero"],
        "QLinearMatMul": ["q", "scale", "zero", "m", "scale", "zero", "scale", "zero"],
        "QGemm": ["q", "scale", "zero", "m", "scale", "zero", "", "scale", "zero"],
        "QLinearSigmoid": ["q", "scale", "zero", "scale", "zero"],
    }[kind]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "q"),
        helper.make_node(kind, inputs, ["i"], "op", domain=domain),
        helper.make_node("DequantizeLinear", ["i", "scale", "zero"], ["y"], "d"),
    ]
    return model_of(nodes, [*parameters(), constant("m", np.ones((8, 8), np.int8))])


def matmul_integer_model():
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "q"),
        helper.make_node("MatMulInteger", ["q", "m"], ["i"], "op"),
        helper.make_node("Cast", ["i"], ["y"], "cast", to=TensorProto.FLOAT),
    ]
    return model_of(nodes, [*parameters(), constant("m", np.ones((8, 8), np.int8))])


def lstm_model():
    nodes = [helper.make_node("LSTM", ["x", "a", "b"], ["y"], "lstm", hidden_size=4)]
    weights = [constant(name, np.ones((1, 16, 4), np.float32)) for name in ("a", "b")]
    return model_of(nodes, weights, (("x", (8, 1, 4)),))


def branching_model():
    """The convs lie in the branches of an If."""

    def branch(name):
        out = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        node = helper.make_node("Conv", ["x", "k"], [f"{name}_y"], f"{name}/conv")
        return helper.make_graph([node], name, [], [out])

    nodes = [helper.make_node("If", ["c"], ["y"], "if", then_branch=branch("a"), else_branch=branch("b"))]
    kernel = constant("k", np.ones((16, 16, 3, 3), np.float32))
    model = model_of(nodes, [kernel])
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    return model


UNKNOWN_OPERATORS = {
    "integer": (integer_model, "ConvInteger"),
    "qlinearconv": (lambda: operator_model("QLinearConv"), "QLinearConv"),
    "qlinearmatmul": (lambda: operator_model("QLinearMatMul"), "QLinearMatMul"),
    "matmulinteger": (matmul_integer_model, "MatMulInteger"),
    "qgemm": (lambda: operator_model("QGemm", MICROSOFT), "com.microsoft.QGemm"),
    "contrib": (lambda: operator_model("QLinearSigmoid", MICROSOFT), "com.microsoft.QLinearSigmoid"),
    "contrib-qdq": (lambda: convolution_model(domain=MICROSOFT), "com.microsoft.QuantizeLinear"),
    "lstm": (lstm_model, "LSTM"),
    "branches": (branching_model, "If"),
}


@pytest.mark.parametrize("name", UNKNOWN_OPERATORS)
def test_operators_that_the_check_does_not_know_are_a_finding(name):
    build, operator = UNKNOWN_OPERATORS[name]
    report = inspect_model(build())
    found = {finding.rule: finding for finding in report.findings}
    assert f" {operator}" in found["unknown-operator"].hazard
    assert not {"useless-q", "dangling-q", "q-in-decode"} & set(
        found
    )  # nothing is claimed about their neighbours
    assert report.summary.num_int8_convs == 0


def test_strict_fails_for_an_operator_that_is_not_known(tmp_path, capsys):
    onnx.save(integer_model(), tmp_path / "m.onnx")
    assert main([str(tmp_path / "m.onnx"), "--strict", "--json", str(tmp_path / "m.json")]) == 4
    assert (
        "2 operators this check does not know: 1 DynamicQuantizeLinear, 1 ConvInteger"
        in capsys.readouterr().out
    )
    assert json.loads((tmp_path / "m.json").read_text())["summary"]["int8_share"] is None


def test_known_operators_and_codes_have_no_such_finding():
    report = inspect_model(convolution_model())
    assert report.findings == ()
    assert report.summary.num_int8_convs == 2
    assert report.summary.int8_share == 1.0


@pytest.mark.parametrize("name", ["UINT16", "INT16", "UINT4", "INT4", "FLOAT8E5M2", "FLOAT8E4M3FNUZ"])
def test_codes_of_other_types_do_not_count_as_int8(name):
    report = inspect_model(convolution_model(getattr(TensorProto, name)))
    found = {finding.rule: finding for finding in report.findings}
    assert name.lower() in found["unknown-codes"].hazard
    assert report.summary.num_int8_convs == report.summary.num_fp8_convs == 0
    assert report.summary.int8_share == 0.0


def test_weights_of_other_types_do_not_count_as_int8_beside_int8_data():
    report = inspect_model(convolution_model(weight_codes=TensorProto.INT4))
    assert [finding.rule for finding in report.findings] == ["unknown-codes"]
    assert "2 tensors have int4 codes" in report.findings[0].hazard
    assert report.summary.num_int8_convs == 0


def test_codes_whose_type_only_the_quantizer_states():
    """Without a zero point `output_dtype` decides, and uint8 where that is absent too."""
    for stated, wanted in ((0, []), (TensorProto.UINT16, ["unknown-codes"])):
        model = convolution_model(TensorProto.UINT8, TensorProto.INT8)
        for node in model.graph.node:
            if node.input[1] == "scale":
                del node.input[2]
            if node.op_type == "QuantizeLinear" and stated:
                node.attribute.append(helper.make_attribute("output_dtype", stated))
        assert [f.rule for f in inspect_model(model, target="openvino").findings] == wanted


@pytest.mark.parametrize("shape", [(1, 16, "height", "width"), (1, 16, 8, None), ("batch", 16, None, None)])
def test_unknown_shapes_are_said_and_their_share_is_unknown(shape):
    report = inspect_model(convolution_model(shape=shape))
    assert [finding.rule for finding in report.findings] == ["unknown-shape"]
    assert "--size" in report.findings[0].remedy
    assert report.summary.int8_share is None
    assert report.summary.macs is None
    assert "share of the multiply-accumulates unknown" in format_report(report)
    assert inspect_model(convolution_model(shape=shape), image_size=(8, 8)).findings == ()


def test_matrix_products_of_vectors_are_counted():
    for weight, macs in (((8,), 1 * 16 * 8 * 8), ((8, 4), 1 * 16 * 8 * 8 * 4)):
        nodes = [helper.make_node("MatMul", ["x", "m"], ["y"], "m")]
        report = inspect_model(model_of(nodes, [constant("m", np.ones(weight, np.float32))]))
        assert report.summary.macs == macs
    vector = constant("m", np.ones(8, np.float32))
    dot = model_of([helper.make_node("MatMul", ["x", "m"], ["y"])], [vector], (("x", (8,)),))
    assert inspect_model(dot).summary.macs == 8


def test_layers_without_a_constant_weight_are_said():
    """A weight that comes as an input, or stands on the left of a product, is none that the check looks at."""
    matrix = constant("m", np.ones((8, 8), np.float32))
    given = model_of([helper.make_node("Conv", ["x", "k"], ["y"])], [], (("x", IMAGE), ("k", (16, 16, 3, 3))))
    left = model_of([helper.make_node("MatMul", ["m", "x"], ["y"])], [matrix])
    summed = model_of([helper.make_node("Einsum", ["x", "m"], ["y"], equation="abcd,de->abce")], [matrix])
    for model, rule in ((given, "unknown-weight"), (left, "unknown-weight"), (summed, "unknown-operator")):
        assert rule in [finding.rule for finding in inspect_model(model).findings]


def test_codes_outside_of_pairs_are_said():
    """Codes that something else makes or reads are not what a Q/DQ pair means."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "q"),
        helper.make_node("Cast", ["q"], ["c"], "cast", to=TensorProto.FLOAT),
        *quantized_conv("", "c", "y"),
    ]
    (finding,) = inspect_model(model_of(nodes, parameters())).findings
    assert (finding.rule, finding.name) == ("codes-without-dq", "q")
    assert "Cast" in finding.hazard
    given = quantized_conv("", "h", "y")[1:]
    given[0].input[0] = "x"
    model = model_of(given, parameters(), kind=TensorProto.INT8)
    (finding,) = inspect_model(model).findings
    assert finding.rule == "codes-without-q"
    assert "graph input 'x'" in finding.hazard


def test_a_graph_without_inputs_outputs_or_layers_is_no_clean_bill():
    nodes = [helper.make_node("Relu", ["x"], ["y"], "relu")]
    relu = model_of(nodes, [])
    assert [finding.rule for finding in inspect_model(relu).findings] == ["nothing-to-check"]
    assert "0.00%" not in format_report(inspect_model(relu))
    for inputs, outputs in (((), ("y",)), ((("x", IMAGE),), ())):
        model = convolution_model()
        del model.graph.input[len(inputs) :], model.graph.output[len(outputs) :]
        if not inputs:
            model.graph.initializer.append(constant("x", np.ones(IMAGE, np.float32)))
        assert "nothing-to-check" in [finding.rule for finding in inspect_model(model).findings]


def functional_model():
    """The same two convs, each in a function of the model."""
    body = quantized_conv("", "a", "b")
    names = ["a", "scale", "zero", "w", "w_scale", "w_zero"]
    function = helper.make_function("mine", "Block", names, ["b"], body, [helper.make_opsetid("", 21)])
    calls = [
        helper.make_node("Block", [source, *names[1:]], [result], f"block_{result}", domain="mine")
        for source, result in (("x", "h"), ("h", "y"))
    ]
    model = model_of(calls, parameters(), functions=[function])
    model.opset_import.append(helper.make_opsetid("mine", 1))
    return model


def test_functions_are_looked_into(tmp_path):
    report = inspect_model(functional_model())
    assert report.findings == ()
    assert report.summary == inspect_model(convolution_model()).summary
    onnx.save(functional_model(), tmp_path / "m.onnx")
    assert not load_onnx(tmp_path / "m.onnx").functions


def test_branches_of_known_float_operators_are_no_finding():
    """As torchvision's post-processing has them: they hold nothing that could run in INT8."""
    out = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Relu", ["h"], ["z"], "relu")], "then", [], [out])
    nodes = [
        *quantized_conv("", "x", "g"),
        *quantized_conv("", "g", "h"),
        helper.make_node("If", ["c"], ["y"], "if", then_branch=branch, else_branch=branch),
    ]
    model = model_of(nodes, parameters())
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    assert inspect_model(model).findings == ()


def test_fix_leaves_operators_of_other_domains_as_they_are():
    model = convolution_model(domain=MICROSOFT)
    mended, report = fix_model(model)
    assert [(n.op_type, n.domain) for n in mended.graph.node] == [
        (n.op_type, n.domain) for n in model.graph.node
    ]
    assert report.fixes == ()
