"""Raw maps against torch, NMS in the graph against torchvision."""

import numpy as np
import onnx
import pytest
import torch
import torchvision
from deploy_networks import QuantizedConv
from torch import nn

from core.errors import DeployError
from deploy import NMSOptions, ONNXRuntime, OpenVINORuntime, check_graph, export_onnx

SIZE = (64, 96)
CLASSES = 3


class ThreeLevels(nn.Module):
    """Box and class maps at strides 8, 16 and 32, decoded in one float part, as YOLO heads do it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(QuantizedConv(3, 16, 1 / 127, 2), QuantizedConv(16, 16, 0.02, 2))
        self.downs = nn.ModuleList([QuantizedConv(16, 16, 0.02, 2) for _ in range(3)])
        self.boxes = nn.ModuleList([nn.Conv2d(16, 64, 1) for _ in range(3)])
        self.classes = nn.ModuleList([nn.Conv2d(16, CLASSES, 1) for _ in range(3)])
        for conv in self.classes:
            conv.weight.data *= 20

    def raw(self, images):
        x, maps = self.stem(images), []
        for down, box, score in zip(self.downs, self.boxes, self.classes, strict=True):
            x = down(x)
            maps.append((box(x), score(x)))
        return maps

    def forward(self, images):
        parts = []
        for stride, (box, score) in zip((8, 16, 32), self.raw(images), strict=True):
            batch, _, height, width = box.shape
            distance = (box.view(batch, 4, 16, -1).softmax(2) * torch.arange(16.0).view(1, 1, 16, 1)).sum(2)
            ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            centre = torch.stack([xs.reshape(-1), ys.reshape(-1)]).float() + 0.5
            low, high = centre - distance[:, :2], centre + distance[:, 2:]
            boxes = torch.cat([(low + high) / 2, high - low], 1) * stride
            parts.append(torch.cat([boxes, score.flatten(2).sigmoid()], 1))
        return torch.cat(parts, 2)


@pytest.fixture(scope="module")
def module():
    return ThreeLevels().eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("target", ["openvino", "trt10", "trt11"])
def test_raw_maps_in_order(module, images, tmp_path, target):
    path = export_onnx(module, tmp_path / "m.onnx", SIZE, target, outputs="raw").path
    with torch.no_grad():
        expected = [tensor.numpy() for pair in module.raw(images) for tensor in pair]
    with ONNXRuntime(path, threads=1, optimize=False) as runtime:
        assert runtime.output_names == ("box_8", "class_8", "box_16", "class_16", "box_32", "class_32")
        for name, wanted in zip(runtime.output_names, expected, strict=True):
            found = runtime.infer_outputs(images.numpy())[name]
            assert found.shape == wanted.shape, name
            assert np.abs(found - wanted).max() < (0.2 if target == "trt11" else 0.05)
    assert not {node.op_type for node in onnx.load(path).graph.node} & {"Softmax", "ReduceSum"}


def oracle(decoded, options):
    """Class-wise NMS by torchvision: rows (image, x1, y1, x2, y2, score, class)."""
    rows = []
    for number, output in enumerate(decoded):
        cx, cy, w, h = output[:4]
        corners = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1)
        for label, scores in enumerate(output[4:]):
            kept = torch.nonzero(scores > options.confidence).squeeze(1)
            kept = kept[torchvision.ops.nms(corners[kept], scores[kept], options.iou)][
                : options.max_detections
            ]
            rows += [[number, *corners[i].tolist(), scores[i].item(), label] for i in kept]
    return sorted(rows)


@pytest.mark.parametrize("target", ["openvino", "onnxruntime", "trt10"])
def test_onnx_nms_against_torchvision(module, images, tmp_path, target):
    options = NMSOptions(confidence=0.5, iou=0.45, max_detections=20)
    path = export_onnx(module, tmp_path / "m.onnx", SIZE, target, outputs="onnx_nms", nms=options).path
    plain = export_onnx(module, tmp_path / "p.onnx", SIZE, target).path
    with ONNXRuntime(path, optimize=False) as runtime, ONNXRuntime(plain, optimize=False) as decoded:
        found = sorted(runtime.infer(images.numpy()).tolist())
        wanted = oracle(torch.from_numpy(decoded.infer(images.numpy())), options)
    assert len(found) > 10
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


def best_pairs_by_hand(decoded, number, masks=0):
    """All (anchor, class) pairs of an image, sorted by score: rows (x1, y1, x2, y2, score, class, coefficients)."""
    rows = []
    for anchor in range(decoded.shape[1]):
        cx, cy, w, h, *rest = decoded[:, anchor].tolist()
        scores, coefficients = rest[: len(rest) - masks], rest[len(rest) - masks :]
        corners = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
        rows += [[*corners, score, label, *coefficients] for label, score in enumerate(scores)]
    return sorted(rows, key=lambda row: -row[4])[:number]


@pytest.mark.parametrize("target", ["openvino", "onnxruntime", "trt10"])
@pytest.mark.parametrize("number", [20, 300])
def test_end_to_end_is_a_sort_of_all_pairs(module, images, tmp_path, target, number):
    options = NMSOptions(max_detections=number)
    path = export_onnx(module, tmp_path / "m.onnx", SIZE, target, outputs="end2end", nms=options).path
    plain = export_onnx(module, tmp_path / "p.onnx", SIZE, target).path
    with ONNXRuntime(path, optimize=False) as runtime, ONNXRuntime(plain, optimize=False) as decoded:
        assert runtime.output_names == ("output0",)
        found, maps = runtime.infer(images.numpy()), decoded.infer(images.numpy())
    anchors = 8 * 12 + 4 * 6 + 2 * 3
    assert found.shape == (2, min(number, CLASSES * min(number, anchors)), 6)
    for image, all_of_it in zip(found, maps, strict=True):
        np.testing.assert_allclose(image, best_pairs_by_hand(all_of_it, number), rtol=1e-5, atol=1e-4)
    assert check_graph(path) == check_graph(plain)


def test_end_to_end_runs_in_openvino_with_masks(images, tmp_path):
    """Coefficients go with their anchors, prototypes pass."""

    class WithMasks(ThreeLevels):
        def forward(self, images):
            decoded = super().forward(images)
            return torch.cat([decoded, decoded[:, :2] - decoded[:, 2:4]], 1), images[:, :2, ::4, ::4]

    path = export_onnx(
        WithMasks().eval(), tmp_path / "m.onnx", SIZE, "openvino", output_names=("output0", "output1"),
        outputs="end2end",
    ).path  # fmt: skip
    plain = export_onnx(
        WithMasks().eval(), tmp_path / "p.onnx", SIZE, "openvino", output_names=("output0", "output1")
    ).path
    with OpenVINORuntime(path, "f32") as runtime, OpenVINORuntime(plain, "f32") as decoded:
        found, maps = runtime.infer_outputs(images.numpy()), decoded.infer_outputs(images.numpy())
    np.testing.assert_allclose(found["output1"], images[:, :2, ::4, ::4], rtol=1e-6)
    for image, all_of_it in zip(found["output0"], maps["output0"], strict=True):
        wanted = best_pairs_by_hand(all_of_it, 300, masks=2)
        np.testing.assert_allclose(image, wanted, rtol=1e-4, atol=1e-3)


def test_raw_maps_without_bins_are_told_apart(images, tmp_path):
    """A box map of four distances has no softmax behind it; the class map's sigmoid tells which is which."""

    class Direct(ThreeLevels):
        def __init__(self):
            super().__init__()
            self.boxes = nn.ModuleList([nn.Conv2d(16, 4, 1) for _ in range(3)])

        def forward(self, images):
            parts = [
                torch.cat([box.flatten(2), score.flatten(2).sigmoid()], 1) for box, score in self.raw(images)
            ]
            return torch.cat(parts, 2)

    module = Direct().eval()
    path = export_onnx(module, tmp_path / "m.onnx", SIZE, "trt10", outputs="raw").path
    with torch.no_grad(), ONNXRuntime(path, threads=1, optimize=False) as runtime:
        found = runtime.infer_outputs(images.numpy())
        for stride, pair in zip((8, 16, 32), module.raw(images), strict=True):
            for kind, wanted in zip(("box", "class"), pair, strict=True):
                np.testing.assert_allclose(found[f"{kind}_{stride}"], wanted.numpy(), atol=0.05)


def test_efficient_nms_node(module, tmp_path):
    options = NMSOptions(confidence=0.3, iou=0.6, max_detections=50)
    for target in ("trt10", "trt11"):
        path = export_onnx(
            module, tmp_path / "m.onnx", SIZE, target, outputs="efficient_nms", nms=options
        ).path
        model = onnx.load(path)
        (plugin,) = [node for node in model.graph.node if node.op_type == "EfficientNMS_TRT"]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in plugin.attribute}
        assert attributes["max_output_boxes"] == 50
        assert attributes["box_coding"] == 1
        assert attributes["iou_threshold"] == pytest.approx(0.6)
        outputs = {
            value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in model.graph.output
        }
        assert outputs == {
            "num_dets": ["batch", 1],
            "det_boxes": ["batch", 50, 4],
            "det_scores": ["batch", 50],
            "det_classes": ["batch", 50],
        }
        assert check_graph(path) == []
        # what the plugin reads, by shape inference: boxes [B, A, 4] and scores [B, A, K]
        shapes = {
            v.name: [d.dim_value for d in v.type.tensor_type.shape.dim][1:]
            for v in onnx.shape_inference.infer_shapes(model).graph.value_info
        }
        anchors = 8 * 12 + 4 * 6 + 2 * 3
        assert [shapes[name] for name in plugin.input] == [[anchors, 4], [anchors, CLASSES]]


@pytest.mark.parametrize("runtime", [ONNXRuntime, OpenVINORuntime])
def test_runtimes_without_the_plugin_say_what_to_do(module, tmp_path, runtime):
    path = export_onnx(module, tmp_path / "m.onnx", SIZE, "trt10", outputs="efficient_nms").path
    with pytest.raises(DeployError, match=r"(?s)m\.onnx.*plugin: build an engine.*outputs=onnx_nms"):
        runtime(path)


def test_what_does_not_fit_is_said(module, tmp_path):
    with pytest.raises(DeployError, match=r"'boxes'.*decoded, raw"):
        export_onnx(module, tmp_path / "m.onnx", SIZE, "trt10", outputs="boxes")
    with pytest.raises(DeployError, match="outputs=onnx_nms"):
        export_onnx(module, tmp_path / "m.onnx", SIZE, "openvino", outputs="efficient_nms")
    with pytest.raises(DeployError, match="starts from 'output0'"):
        export_onnx(module, tmp_path / "m.onnx", SIZE, "trt10", outputs="raw", output_names=("x",))
    assert not list(tmp_path.iterdir())
