"""Placement of the mask branch of segmentation heads, written down by hand from the rules for the detection head."""

import pytest
import torch
from quant_networks import groups_of
from torch import nn

from models import build_detector, fold_detector
from models.folding import fold_network
from models.segmentation import SegmentationHead
from quant import insert, place, quantized_layers


class TwoLevels(nn.Module):
    """Image -> features at two strides -> the head of `gelan-c-seg`."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), nn.SiLU())
        self.coarse = nn.Sequential(nn.Conv2d(64, 64, 3, 2, 1), nn.SiLU())
        self.head = SegmentationHead((64, 64), 3, (2, 4), "silu")

    def forward(self, x):
        fine = self.fine(x)
        return self.head((fine, self.coarse(fine)))


def test_plain_head():
    network = TwoLevels().eval()
    fold_network(network)
    placement = place(network)
    branches = ("box", "cls", "mask")
    last = [f"head.{branch}.{level}.output" for level in range(2) for branch in branches]
    last.append("head.prototypes.output.conv")  # only its activation is between it and the output
    assert placement.kept_float == dict.fromkeys(last, "its result leaves the network")
    expected = {
        "input.x": ({"input.x": ("fine_0",)}, ("fine.0",)),
        # everything that reads the finest feature shares its scale: next level, three branches, prototypes
        "fine.1": (
            {
                "fine.1": (
                    "coarse_0", "head_box_0_conv1_conv", "head_cls_0_conv1_conv", "head_mask_0_conv1_conv",
                    "head_prototypes_conv1_conv",
                )
            },
            (
                "coarse.0", "head.box.0.conv1.conv", "head.cls.0.conv1.conv", "head.mask.0.conv1.conv",
                "head.prototypes.conv1.conv",
            ),
        ),
        "coarse.1": (
            {"coarse.1": ("head_box_1_conv1_conv", "head_cls_1_conv1_conv", "head_mask_1_conv1_conv")},
            ("head.box.1.conv1.conv", "head.cls.1.conv1.conv", "head.mask.1.conv1.conv"),
        ),
        # the enlargement is transparent: quantized before it, read behind it
        "head.prototypes.conv1.act": (
            {"head.prototypes.conv1.act": ("head_prototypes_upsample",)},
            ("head.prototypes.conv2.conv",),
        ),
    }  # fmt: skip
    for branch in branches:
        for level in range(2):
            path = f"head.{branch}.{level}"
            tensor = {f"{path}.conv1.act": (f"{path.replace('.', '_')}_conv2_conv",)}
            expected[f"{path}.conv1.act"] = (tensor, (f"{path}.conv2.conv",))
    assert groups_of(placement) == expected


@pytest.mark.parametrize(
    ("architecture", "style"),
    [
        ("yolov9t-seg", "official"),
        ("yolov9c-seg", "official"),
        ("yolov9c-seg", "branched"),
        ("yolov9c-seg", "ultralytics"),
        ("yolov9e-seg", "official"),
    ],
)
def test_whole_networks_keep_only_what_leaves_them(architecture, style):
    with torch.device("meta"):
        network = fold_detector(build_detector(architecture, 3, head_style=style)).network
    placement = place(network)
    leaving = {name: reason for name, reason in placement.kept_float.items() if "leaves" in reason}
    last = {f"head.{b}.{i}.output" for b in ("box", "cls", "mask") for i in range(3)}
    prototypes = "head.prototypes.conv" if style == "branched" else "head.prototypes.output.conv"
    assert set(leaving) == {*last, prototypes}
    layers = quantized_layers(insert(network, placement))
    assert {name for name in layers if name.startswith("head.mask.0")} == {
        "head.mask.0.conv1.conv",
        "head.mask.0.conv2.conv",
    }
    owner = {layer: group.name for group in placement.groups for layer in group.layers}
    for level in range(3):
        firsts = [f"head.{branch}.{level}.conv1.conv" for branch in ("box", "mask")]
        assert len({owner[first] for first in firsts}) == 1
