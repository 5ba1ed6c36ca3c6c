"""The detectors of torchvision in examples/, against torchvision itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_convert, box_iou

from examples import retinanet, ssdlite

NAMES = ("cat", "dog")


def test_ssdlite_decodes_as_torchvision_does() -> None:
    torch.manual_seed(0)
    parts = ssdlite.build(NAMES)
    model = parts.loss.model.eval()  # type: ignore[union-attr]
    for module in model.head.modules():  # offsets and logits that matter: those of the start are nearly 0
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias)
            nn.init.normal_(module.weight, std=100.0)
    images = torch.rand(2, 3, 96, 96)
    with torch.inference_mode():
        decoded = parts.decode(parts.network.eval()(images))  # type: ignore[misc]
        features = list(model.backbone(images * 2 - 1).values())
        outputs = model.head(features)
        anchors = model.anchor_generator(ImageList(images, [(96, 96)] * 2), features)
        for number in range(2):
            boxes = model.box_coder.decode_single(outputs["bbox_regression"][number], anchors[number])
            scores = outputs["cls_logits"][number].softmax(-1)[:, 1:]
            assert outputs["bbox_regression"][number].std() > 0.5
            found = box_convert(decoded[number, :4].T, "cxcywh", "xyxy")
            assert torch.allclose(found, boxes, atol=1e-3)
            assert torch.allclose(decoded[number, 4:].T, scores, atol=1e-6)


def test_retinanet_decodes_and_learns_as_torchvision_does() -> None:
    torch.manual_seed(0)
    parts = retinanet.build(NAMES)
    model = parts.loss.model.eval()  # type: ignore[union-attr]
    for module in (model.head.classification_head.cls_logits, model.head.regression_head.bbox_reg):
        nn.init.normal_(
            module.weight, std=30.0
        )  # offsets and logits that matter: those of the start are nearly 0
    images = torch.rand(2, 3, 96, 64)
    targets = torch.tensor([[0, 1, 8.0, 8, 40, 44], [0, 0, 20.0, 60, 60, 90]])
    truth = [
        {"boxes": targets[:, 2:], "labels": targets[:, 1].long()},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
    ]
    with torch.inference_mode():
        maps = parts.network.eval()(images)
        decoded = parts.decode(maps)  # type: ignore[misc]
        features = model.backbone(images)
        outputs = model.head(features)
        anchors = model.anchor_generator(ImageList(images, [(96, 64)] * 2), features)
        for number in range(2):
            boxes = model.box_coder.decode_single(outputs["bbox_regression"][number], anchors[number])
            assert outputs["bbox_regression"][number].std() > 0.1
            found = box_convert(decoded[number, :4].T, "cxcywh", "xyxy")
            assert torch.allclose(found, boxes, atol=1e-3)
            scores = outputs["cls_logits"][number].sigmoid()
            assert torch.allclose(decoded[number, 4:].T, scores, atol=1e-6)
        terms = parts.loss(maps, targets, (96, 64))  # type: ignore[misc]
        expected = model.head.compute_loss(
            truth,
            outputs,
            anchors,
            [
                model.proposal_matcher(box_iou(truth[0]["boxes"], anchors[0])),
                torch.full((len(anchors[1]),), -1),
            ],
        )
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(
        {name: float(term) for name, term in expected.items()}, rel=1e-5
    )


# -- where factories are looked for
