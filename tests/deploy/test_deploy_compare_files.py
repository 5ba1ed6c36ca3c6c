"""The command with `--fix`, and `compare_files`: what two graphs give for the same images, and which it takes."""

from __future__ import annotations

import json

import cv2
import numpy as np
import onnx
import pytest
from fix_graphs import Builder
from onnx import TensorProto, helper, numpy_helper
from test_deploy_fix import IMAGES, run, scales_of_a_concat

from core.errors import DeployError
from deploy.check.command import main
from deploy.check.fix import compare_files
from deploy.graph.model import load_onnx


def test_command_line(tmp_path, capsys):
    path, out, report = tmp_path / "in.onnx", tmp_path / "out.onnx", tmp_path / "report.json"
    onnx.save(scales_of_a_concat(Builder(), False), path)
    np.savez(tmp_path / "images.npz", IMAGES)
    arguments = [str(path), "--fix", str(out), "--strict", "--json", str(report)]
    assert main([*arguments, "--images", str(tmp_path / "images.npz")]) == 0
    printed = capsys.readouterr().out
    assert (
        "tensors that meet get the largest of their scales: 2 edits, +0 Q, +0 DQ; findings 1 -> 0" in printed
    )
    before, after = (np.concatenate([r[0] for r in run(load_onnx(file))]) for file in (path, out))
    difference = np.abs(before.astype(np.float64) - after)
    assert f"output0: max {difference.max():.4g}, mean {difference.mean():.4g}" in printed
    written = json.loads(report.read_text())
    assert written["findings"] == []
    assert [fix["findings_after"] for fix in written["fixed"]["fixes"]] == [0]
    assert [finding["rule"] for finding in written["fixed"]["findings_before"]] == ["conv-float"]
    assert main([str(path), "--strict"]) == 4
    assert main([str(path), "--fix", str(path)]) == 3
    with pytest.raises(SystemExit):
        main([str(path), "--images", str(tmp_path / "images.npz")])


def test_box_and_score_columns_and_image_files(tmp_path):
    """A decoded output0 [1, 4 + K, A] is told in pixels and scores; a constant shift of each is what is found."""
    shapes = {"images": [1, 3, 8, 8], "output0": [1, 6, 10]}
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()
    }
    for name, box, score in (("a", 10.0, 0.5), ("b", 12.0, 0.25)):
        table = np.concatenate([np.full((1, 4, 10), box), np.full((1, 2, 10), score)], 1).astype(np.float32)
        nodes = [
            helper.make_node("ReduceMean", ["images"], ["mean"], keepdims=0),
            helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
            helper.make_node("Add", ["table", "nothing"], ["output0"]),
        ]
        constants = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.float32(0), "zero")]
        graph = helper.make_graph(nodes, "g", [values["images"]], [values["output0"]], constants)
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9),
            tmp_path / f"{name}.onnx",
        )
    cv2.imwrite(str(tmp_path / "image.png"), np.zeros((20, 30, 3), np.uint8))
    text = compare_files(tmp_path / "a.onnx", tmp_path / "b.onnx", tmp_path)
    assert "on 1 images" in text
    assert "boxes max 2 px, mean 2 px, mean 2 px at 10 confident anchors; scores max 0.25, mean 0.25" in text


@pytest.mark.parametrize("content", [None, "text", np.zeros((3, 4), np.float32), np.array([object()])])
def test_images_that_cannot_be_used(content, good, tmp_path):
    path = tmp_path / "images.npz"
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        np.savez(path, content)
    with pytest.raises(DeployError, match=r"images\.npz"):
        compare_files(good, good, path)


def test_pictures_that_are_not_read_are_named(good, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DeployError, match=r"No images in .*; OpenCV does not decode broken\.png"):
        compare_files(good, good, tmp_path)
    cv2.imwrite(str(tmp_path / "image.png"), np.zeros((20, 30, 3), np.uint8))
    lines = compare_files(good, good, tmp_path).splitlines()
    assert "on 1 images" in lines[0]
    assert lines[1] == "  not read, since OpenCV does not decode them: broken.png"
