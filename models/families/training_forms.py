"""Training-time checkpoints to their deployed form, as YOLOv9 has them; `models.families` lists the forms.

The official trainer of `yolov9-*.yaml` trains a second head on an auxiliary branch (programmable gradient information,
arXiv:2402.13616, section 4.1). Deployment keeps the main head, whose branches are called `cv4`, `cv5` and `dfl2`
next to the auxiliary `cv2`, `cv3` and `dfl`, and drops the layers that only the auxiliary head reads. Some forms also
start with a layer that does nothing, which shifts all others by one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from core.errors import CheckpointError

_CLASS_BRANCH = re.compile(r"^model\.(\d+)\.cv([35])\.0\.2\.weight$")


@dataclass(frozen=True)
class TrainingForm:
    """Where the parts of one training form lie, and where they go.

    Attributes:
        family: The networks that have it, for the log.
        head: Layer index of the head.
        deployed_head: Its index in the deployed form.
        kept: Ranges of kept layers: first, last, and how far down they move.
        auxiliary: First and last of the layers that only the auxiliary head reads, if there is one.
        branches: The main head's branches: name here -> name in the deployed form.
        auxiliary_branches: The auxiliary head's branches.
    """

    family: str
    head: int
    deployed_head: int
    kept: tuple[tuple[int, int, int], ...]
    auxiliary: tuple[int, int] | None = None
    branches: Mapping[str, str] = field(default_factory=dict)
    auxiliary_branches: frozenset[str] = frozenset()

    def deployed_key(self, key: str) -> str | None:
        """Deployed name of a key; None for the auxiliary branch. A key without a counterpart keeps its name."""
        layer, rest = _split(key)
        if layer == self.head:
            branch, dot, tail = rest.partition(".")
            if branch in self.branches:
                return f"model.{self.deployed_head}.{self.branches[branch]}{dot}{tail}"
            return None if branch in self.auxiliary_branches else f"model.{self.deployed_head}.{rest}"
        if (
            layer is not None
            and self.auxiliary is not None
            and self.auxiliary[0] <= layer <= self.auxiliary[1]
        ):
            return None
        for first, last, shift in self.kept:
            if layer is not None and first <= layer <= last:
                return f"model.{layer - shift}.{rest}"
        return key

    def training_key(self, key: str) -> str:
        """Name that a deployed key has in this form, for messages about it."""
        layer, rest = _split(key)
        if layer == self.deployed_head:
            branch, dot, tail = rest.partition(".")
            training = {deployed: name for name, deployed in self.branches.items()}
            return f"model.{self.head}.{training.get(branch, branch)}{dot}{tail}"
        for first, last, shift in self.kept:
            if layer is not None and first <= layer + shift <= last:
                return f"model.{layer + shift}.{rest}"
        return key


def _split(key: str) -> tuple[int | None, str]:
    """`model.4.cv1.weight` -> (4, `cv1.weight`); (None, key) for keys of another kind."""
    parts = key.split(".", 2)
    if len(parts) < 3 or parts[0] != "model" or not parts[1].isdigit():
        return None, key
    return int(parts[1]), parts[2]


@dataclass(frozen=True)
class Conversion:
    """A converted state dict and what became of the checkpoint's keys.

    Attributes:
        state: Keys of the deployed form.
        form: The training form that was recognised.
        dropped: Keys of the auxiliary branch.
    """

    state: dict[str, Tensor]
    form: TrainingForm
    dropped: tuple[str, ...]

    def describe(self) -> str:
        """One sentence for the log."""
        form = self.form
        if form.auxiliary is None:
            return f"checkpoint of {form.family}: all layers moved by one, {len(self.state)} tensors kept"
        first, last = form.auxiliary
        return (
            f"training checkpoint of {form.family}: kept the main head ({', '.join(form.branches)} of layer "
            f"{form.head}) and {len(self.state)} tensors, dropped the auxiliary branch (layers {first} to {last} and "
            f"{', '.join(sorted(form.auxiliary_branches))} of layer {form.head}; {len(self.dropped)} tensors)"
        )


def find_form(state: Mapping[str, Tensor], forms: Sequence[TrainingForm]) -> TrainingForm | None:
    """Which of `forms` a normalised state dict has; None for the deployed form (and for anything else).

    Raises:
        CheckpointError: If there is a double head at a layer where none of the forms has one.
    """
    branches = {(int(match[1]), match[2]) for key in state if (match := _CLASS_BRANCH.match(key))}
    is_double = any(branch == "5" for _, branch in branches)
    candidates = [form for form in forms if (form.auxiliary is not None) == is_double]
    heads = {layer for layer, branch in branches if branch == "5" or not is_double}
    found = next((form for form in candidates if form.head in heads), None)
    if is_double and candidates and found is None:
        known = ", ".join(f"{form.head} ({form.family})" for form in candidates)
        raise CheckpointError(
            f"The checkpoint has a double head at layer {min(heads)}; official training forms have it at layer {known}"
        )
    return found


def to_deployed_form(state: Mapping[str, Tensor], forms: Sequence[TrainingForm]) -> Conversion | None:
    """Convert a normalised training-time state dict; None if it has the deployed form already.

    Raises:
        CheckpointError: See `find_form`.
    """
    form = find_form(state, forms)
    if form is None:
        return None
    kept: dict[str, Tensor] = {}
    dropped = []
    for key, tensor in state.items():
        name = form.deployed_key(key)
        if name is None:
            dropped.append(key)
        else:
            kept[name] = tensor
    return Conversion(kept, form, tuple(dropped))
