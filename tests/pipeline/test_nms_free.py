"""Heads without NMS: the same choice of detections for torch, every form of output and every engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from configs.compose import compose
from core.errors import ConfigError
from deploy import ONNXRuntime, OpenVINORuntime, export_onnx
from models import Detector, build_detector, fold_detector, select_head
from pipeline.evaluation.engine_outputs import OutputReader
from pipeline.evaluation.suppression import is_nms_free, suppress_overlaps
from pipeline.networks import Networks, head_of
from pipeline.prediction.predictors import Options, open_predictor
from pipeline.run.directory import Run
from pipeline.stages.both_heads import with_other_head, without_other_head
from pipeline.stages.export import Deployed, check_export, check_outputs
from quant import Mode, activation_quantizers, place, quantized_layers, set_mode
from quant.finetuning.distillation import flatten_maps

SIZE = (64, 96)
LOWEST = 0.02
NAMES = {"names": '{"0": "a", "1": "b", "2": "c"}'}


def lively() -> Detector:
    """YOLO26-n with random weights whose scores and boxes differ from cell to cell."""
    torch.manual_seed(0)
    built = build_detector("yolo26n", 3)
    for name, module in built.network.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            if name.startswith("head.one2one_cls") and module.bias is not None:
                nn.init.constant_(module.bias, -1.0)
    return built.eval()


@pytest.fixture(scope="module")
def detector() -> Detector:
    return fold_detector(select_head(lively(), "one2one"))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def files(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The float network as a file, by form of the outputs."""
    folder = tmp_path_factory.mktemp("forms")
    module = Deployed(detector.network, detector.decode).eval()
    return {
        form: export_onnx(
            module, folder / f"{form}.onnx", SIZE, "openvino", NAMES, outputs=form, quantized=False
        ).path
        for form in ("decoded", "raw", "end2end")
    }


def in_torch(detector: Detector, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        decoded = detector(images)
    assert is_nms_free(detector.decode)
    return list(suppress_overlaps(decoded, LOWEST, None, 300))  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["decoded", "raw", "end2end"])
def test_every_engine_gives_what_torch_gives(
    detector: Detector, images: Tensor, files: dict[str, Path], form: str
) -> None:
    wanted = in_torch(detector, images)
    reader = OutputReader(form, LOWEST, None, 300)
    for runtime in (ONNXRuntime(files[form]), OpenVINORuntime(files[form], "f32")):
        with runtime as engine:
            found = reader.predictor(engine, 2)(images)
        for one, other in zip(found, wanted, strict=True):
            assert isinstance(one, Tensor)
            assert len(other) > 50
            assert one.shape == other.shape
            distance = (one[:, None] - other[None]).abs().amax(dim=2)  # near-ties may be ordered otherwise
            assert distance.amin(dim=0).max() < 2e-3
            assert distance.amin(dim=1).max() < 2e-3


def test_the_files_metadata_switches_nms_off(
    detector: Detector, images: Tensor, files: dict[str, Path], tmp_path: Path
) -> None:
    (wanted,) = in_torch(detector, images[:1])
    counts = {}
    for head in ("one2one", "one2many"):
        model = onnx.load(files["decoded"])
        model.metadata_props.add(key="octet.head", value=head)
        onnx.save(model, tmp_path / f"{head}.onnx")
        options = Options(confidence=LOWEST, iou=0.3, runtime="onnxruntime")
        predictor = open_predictor(tmp_path / f"{head}.onnx", options)
        counts[head] = len(predictor.function(images[:1])[0])  # type: ignore[arg-type]
        predictor.close()
    assert counts["one2one"] == len(wanted)
    assert counts["one2many"] < len(wanted)


def test_end_to_end_needs_a_head_without_nms(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"outputs=end2end with the head one2many.*model\.head=one2one"):
        check_outputs("end2end", "one2many")
    check_outputs("end2end", "one2one")
    run = Run(tmp_path)
    for overrides, head in (
        (["model=yolo26n"], "one2one"),
        (["model=yolo26n", "model.head=one2many"], "one2many"),
        (["model=yolo12n"], "one2many"),
    ):
        assert head_of(compose(["+experiment=demo", *overrides]), run) == head


@pytest.mark.parametrize(("outputs", "target"), [("onnx_nms", "openvino"), ("efficient_nms", "trt10")])
def test_nms_is_refused_for_a_head_that_needs_none(outputs: str, target: str) -> None:
    message = rf"outputs={outputs} with the head one2one.*outputs=end2end or decoded, or model\.head=one2many"
    with pytest.raises(ConfigError, match=message):
        check_outputs(outputs, "one2one")
    check_outputs(outputs, "one2many")
    config = compose(
        ["+experiment=demo", "model.name=yolo26n", f"deploy={target}", f"deploy.outputs={outputs}"]
    )
    job: Any = SimpleNamespace(config=config, run=Run(Path("nowhere")))
    with pytest.raises(ConfigError, match=message):
        check_export(job)


def test_fine_tuning_trains_both_heads_and_keeps_one(images: Tensor, tmp_path: Path) -> None:
    """The student answers as the quantized model does; the other head alone moves what lies before the heads."""
    config = compose(["+experiment=demo", "model=yolo26n"])
    networks = Networks(config, Run(tmp_path), None, torch.device("cpu"))  # type: ignore[arg-type]
    networks.keep(lively())
    placement = place(networks.detector.network)
    calibrated = networks.insert(placement)
    for quantizer in activation_quantizers(calibrated).values():
        quantizer.set_scale(0.02)
    for layer in quantized_layers(calibrated).values():
        layer.weight_quantizer.set_scale(layer.weight_quantizer.amax_scale(layer.weight), layer.weight)
    set_mode(calibrated, Mode.QUANTIZE)
    student, teacher, loss = with_other_head(networks, calibrated)
    raw = student(images)
    assert set(raw) == set(teacher(images)) == {"one2many", "one2one"}
    for found, wanted in zip(flatten_maps(raw["one2one"]), flatten_maps(calibrated(images)), strict=True):
        assert torch.equal(found, wanted)
    terms = loss(raw, torch.tensor([[0.0, 1, 8.0, 8.0, 56.0, 40.0]]), SIZE)
    assert {"cls", "one2one_cls"} <= set(terms)
    stem = student.get_submodule("backbone.stem1.conv").weight
    own = student.get_submodule("head.one2one_cls.0.output").weight
    assert torch.autograd.grad(terms["one2one_cls"], stem, retain_graph=True, allow_unused=True)[0] is None
    assert torch.autograd.grad(terms["one2one_cls"], own, retain_graph=True)[0].abs().sum() > 0
    assert torch.autograd.grad(terms["cls"], stem)[0].abs().sum() > 0
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.01)
        expected = student(images)["one2one"]
        shipped = without_other_head(student, calibrated)
        for found, wanted in zip(flatten_maps(shipped(images)), flatten_maps(expected), strict=True):
            assert torch.equal(found, wanted)
    assert not any("head.cls" in name or "head.box" in name for name, _ in shipped.named_parameters())
