"""From a checkpoint's keys to this package's names, and from its shapes to an architecture.

Official checkpoints number their layers (`model.4.cv2.0.m.1.cv1.conv1.conv.weight`). Each of our keys has
exactly one official counterpart, found by walking our module tree: the network's table gives the layer, each block's
`OFFICIAL_NAMES` the rest. An architecture fits when every key has its counterpart with the same shape and nothing is
left over.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn

from core.families import FamilyEntry
from core.names import listing
from models.blocks import ConvNorm, RepConvBlock
from models.checkpoints.foreign import MAX_KEYS_SHOWN
from models.detector import MAX_CLASSES, Detector, build_detector
from models.families.family import Family
from models.families.registry import load_family
from models.folding import fold_network

_LAYER_KEY = re.compile(r"^(?:module\.|model\.)*(\d+\..+)$")
_UNDERSCORED = ("running_mean", "running_var", "num_batches_tracked")
CLASS_BIASES = ("network.head.cls.0.output.bias", "network.head.one2one_cls.0.output.bias")
_OPTIONAL = "num_batches_tracked"
COMPILED_PREFIX = "_orig_mod."  # what torch.compile puts before the names of what it wraps
PROFILER_BUFFERS = ("total_ops", "total_params")  # what the profiler thop leaves in each module


@dataclass(frozen=True)
class Match:
    """How a state dict compares with one architecture.

    Attributes:
        architecture: The candidate.
        head_style: The trainer whose head it has, a key of the family's heads.
        folded: Whether it was compared in folded form.
        keys: Our state-dict key -> the checkpoint's key, for what agrees.
        missing: Checkpoint keys that the architecture needs and that are absent.
        unexpected: Checkpoint keys that the architecture has no place for.
        misshapen: Key, found shape and expected shape.
    """

    architecture: str
    head_style: str
    folded: bool
    keys: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()

    @property
    def fits(self) -> bool:
        """True if nothing is missing, left over, or of another shape."""
        return not (self.missing or self.unexpected or self.misshapen)

    @property
    def num_differences(self) -> int:
        """How far it is from fitting."""
        return len(self.missing) + len(self.unexpected) + len(self.misshapen)

    def explain(self, name: Callable[[str], str] = str) -> str:
        """The differences, for a message; `name` gives the name that a key has in the file."""
        parts = []
        if self.missing:
            parts.append(f"missing: {listing(sorted(map(name, self.missing)), MAX_KEYS_SHOWN)}")
        if self.unexpected:
            parts.append(f"left over: {listing(sorted(map(name, self.unexpected)), MAX_KEYS_SHOWN)}")
        if self.misshapen:
            texts = (f"{name(key)} {found} instead of {shape}" for key, found, shape in self.misshapen)
            parts.append(f"of another shape: {listing(sorted(texts), MAX_KEYS_SHOWN)}")
        return "; ".join(parts)


def normalise_key(key: str) -> str:
    """Bring an official key to the form `model.<layer>.<rest>`; ours (`network.`, `decode.`) stays as it is.

    `_orig_mod.`, leading `module.` and repeated `model.` are dropped, and `_` for `.` (as `.npz` files have it) is
    undone: `model_4_cv1_bn_running_mean` -> `model.4.cv1.bn.running_mean`.
    """
    name = key.replace(COMPILED_PREFIX, "")
    if name.startswith("module.network."):
        name = name.removeprefix("module.")
    if "." not in key:
        name = key.replace("_", ".")
        for word in _UNDERSCORED:
            name = name.replace(word.replace("_", "."), word)
    numbered = _LAYER_KEY.match(name)
    return f"model.{numbered[1]}" if numbered else name


def normalise_tensor(tensor: Tensor) -> Tensor:
    """Grouped kernels [groups, out, in, k, k] (as OpenVINO has them) become [groups * out, in, k, k]."""
    return tensor.flatten(0, 1) if tensor.ndim == 5 else tensor


def count_classes(state: Mapping[str, Tensor], family: Family) -> int | None:
    """K as the class branch's bias has it, or None if there is no such key."""
    biases = [state[key] for key in state if key in CLASS_BIASES or family.class_bias.match(key)]
    if not biases or biases[0].ndim != 1 or not 1 <= biases[0].numel() <= MAX_CLASSES:
        return None
    return biases[0].numel()


def is_folded(state: Mapping[str, Tensor]) -> bool:
    """True if there are no normalisation statistics."""
    return not any(key.endswith("running_mean") for key in state)


def recognise(
    state: Mapping[str, Tensor], entry: FamilyEntry, architecture: str | None = None
) -> Match | None:
    """The architecture of a family that fits a normalised state dict, else the closest one; None if it has no head.

    Args:
        state: With normalised keys, in deployed form.
        entry: The family.
        architecture: Tried first, and closest if none fits.
    """
    family = load_family(entry)
    num_classes = count_classes(state, family)
    if num_classes is None:
        return None
    style = family.find_head_style(state)
    matches = []
    plausible = entry.segmenters if family.has_masks(state) else entry.detectors
    for candidate in sorted(plausible, key=lambda known: known != architecture):
        matches.append(compare(state, candidate, num_classes, style))
        if matches[-1].fits:
            return matches[-1]
    wanted = [match for match in matches if match.architecture == architecture]
    return min(wanted or matches, key=lambda match: match.num_differences, default=None)


def compare(
    state: Mapping[str, Tensor], architecture: str, num_classes: int, style: str = "official"
) -> Match:
    """Compare a normalised state dict with one architecture, by names and shapes."""
    folded = is_folded(state)
    own = any(key.startswith("network.") for key in state)
    keys, missing, misshapen = {}, [], []
    expected = _signature(architecture, num_classes, style, folded)
    wanted = {}
    for ours, (official, shape) in expected.items():
        theirs = ours if own else official
        wanted[theirs] = shape
        if theirs not in state:
            if not theirs.endswith(_OPTIONAL):
                missing.append(theirs)
        elif tuple(state[theirs].shape) != shape:
            misshapen.append((theirs, tuple(state[theirs].shape), shape))
        else:
            keys[ours] = theirs
    unexpected = tuple(key for key in state if key not in wanted)
    return Match(architecture, style, folded, keys, tuple(missing), unexpected, tuple(misshapen))


@lru_cache(maxsize=64)
def _signature(
    architecture: str, num_classes: int, style: str, folded: bool
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our key -> (official key, shape) for one architecture."""
    network = build_empty(architecture, num_classes, "silu", folded=False, head_style=style).network
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    if folded:
        shapes = _folded_shapes(network, shapes)
    return {
        f"network.{key}": (f"model.{official_name(network, key)}", shape) for key, shape in shapes.items()
    }


def _folded_shapes(network: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes after folding, by rule: no normalisation, a bias for each block, one kernel for parallel ones."""
    blocks = {name for name, module in network.named_modules() if isinstance(module, ConvNorm)}
    parallel = {
        name: module.BRANCHES for name, module in network.named_modules() if isinstance(module, RepConvBlock)
    }
    result: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes.items():
        block, _, leaf = key.rpartition(".conv.")
        if block in blocks and leaf == "weight":
            parent, _, branch = block.rpartition(".")
            if parent in parallel and branch == parallel[parent][1]:
                continue
            owner = parent if parent in parallel else block
            result[f"{owner}.conv.weight"], result[f"{owner}.conv.bias"] = shape, shape[:1]
        elif key.rpartition(".bn.")[0] not in blocks:
            result[key] = shape
    return result


def build_empty(
    architecture: str, num_classes: int, activation: str, folded: bool, head_style: str = "official"
) -> Detector:
    """A detector on the meta device: all shapes, no numbers."""
    with torch.device("meta"):
        detector = build_detector(architecture, num_classes, activation, head_style=head_style)
        if folded:
            fold_network(detector.network)
            detector.folded = True
    return detector


def official_name(network: nn.Module, key: str) -> str:
    """Official name, without the leading `model.`, of one key or module path of `network`."""
    layers = cast(dict[str, int], network.official_layers)
    layer = next(name for name in layers if key == name or key.startswith(name + "."))
    parts = [str(layers[layer])]
    module: nn.Module = network.get_submodule(layer)
    rest = key[len(layer) + 1 :].split(".") if len(key) > len(layer) else []
    for part in rest:
        parts.append(_official_part(module, part))
        module = dict(module.named_children()).get(part, module)
    return ".".join(parts)


def _official_part(module: nn.Module, part: str) -> str:
    names: dict[str, str] = getattr(module, "OFFICIAL_NAMES", {})
    return next((official for official, ours in names.items() if ours == part), part)
