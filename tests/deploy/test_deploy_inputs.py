"""Models of other tools: their inputs are listed where they are no images, fixed batches and external data are seen."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from core.errors import DeployError
from deploy.benchmark.__main__ import choose_batches, main, parse_spec
from deploy.runtimes.base import engine_size
from deploy.runtimes.engines import build_engine, find_batch, list_inputs, open_engine


def model_of(inputs, channels=3, kind=TensorProto.FLOAT):
    """A convolution over the first input; the others are added up and read as well."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weight = numpy_helper.from_array(np.ones((4, channels, 3, 3), dtype), "w")
    nodes = [helper.make_node("Conv", [inputs[0][0], "w"], ["c"])]
    result = "c"
    for name, _ in inputs[1:]:
        nodes.append(helper.make_node("Mul", [result, name], [f"{name}_y"]))
        result = f"{name}_y"
    nodes.append(helper.make_node("Identity", [result], ["y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs],
        [helper.make_tensor_value_info("y", kind, None)],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


MODELS = {
    "two inputs": (
        lambda: model_of([("x", (1, 3, 16, 16)), ("factor", (1,))]),
        r"takes x float32 \[1, 3, 16, 16\]; factor float32 \[1\]: expected one input",
    ),
    "half": (
        lambda: model_of([("x", ("n", 3, 16, 16))], kind=TensorProto.FLOAT16),
        r"x float16 \[\?, 3, 16, 16\]",
    ),
    "grey": (lambda: model_of([("x", (1, 1, 16, 16))], 1), r"x float32 \[1, 1, 16, 16\]: expected one input"),
    "infrared": (lambda: model_of([("x", ("n", 4, "h", "w"))], 4), r"x float32 \[\?, 4, \?, \?\]"),
}


@pytest.mark.parametrize("name", MODELS)
def test_inputs_that_are_no_images_are_listed(tmp_path, capsys, name):
    build, words = MODELS[name]
    onnx.save(build(), tmp_path / "m.onnx")
    for runtime in ("onnxruntime", "openvino"):
        with pytest.raises(DeployError, match=words):
            open_engine(runtime, tmp_path / "m.onnx")
        code = main([str(tmp_path / "m.onnx"), "--runtime", runtime, "--shapes", "16x16", "--time", "0.1"])
        assert code == 3
        assert "expected one input, float32 [B, 3, H, W]" in capsys.readouterr().err
    engine = build_engine("openvino", tmp_path / "m.onnx", tmp_path / "engines")
    assert [str(value) for value in list_inputs(engine)] == [
        str(value) for value in list_inputs(tmp_path / "m.onnx")
    ]


def test_weights_that_are_listed_as_inputs_are_none(tmp_path):
    model = model_of([("x", (2, 3, 16, 16))])
    model.graph.input.insert(0, helper.make_tensor_value_info("w", TensorProto.FLOAT, (4, 3, 3, 3)))
    onnx.save(model, tmp_path / "m.onnx")
    assert [value.name for value in list_inputs(tmp_path / "m.onnx")] == ["x"]
    assert find_batch(tmp_path / "m.onnx") == 2
    assert (
        main([str(tmp_path / "m.onnx"), "--runtime", "onnxruntime", "--time", "0.05", "--warmup", "0.01"])
        == 0
    )


def test_a_fixed_batch_is_timed_and_others_are_refused(tmp_path, capsys):
    onnx.save(model_of([("x", (4, 3, 16, 16))]), tmp_path / "four.onnx")
    onnx.save(model_of([("x", ("n", 3, 16, 16))]), tmp_path / "any.onnx")
    four, free = (str(tmp_path / f"{name}.onnx") for name in ("four", "any"))
    common = ["--runtime", "onnxruntime", "--time", "0.05", "--warmup", "0.01"]
    assert main([four, *common, "--json", str(tmp_path / "out.json")]) == 0
    assert '"batch": 4' in (tmp_path / "out.json").read_text()
    assert main(["--compare", free, four, *common]) == 0
    capsys.readouterr()
    assert main([four, *common, "--batch", "1,4"]) == 3
    assert "takes batches of 4 only, not of 1: use --batch 4" in capsys.readouterr().err
    specs = [parse_spec(text, "openvino", None) for text in (free, four)]
    assert choose_batches(specs, [1, 8]) == [1, 8]  # OpenVINO can change it
    assert choose_batches(specs[:1], None) == [1]


def test_sizes_include_external_data(tmp_path):
    model = model_of([("x", (1, 3, 16, 16))])
    onnx.save(model, tmp_path / "whole.onnx")
    onnx.save(
        model, tmp_path / "split.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    graph, weights = (tmp_path / name for name in ("split.onnx", "weights.bin"))
    assert weights.stat().st_size == 4 * 3 * 9 * 4
    assert engine_size(graph) == graph.stat().st_size + weights.stat().st_size
    assert engine_size(tmp_path / "whole.onnx") == (tmp_path / "whole.onnx").stat().st_size
