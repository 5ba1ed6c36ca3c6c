"""Training-time checkpoints of YOLOv9 to their deployed form.

The official trainer of `yolov9-*.yaml` trains a second head on an auxiliary branch (programmable gradient
information,
arXiv:2402.13616, section 4.1). Deployment keeps the main head, whose branches are called `cv4`, `cv5` and `dfl2`
beside the auxiliary `cv2`, `cv3` and `dfl`, and drops the layers that only the auxiliary head reads.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from models.errors import CheckpointError

_MAIN_CLASS_BRANCH = re.compile(r"^model\.(\d+)\.cv5\.0\.2\.weight$")
_MAIN_HEAD_NAMES = {"cv4": "cv2", "cv5": "cv3", "dfl2": "dfl"}


@dataclass(frozen=True)
class DualForm:
    """Where the auxiliary branch of one training form lies.

    Attributes:
        family: The sizes that have it, for the log.
        head: Layer index of the (double) head.
        auxiliary: Layers that only the auxiliary head reads: first and last index.
        shift_from: Kept layers from here on move ...
        shift: ... this far down, to the index they have in the single-head form.
    """

    family: str
    head: int
    auxiliary: tuple[int, int]
    shift_from: int
    shift: int

    def deployed_layer(self, layer: int) -> int | None:
        """Single-head index of a layer other than the head; None if it is dropped."""
        if self.auxiliary[0] <= layer <= self.auxiliary[1]:
            return None
        return layer - self.shift if layer >= self.shift_from else layer

    def deployed_key(self, key: str) -> str | None:
        """Single-head name of a key; None for the auxiliary branch. Keys of another kind keep their name."""
        parts = key.split(".")
        if parts[0] != "model" or len(parts) < 3 or not parts[1].isdigit():
            return key
        layer = int(parts[1])
        if layer == self.head:
            branch = _MAIN_HEAD_NAMES.get(parts[2])
            if branch is not None:
                return ".".join(("model", str(self.deployed_head), branch, *parts[3:]))
            return (
                None
                if parts[2] in _MAIN_HEAD_NAMES.values()
                else ".".join(("model", str(self.deployed_head), *parts[2:]))
            )
        deployed = self.deployed_layer(layer)
        return None if deployed is None else ".".join(("model", str(deployed), *parts[2:]))

    def training_key(self, key: str) -> str:
        """Name that a single-head key has in this training form, for messages about it."""
        head_names = {deployed: training for training, deployed in _MAIN_HEAD_NAMES.items()}
        parts = key.split(".")
        if parts[0] != "model" or len(parts) < 3 or not parts[1].isdigit():
            return key
        layer = int(parts[1])
        if layer == self.deployed_head:
            return ".".join(("model", str(self.head), head_names.get(parts[2], parts[2]), *parts[3:]))
        moved = layer + self.shift
        return ".".join(("model", str(moved if moved >= self.shift_from + self.shift else layer), *parts[2:]))

    @property
    def deployed_head(self) -> int:
        """Single-head index of the head: all dropped and silent layers are gone."""
        return {29: 22, 38: 22, 49: 42}[self.head]


DUAL_FORMS = {
    form.head: form
    for form in (
        DualForm("yolov9-t and -s", head=29, auxiliary=(22, 28), shift_from=22, shift=7),
        DualForm("yolov9-m and -c", head=38, auxiliary=(23, 37), shift_from=1, shift=1),
        DualForm("yolov9-e", head=49, auxiliary=(29, 35), shift_from=29, shift=7),
    )
}


@dataclass(frozen=True)
class Conversion:
    """A converted state dict and what became of the checkpoint's keys.

    Attributes:
        state: Keys of the single-head form.
        form: The training form that was recognised.
        dropped: Keys of the auxiliary branch.
    """

    state: dict[str, Tensor]
    form: DualForm
    dropped: tuple[str, ...]

    def describe(self) -> str:
        """One sentence for the log."""
        first, last = self.form.auxiliary
        return (
            f"training checkpoint of {self.form.family}: kept the main head (cv4, cv5 of layer {self.form.head}) and "
            f"{len(self.state)} tensors, dropped the auxiliary branch (layers {first} to {last} and cv2, cv3 of layer "
            f"{self.form.head}; {len(self.dropped)} tensors)"
        )


def find_dual_head(state: Mapping[str, Tensor]) -> int | None:
    """Layer index of a double head, or None for a single-head (or any other) checkpoint."""
    return next((int(match[1]) for key in state if (match := _MAIN_CLASS_BRANCH.match(key))), None)


def to_single_head(state: Mapping[str, Tensor]) -> Conversion | None:
    """Convert a normalised training-time state dict; None if it has no double head.

    Raises:
        CheckpointError: If there is a double head at a layer where no official network has one.
    """
    head = find_dual_head(state)
    if head is None:
        return None
    form = DUAL_FORMS.get(head)
    if form is None:
        raise CheckpointError(
            f"The checkpoint has a double head at layer {head}; the official training forms have it at "
            + ", ".join(f"{known.head} ({known.family})" for known in DUAL_FORMS.values())
        )
    kept: dict[str, Tensor] = {}
    dropped = []
    for key, tensor in state.items():
        name = form.deployed_key(key)
        if name is None:
            dropped.append(key)
        else:
            kept[name] = tensor
    return Conversion(kept, form, tuple(dropped))
