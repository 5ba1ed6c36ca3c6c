"""From a checkpoint's keys to this package's names, and from its shapes to an architecture.

Official YOLOv9 checkpoints number their layers (`model.4.cv2.0.m.1.cv1.conv1.conv.weight`). Each of our keys has
exactly one official counterpart, found by walking our module tree: the network's table gives the layer, each block's
`OFFICIAL_NAMES` the rest. An architecture fits when every key has its counterpart with the same shape and nothing is
left over.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn

from models.archive import sorted_sample
from models.detector import ARCHITECTURES, MAX_CLASSES, Detector, build_detector
from models.errors import CheckpointError
from models.folding import fold_network
from models.yolov9 import YOLOv9Network

_LAYER_KEY = re.compile(r"^(?:module\.|model\.)*(\d+\..+)$")
_UNDERSCORED = ("running_mean", "running_var", "num_batches_tracked")
_CLASS_BIAS = re.compile(r"^model\.(\d+)\.cv3\.0\.2\.bias$")
_OWN_CLASS_BIAS = "network.head.cls.0.output.bias"
_OPTIONAL = "num_batches_tracked"


@dataclass(frozen=True)
class Match:
    """How a state dict compares with one architecture.

    Attributes:
        architecture: The candidate.
        folded: Whether it was compared in folded form.
        keys: Our state-dict key -> the checkpoint's key, for what agrees.
        missing: Checkpoint keys that the architecture needs and that are absent.
        unexpected: Checkpoint keys that the architecture has no place for.
        misshapen: Key, found shape and expected shape, as text.
    """

    architecture: str
    folded: bool
    keys: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """True if nothing is missing, left over, or of another shape."""
        return not (self.missing or self.unexpected or self.misshapen)

    @property
    def num_differences(self) -> int:
        """How far it is from fitting."""
        return len(self.missing) + len(self.unexpected) + len(self.misshapen)

    def explain(self) -> str:
        """The differences, for a message."""
        parts = []
        if self.missing:
            parts.append(f"missing: {sorted_sample(self.missing)}")
        if self.unexpected:
            parts.append(f"left over: {sorted_sample(self.unexpected)}")
        if self.misshapen:
            parts.append(f"of another shape: {sorted_sample(self.misshapen)}")
        return "; ".join(parts)


def normalise_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring an official state dict to the form `model.<layer>.<rest>`; ours (`network.`, `decode.`) stays as it is.

    Leading `module.` and repeated `model.` are dropped, `_` for `.` (as `.npz` files have it) is undone, and grouped
    kernels [groups, out, in, k, k] (as OpenVINO has them) become [groups * out, in, k, k].
    """
    result = {}
    for key, tensor in state.items():
        name = key
        if "." not in key:
            name = key.replace("_", ".")
            for word in _UNDERSCORED:
                name = name.replace(word.replace("_", "."), word)
        numbered = _LAYER_KEY.match(name)
        result[f"model.{numbered[1]}" if numbered else name] = (
            tensor.flatten(0, 1) if tensor.ndim == 5 else tensor
        )
    return result


def count_classes(state: Mapping[str, Tensor]) -> int | None:
    """K as the class branch's bias has it, or None if there is no such key."""
    biases = [state[key] for key in state if key == _OWN_CLASS_BIAS or _CLASS_BIAS.match(key)]
    if not biases or biases[0].ndim != 1 or not 1 <= biases[0].numel() <= MAX_CLASSES:
        return None
    return biases[0].numel()


def is_folded(state: Mapping[str, Tensor]) -> bool:
    """True if there are no normalisation statistics."""
    return not any(key.endswith("running_mean") for key in state)


def recognise(state: Mapping[str, Tensor], architecture: str | None = None) -> Match:
    """Find the architecture that fits a normalised state dict.

    Args:
        state: From `normalise_state`.
        architecture: Accept only this one.

    Raises:
        CheckpointError: If none fits (with the differences to the closest), or if another than the wanted one does.
        ValueError: If `architecture` is unknown.
    """
    if architecture is not None and architecture not in ARCHITECTURES:
        raise ValueError(
            f"Architecture {architecture!r} is unknown; expected one of {', '.join(ARCHITECTURES)}"
        )
    num_classes = count_classes(state)
    if num_classes is None:
        raise CheckpointError(
            "The checkpoint has no class branch of a YOLOv9 head (model.<last>.cv3.0.2.bias); its keys start with: "
            + sorted_sample(state, 6)
        )
    matches = [compare(state, name, num_classes) for name in ARCHITECTURES]
    fitting = next((match for match in matches if match.fits), None)
    if architecture is None and fitting is not None:
        return fitting
    if fitting is not None and fitting.architecture == architecture:
        return fitting
    if fitting is not None:
        raise CheckpointError(
            f"The checkpoint does not fit {architecture}; its keys and shapes are those of {fitting.architecture}: "
            "choose that, or leave the choice out"
        )
    candidates = [match for match in matches if architecture in (None, match.architecture)]
    closest = min(candidates, key=lambda match: match.num_differences)
    wanted = architecture or f"any known architecture; the closest is {closest.architecture}"
    raise CheckpointError(f"The checkpoint does not fit {wanted}: {closest.explain()}")


def compare(state: Mapping[str, Tensor], architecture: str, num_classes: int) -> Match:
    """Compare a normalised state dict with one architecture, by names and shapes."""
    folded = is_folded(state)
    own = any(key.startswith("network.") for key in state)
    keys, missing, misshapen = {}, [], []
    expected = _signature(architecture, num_classes, folded)
    wanted = {}
    for ours, (official, shape) in expected.items():
        theirs = ours if own else official
        wanted[theirs] = shape
        if theirs not in state:
            if not theirs.endswith(_OPTIONAL):
                missing.append(theirs)
        elif tuple(state[theirs].shape) != shape:
            misshapen.append(f"{theirs} {tuple(state[theirs].shape)} instead of {shape}")
        else:
            keys[ours] = theirs
    unexpected = tuple(key for key in state if key not in wanted)
    return Match(architecture, folded, keys, tuple(missing), unexpected, tuple(misshapen))


@lru_cache(maxsize=64)
def _signature(architecture: str, num_classes: int, folded: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our key -> (official key, official shape) for one architecture."""
    detector = build_empty(architecture, num_classes, "silu", folded)
    network = detector.network
    assert isinstance(network, YOLOv9Network)
    names = official_keys(network)
    result = {
        f"network.{key}": (names[key], tuple(tensor.shape)) for key, tensor in network.state_dict().items()
    }
    return result


def build_empty(architecture: str, num_classes: int, activation: str, folded: bool) -> Detector:
    """A detector on the meta device: all shapes, no numbers."""
    with torch.device("meta"):
        detector = build_detector(architecture, num_classes, activation)
        if folded:
            fold_network(detector.network)
            detector.folded = True
    return detector


def official_keys(network: YOLOv9Network, prefix: str = "model") -> dict[str, str]:
    """Map every state-dict key of `network` to its name in an official single-head checkpoint.

    Example:
        `backbone.stage3.branch1.csp.entry.conv.weight` -> `model.4.cv2.0.cv1.conv.weight`.
    """
    return {key: f"{prefix}.{official_name(network, key)}" for key in network.state_dict()}


def official_name(network: YOLOv9Network, key: str) -> str:
    """Official name, without the leading `model.`, of one key or module path of `network`."""
    layer = next(name for name in network.official_layers if key == name or key.startswith(name + "."))
    parts = [str(network.official_layers[layer])]
    module: nn.Module = network.get_submodule(layer)
    rest = key[len(layer) + 1 :].split(".") if len(key) > len(layer) else []
    for part in rest:
        parts.append(_official_part(module, part))
        module = dict(module.named_children()).get(part, module)
    return ".".join(parts)


def _official_part(module: nn.Module, part: str) -> str:
    names: dict[str, str] = getattr(module, "OFFICIAL_NAMES", {})
    return next((official for official, ours in names.items() if ours == part), part)
