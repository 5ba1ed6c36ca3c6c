"""YOLOv9 as a family: its architectures, the heads that its trainers gave it, and their checkpoints."""

import re
from collections.abc import Mapping

from torch import Tensor

from models.families.family import PROTOTYPES, Family
from models.families.pyramid import STRIDES
from models.families.training_forms import TrainingForm
from models.families.yolov9 import yolov9c, yolov9m, yolov9s, yolov9t
from models.families.yolov9e import yolov9e
from models.heads import BOX_GROUPS, HEADS
from models.segmentation import SEGMENTATION_HEADS

_SEPARABLE = re.compile(r"^(?:model\.\d+\.cv3|network\.head\.cls)\.0\.(?:0\.0|conv1\.depthwise)\.")
_BOX_OUTPUT = re.compile(r"^(?:model\.\d+\.cv2|network\.head\.box)\.0\.(?:2|output)\.weight$")
_SECOND_REPEAT = re.compile(
    r"^(?:model\.22\.cv2\.0\.m|network\.head\.prototype_elan\.branch1\.csp\.bottlenecks)\.1\."
)


def _find_head_style(state: Mapping[str, Tensor]) -> str:
    parts = {match[1] for key in state if (match := PROTOTYPES.match(key))}
    if "conv" in parts:
        return "deeply-branched" if any(_SECOND_REPEAT.match(key) for key in state) else "branched"
    if parts and "upsample" not in parts:
        return "official"
    if any(_SEPARABLE.match(key) for key in state):
        return "ultralytics"
    if parts:
        return "ultralytics-legacy"
    for key, tensor in state.items():
        if _BOX_OUTPUT.match(key) and tensor.ndim == 4:
            return "official" if tensor.shape[1] * BOX_GROUPS == tensor.shape[0] else "ultralytics-legacy"
    return "official"


_DETECTION = {"cv4": "cv2", "cv5": "cv3", "dfl2": "dfl"}
_SEGMENTATION = {**_DETECTION, "cv7": "cv4", "proto2": "proto"}
_AUXILIARY_DETECTION = frozenset({"cv2", "cv3", "dfl"})
_AUXILIARY_SEGMENTATION = _AUXILIARY_DETECTION | {"cv6", "proto"}

YOLOV9 = Family(
    builders={
        "yolov9t": yolov9t,
        "yolov9s": yolov9s,
        "yolov9m": yolov9m,
        "yolov9c": yolov9c,
        "yolov9e": yolov9e,
        "yolov9t-seg": yolov9t,
        "yolov9c-seg": yolov9c,
        "yolov9e-seg": yolov9e,
    },
    strides=STRIDES,
    heads=HEADS,
    segmentation_heads=SEGMENTATION_HEADS,
    class_bias=re.compile(r"^model\.\d+\.cv3\.0\.2\.bias$"),
    find_head_style=_find_head_style,
    training_forms=(
        TrainingForm("yolov9-t and -s", 29, 22, ((0, 21, 0),), (22, 28), _DETECTION, _AUXILIARY_DETECTION),
        TrainingForm("yolov9-m and -c", 38, 22, ((1, 22, 1),), (23, 37), _DETECTION, _AUXILIARY_DETECTION),
        TrainingForm(
            "yolov9-e", 49, 42, ((1, 28, 0), (36, 48, 7)), (29, 35), _DETECTION, _AUXILIARY_DETECTION
        ),
        TrainingForm(
            "yolov9-c-dseg",
            44,
            25,
            ((1, 22, 1), (41, 43, 19)),
            (23, 40),
            _SEGMENTATION,
            _AUXILIARY_SEGMENTATION,
        ),
        TrainingForm("yolov9-c-seg", 23, 22, ((1, 22, 1),)),
    ),
)
