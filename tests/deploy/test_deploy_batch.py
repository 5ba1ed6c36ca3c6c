"""Graphs with a fixed batch: any number of images, the same results, and refusals before the work."""

import json

import numpy as np
import onnx
import pytest
from check_edits import SIZE
from deploy_networks import SmallDetector

from configs import compose
from core.errors import ConfigError, DeployError
from deploy import ONNXRuntime, OpenVINORuntime, check_graph, export_onnx
from deploy.runtimes.engines import build_engine, find_batch, open_engine
from deploy.runtimes.tensorrt import TensorRTRuntime


def images_of(batch):
    return np.random.default_rng(0).random((batch, 3, *SIZE), np.float32)


@pytest.mark.parametrize("target", ["openvino", "onnxruntime", "trt10"])
def test_a_fixed_batch_is_the_one_that_was_asked_for(tmp_path, target):
    images = images_of(4)
    paths = [
        export_onnx(
            SmallDetector(),
            tmp_path / f"{fixed}.onnx",
            SIZE,
            target,
            images=[images],
            dynamic_batch=not fixed,
            batch=4,
        ).path
        for fixed in (True, False)
    ]
    dims = [onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0] for path in paths]
    assert (dims[0].dim_value, dims[1].dim_param) == (4, "batch")
    assert [find_batch(path) for path in paths] == [4, None]
    assert check_graph(paths[0]) == []
    results = []
    for path in paths:
        with ONNXRuntime(path, optimize=False) as runtime:
            results.append(runtime.infer(images))
    np.testing.assert_array_equal(*results)


def test_engines_tell_the_batch_that_they_are_fixed_to(tmp_path):
    path = export_onnx(
        SmallDetector(), tmp_path / "m.onnx", SIZE, "openvino", dynamic_batch=False, batch=3
    ).path
    engine = build_engine("openvino", path, tmp_path / "engines")
    assert find_batch(engine) == 3
    with open_engine("openvino", engine) as runtime:
        assert len(runtime.infer(images_of(3))) == 3
    open_engine_path = tmp_path / "m.engine"
    open_engine_path.write_bytes(b"")
    sidecar = {"metadata": dict(entry_of(path))}
    (tmp_path / "m.engine.json").write_text(json.dumps(sidecar))
    assert TensorRTRuntime.stored_batch(open_engine_path) == 3
    assert TensorRTRuntime.stored_batch(tmp_path / "none.engine") is None


def entry_of(path):
    return [(entry.key, entry.value) for entry in onnx.load(path).metadata_props]


def test_images_for_the_ranges_have_to_fit(tmp_path):
    with pytest.raises(DeployError, match="takes batches of 4"):
        export_onnx(
            SmallDetector(),
            tmp_path / "m.onnx",
            SIZE,
            "onnxruntime",
            images=[images_of(1)],
            dynamic_batch=False,
            batch=4,
        )
    assert not list(tmp_path.iterdir())


def test_the_setting_reaches_both_entries():
    config = compose(["+experiment=demo", "deploy.dynamic_batch=false", "deploy.batch=4"])
    assert config.deploy.graph_batch == 4
    assert compose(["+experiment=demo", "deploy.batch=4"]).deploy.graph_batch == 1
    with pytest.raises(ConfigError, match=r"deploy\.batch=0: expected at least 1"):
        compose(["+experiment=demo", "deploy.batch=0"])


def test_openvino_says_which_batch_a_graph_takes(tmp_path):
    path = export_onnx(
        SmallDetector(), tmp_path / "m.onnx", SIZE, "openvino", dynamic_batch=False, batch=2
    ).path
    with (
        OpenVINORuntime(path) as runtime,
        pytest.raises(DeployError, match=r"takes images \[2,3,64,96\], got \[1"),
    ):
        runtime.infer(images_of(1))


def test_openvino_says_in_few_words_that_a_batch_is_fixed(tmp_path):
    """The reshape in the graph holds the batch; OpenVINO's own text about it is pages long."""
    path = export_onnx(
        SmallDetector(), tmp_path / "m.onnx", SIZE, "openvino", dynamic_batch=False, batch=2
    ).path
    graph = onnx.load(path)
    shape = onnx.numpy_helper.from_array(np.array([2, -1], np.int64), "two")
    graph.graph.initializer.append(shape)
    graph.graph.node.append(onnx.helper.make_node("Reshape", ["images", "two"], ["rows"]))
    graph.graph.output.append(onnx.helper.make_tensor_value_info("rows", onnx.TensorProto.FLOAT, [2, None]))
    onnx.save(graph, path)
    with pytest.raises(DeployError, match=r"cannot be fixed to batch 7.*dynamic_batch=true") as caught:
        OpenVINORuntime(path, batch=7, image_size=SIZE)
    assert len(str(caught.value)) < 300
