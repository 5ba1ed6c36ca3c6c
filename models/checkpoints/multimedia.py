"""YOLOv9 weights of MultimediaTechLab/YOLO (MIT licence): their key names, and the official ones for the same tensors.

Layers 0 to 21 are those of the official single-head form. Layer 22 is the main head, all later layers belong to the
auxiliary branch, which is left out.
"""

import re
from collections.abc import Iterable

MAIN_HEAD = 22
_HEAD = re.compile(rf"^model\.{MAIN_HEAD}\.heads\.\d+\.class_conv\.")
_LAYER = re.compile(r"^model\.(\d+)\.(.+)$")
_BRANCH = re.compile(r"^heads\.(\d+)\.(anchor_conv|class_conv)\.(.+)$")
_PROJECTION = re.compile(r"^heads\.(\d+)\.anc2vec\.anc2vec\.weight$")
_PART = re.compile(r"\bconv(\d)(?=\.)")
_ONLY_PART = re.compile(r"^conv\.(?=conv\.|bn\.)")
_RESIDUAL = re.compile(r"\bbottleneck\.(\d+)\.conv(\d)\.")
_BRANCHES = {"anchor_conv": "cv2", "class_conv": "cv3"}


def has_multimedia_names(keys: Iterable[str]) -> bool:
    """Whether normalised keys are named as MultimediaTechLab/YOLO names them."""
    return any(_HEAD.match(key) for key in keys)


def official_key(key: str) -> str | None:
    """The official name for a normalised key; None for one of the auxiliary branch.

    Example: `model.4.conv2.0.bottleneck.1.conv1.conv2.bn.bias` -> `model.4.cv2.0.m.1.cv1.conv2.bn.bias`.
    """
    found = _LAYER.match(key)
    if found is None:
        return key
    layer, rest = int(found[1]), found[2]
    if layer > MAIN_HEAD:
        return None
    if layer == MAIN_HEAD:
        rest = _BRANCH.sub(lambda match: f"{_BRANCHES[match[2]]}.{match[1]}.{match[3]}", rest)
        return f"model.{layer}.{_PROJECTION.sub(lambda match: f'{match[1]}.dfl.conv.weight', rest)}"
    head, residual, tail = _split_residual(_ONLY_PART.sub("cv1.", rest))
    return f"model.{layer}.{_PART.sub(lambda match: f'cv{match[1]}', head)}{residual}{tail}"


def _split_residual(rest: str) -> tuple[str, str, str]:
    """Up to a residual block, the block and its part under their official names, and what is inside of the part."""
    found = _RESIDUAL.search(rest)
    if found is None:
        return rest, "", ""
    return rest[: found.start()], f"m.{found[1]}.cv{found[2]}.", rest[found.end() :]
