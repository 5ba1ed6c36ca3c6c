"""What a file tells of its inputs: read once, and again when the file has changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from deploy.runtimes import openvino
from deploy.runtimes.openvino import OpenVINORuntime


def write_model(path: Path, shape: list[int | str]) -> None:
    """One convolution on images of this shape."""
    weight = onnx.numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")
    images = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, shape)
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    conv = onnx.helper.make_node("Conv", ["images", "w"], ["y"], kernel_shape=[3, 3])
    graph = onnx.helper.make_graph([conv], "g", [images], [output], [weight])
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))


def test_inputs_are_read_once_for_each_version_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reads, read = tmp_path / "m.onnx", [], openvino._read_model
    monkeypatch.setattr(openvino, "_read_model", lambda path: reads.append(path) or read(path))
    write_model(path, [2, 3, 64, 96])
    assert OpenVINORuntime.stored_size(path) == (64, 96)
    assert OpenVINORuntime.stored_batch(path) == 2
    assert [str(found) for found in OpenVINORuntime.stored_inputs(path)] == ["images float32 [2, 3, 64, 96]"]
    assert len(reads) == 1
    write_model(path, ["batch", 3, 320, "width"])
    assert OpenVINORuntime.stored_size(path) is None
    assert OpenVINORuntime.stored_batch(path) is None
    assert [str(found) for found in OpenVINORuntime.stored_inputs(path)] == ["images float32 [?, 3, 320, ?]"]
    assert len(reads) == 2
