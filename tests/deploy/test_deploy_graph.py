"""Untrusted ONNX files: what their external data may and may not point to."""

import numpy as np
import onnx
import pytest
from deploy_networks import SmallDetector
from onnx import TensorProto, helper, numpy_helper

from core.errors import DeployError, WriteError
from core.files import write_bytes
from deploy import OpenVINORuntime, export_onnx, load_onnx, save_onnx, verify_onnx
from deploy.check.command import main as check_main


def model_with_external(location, length=None, in_attribute=False):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": str(length or 8)}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy"]
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    if in_attribute:
        nodes.insert(0, helper.make_node("Constant", [], ["w"]))
        attribute = nodes[0].attribute.add()
        attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
        attribute.t.CopyFrom(tensor)
        return helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:]))
    return helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], [tensor]))


@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/hostname", "a/../../secret.bin", "link.bin", "", "."]
)
@pytest.mark.parametrize("in_attribute", [False, True])
def test_external_data_may_not_leave_the_folder(tmp_path, location, in_attribute):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(8))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    path = folder / "m.onnx"
    path.write_bytes(model_with_external(location, in_attribute=in_attribute).SerializeToString())
    for read in (load_onnx, verify_onnx, OpenVINORuntime):
        with pytest.raises(DeployError, match="outside the model's folder"):
            read(path)


def test_external_data_beside_the_model_is_read(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(model_with_external("w.bin").SerializeToString())
    with pytest.raises(DeployError, match="does not exist"):
        load_onnx(path)
    (tmp_path / "w.bin").write_bytes(np.array([1, 2], np.float32).tobytes())
    np.testing.assert_array_equal(numpy_helper.to_array(load_onnx(path).graph.initializer[0]), [1, 2])
    (tmp_path / "w.bin").write_bytes(bytes(4))
    with pytest.raises(DeployError, match="truncated"):
        load_onnx(path)


def test_size_limit_missing_and_malformed_files(tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.raises(DeployError, match="No ONNX file"):
        load_onnx(path)
    path.write_bytes(b"not a protobuf at all")
    with pytest.raises(DeployError, match=r"not an ONNX file|empty ONNX graph"):
        load_onnx(path)
    path.write_bytes(model_with_external("w.bin").SerializeToString())
    with pytest.raises(DeployError, match="at most 10 are read"):
        load_onnx(path, max_bytes=10)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def fail(handle):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(WriteError, match="disk full"):
        save_onnx(model_with_external("w.bin"), path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == b"old"


def test_a_place_that_cannot_be_written_is_told(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WriteError, match=r"file/out\.json cannot be written"):
        write_bytes(tmp_path / "file" / "out.json", b"{}")
    path = export_onnx(SmallDetector(), tmp_path / "m.onnx", (64, 96), "trt10").path
    assert check_main([str(path), "--json", str(tmp_path / "file" / "out.json")]) == 3
    assert "cannot be written" in capsys.readouterr().err
