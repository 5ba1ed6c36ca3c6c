"""Networks that are not loaded, by name: what a checkpoint is that fits none of ours.

A network is known by keys that no other has, or by the class of a pickled model. The order matters: the first entry
that matches names the checkpoint. Keys are normalised ones.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from core.families import FAMILIES
from core.names import listing

MAX_KEYS_SHOWN = 5


@dataclass(frozen=True)
class Foreign:
    """A network that is not loaded.

    Attributes:
        name: What it is, for the message.
        keys: Matches a key that only this network has.
        classes: Ends of the class names of a pickled model, in lower case.
    """

    name: str
    keys: re.Pattern[str] | None = None
    classes: tuple[str, ...] = ()


POSE = "a pose (keypoint) network"
OBB = "an OBB (oriented box) network"


def _keys(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


FOREIGN = (
    Foreign(POSE, classes=("posemodel",)),
    Foreign(OBB, classes=("obbmodel",)),
    Foreign("a classification network", _keys(r"^model\.\d+\.linear\.weight$"), ("classificationmodel",)),
    Foreign("YOLO-World", _keys(r"^model\.\d+\.cv4\.\d+\.(logit_scale|norm\.)"), ("worldmodel",)),
    Foreign("YOLOE", _keys(r"^model\.\d+\.(savpe|reprta)\."), ("yoloemodel", "yoloesegmodel")),
    Foreign(
        "RT-DETR",
        _keys(r"(^|\.)(enc_score_head|dec_score_head)\.|^backbone\.res_layers\."),
        ("rtdetrdetectionmodel",),
    ),
    Foreign("YOLOv7", _keys(r"^model\.\d+\.(ia|im)\.\d+\.implicit$")),
    Foreign("an anchor-based YOLO (v3, v4, v5 without u, v7)", _keys(r"^model\.\d+\.(m\.\d+\.weight|anchors)$")),
    Foreign("YOLOX", _keys(r"^backbone\.backbone\.dark\d|^head\.cls_preds\.")),
    Foreign("YOLOv6", _keys(r"^backbone\.ERBlock_\d|^detect\.cls_preds\.")),
    Foreign("YOLO-NAS", _keys(r"^heads\.head\d\.|^backbone\.stage\d\.blocks\.")),
    Foreign("a network of MMDetection or MMYOLO", _keys(r"^bbox_head\.|^rpn_head\.|^roi_head\.")),
    Foreign("a detector of torchvision", _keys(r"^backbone\.body\.|^roi_heads\.|^head\.classification_head\.")),
    Foreign("a detector of Detectron2", _keys(r"^proposal_generator\.|^backbone\.bottom_up\.")),
    Foreign("a DETR network", _keys(r"(^|\.)transformer\.(encoder|decoder)\.|^class_embed\.|(^|\.)query_embed")),
    Foreign("a language model", _keys(r"(^|\.)(embed_tokens|lm_head|wte)\.weight$")),
    Foreign("a diffusion model", _keys(r"^(model\.diffusion_model|down_blocks|mid_block)\.")),
    Foreign("a vision transformer", _keys(r"(^|\.)(cls_token|patch_embed\.proj\.weight)$")),
    Foreign("a ResNet classifier", _keys(r"^(module\.)?layer[1-4]\.\d+\.conv1\.weight$")),
)  # fmt: skip
_FOURTH_BRANCH = re.compile(r"^model\.\d+\.cv4\.0\.2\.bias$")
_MASKS_OR_DOUBLE_HEAD = re.compile(r"^model\.\d+\.(proto|cv5)\.")


def name_foreign(state: Mapping[str, Tensor], model_class: str | None) -> str | None:
    """What a checkpoint is that fits no family; None if that is not known.

    Args:
        state: With normalised keys.
        model_class: Class of the pickled model, if it is one.
    """
    ending = (model_class or "").rpartition(".")[2].lower()
    for foreign in FOREIGN:
        pattern = foreign.keys
        if ending in foreign.classes or (pattern is not None and any(pattern.search(key) for key in state)):
            return foreign.name
    if any(_MASKS_OR_DOUBLE_HEAD.match(key) for key in state):
        return None
    for key, tensor in state.items():  # a fourth branch: one angle, or three numbers for each keypoint
        if _FOURTH_BRANCH.match(key):
            return OBB if tensor.numel() == 1 else POSE
    return None


def supported() -> str:
    """What is loaded, for messages."""
    detectors = ", ".join(family.name for family in FAMILIES)
    segmenters = ", ".join(family.name for family in FAMILIES if family.segmenters)
    return (
        f"loaded are {detectors} (detection) and {segmenters} (segmentation); for another network see model=custom in "
        "docs/custom.md"
    )


def describe_unknown(keys: Iterable[str], closest: str | None, num_differences: int) -> str:
    """A sentence for a checkpoint of which nothing is known but its keys, and how far the closest network is."""
    near = "" if closest is None else f" (the closest, {closest}, differs in {num_differences} keys)"
    return (
        f"The checkpoint is of no network that is known{near}; its keys start with "
        f"{listing(sorted(keys), MAX_KEYS_SHOWN)}; {supported()}"
    )
