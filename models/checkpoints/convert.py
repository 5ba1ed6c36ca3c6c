"""From a checkpoint's keys to this package's names, and from its shapes to an architecture.

Official YOLOv9 checkpoints number their layers (`model.4.cv2.0.m.1.cv1.conv1.conv.weight`). Each of our keys has
exactly one official counterpart, found by walking our module tree: the network's table gives the layer, each block's
`OFFICIAL_NAMES` the rest. An architecture fits when every key has its counterpart with the same shape and nothing is
left over.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn

from core.errors import CheckpointError
from core.names import listing
from models.blocks import ConvNorm, RepConvBlock
from models.detector import (
    ARCHITECTURES,
    MAX_CLASSES,
    SEGMENTATION_ARCHITECTURES,
    Detector,
    build_detector,
)
from models.families.yolov9 import YOLOv9Network
from models.folding import fold_network
from models.heads import BOX_GROUPS

_LAYER_KEY = re.compile(r"^(?:module\.|model\.)*(\d+\..+)$")
_UNDERSCORED = ("running_mean", "running_var", "num_batches_tracked")
_CLASS_BIAS = re.compile(r"^model\.(\d+)\.cv3\.0\.2\.bias$")
_OWN_CLASS_BIAS = "network.head.cls.0.output.bias"
_SEPARABLE = re.compile(r"^(?:model\.\d+\.cv3|network\.head\.cls)\.0\.(?:0\.0|conv1\.depthwise)\.")
_BOX_OUTPUT = re.compile(r"^(?:model\.\d+\.cv2|network\.head\.box)\.0\.(?:2|output)\.weight$")
_PROTOTYPES = re.compile(r"^(?:model\.\d+\.proto|network\.head\.prototypes)\.(\w+)\.")
_SECOND_REPEAT = re.compile(
    r"^(?:model\.22\.cv2\.0\.m|network\.head\.prototype_elan\.branch1\.csp\.bottlenecks)\.1\."
)
_OPTIONAL = "num_batches_tracked"


@dataclass(frozen=True)
class Match:
    """How a state dict compares with one architecture.

    Attributes:
        architecture: The candidate.
        head_style: The trainer whose head it has, a key of `models.heads.HEADS`.
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
            parts.append(f"missing: {listing(sorted(map(name, self.missing)))}")
        if self.unexpected:
            parts.append(f"left over: {listing(sorted(map(name, self.unexpected)))}")
        if self.misshapen:
            texts = (f"{name(key)} {found} instead of {shape}" for key, found, shape in self.misshapen)
            parts.append(f"of another shape: {listing(sorted(texts))}")
        return "; ".join(parts)


def normalise_key(key: str) -> str:
    """Bring an official key to the form `model.<layer>.<rest>`; ours (`network.`, `decode.`) stays as it is.

    Leading `module.` and repeated `model.` are dropped, and `_` for `.` (as `.npz` files have it) is undone:
    `model_4_cv1_bn_running_mean` -> `model.4.cv1.bn.running_mean`.
    """
    name = key
    if "." not in key:
        name = key.replace("_", ".")
        for word in _UNDERSCORED:
            name = name.replace(word.replace("_", "."), word)
    numbered = _LAYER_KEY.match(name)
    return f"model.{numbered[1]}" if numbered else name


def normalise_tensor(tensor: Tensor) -> Tensor:
    """Grouped kernels [groups, out, in, k, k] (as OpenVINO has them) become [groups * out, in, k, k]."""
    return tensor.flatten(0, 1) if tensor.ndim == 5 else tensor


def count_classes(state: Mapping[str, Tensor]) -> int | None:
    """K as the class branch's bias has it, or None if there is no such key."""
    biases = [state[key] for key in state if key == _OWN_CLASS_BIAS or _CLASS_BIAS.match(key)]
    if not biases or biases[0].ndim != 1 or not 1 <= biases[0].numel() <= MAX_CLASSES:
        return None
    return biases[0].numel()


def find_head_style(state: Mapping[str, Tensor]) -> str:
    """Which trainer's head the keys and shapes show: a key of `models.heads.HEADS` or of `SEGMENTATION_HEADS`."""
    if is_segmentation(state):
        return _find_segmentation_head(state)
    if any(_SEPARABLE.match(key) for key in state):
        return "ultralytics"
    for key, tensor in state.items():
        if _BOX_OUTPUT.match(key) and tensor.ndim == 4:
            return "official" if tensor.shape[1] * BOX_GROUPS == tensor.shape[0] else "ultralytics-legacy"
    return "official"


def is_segmentation(state: Mapping[str, Tensor]) -> bool:
    """True if there are mask prototypes."""
    return any(_PROTOTYPES.match(key) for key in state)


def _find_segmentation_head(state: Mapping[str, Tensor]) -> str:
    parts = {match[1] for key in state if (match := _PROTOTYPES.match(key))}
    if "upsample" in parts:
        return "ultralytics" if any(_SEPARABLE.match(key) for key in state) else "ultralytics-legacy"
    if "conv" in parts:
        return "deeply-branched" if any(_SECOND_REPEAT.match(key) for key in state) else "branched"
    return "official"


def is_folded(state: Mapping[str, Tensor]) -> bool:
    """True if there are no normalisation statistics."""
    return not any(key.endswith("running_mean") for key in state)


def recognise(
    state: Mapping[str, Tensor], architecture: str | None = None, name: Callable[[str], str] = str
) -> Match:
    """Find the architecture that fits a normalised state dict.

    Args:
        state: From `normalise_state`.
        architecture: Accept only this one.
        name: Gives the name that a key has in the file, for messages.

    Raises:
        CheckpointError: If none fits (with the differences to the closest), or if another than the wanted one does.
        ValueError: If `architecture` is unknown.
    """
    every = [*ARCHITECTURES, *SEGMENTATION_ARCHITECTURES]
    if architecture is not None and architecture not in every:
        raise ValueError(f"Architecture {architecture!r} is unknown; expected one of {', '.join(every)}")
    num_classes = count_classes(state)
    if num_classes is None:
        raise CheckpointError(
            "The checkpoint has no class branch of a YOLOv9 head (model.<last>.cv3.0.2.bias); its keys start with: "
            + listing(sorted(state), 6)
        )
    style = find_head_style(state)
    matches = []
    plausible = SEGMENTATION_ARCHITECTURES if is_segmentation(state) else ARCHITECTURES
    for candidate in sorted(plausible, key=lambda known: known != architecture):
        matches.append(compare(state, candidate, num_classes, style))
        if matches[-1].fits:
            break
    fitting = matches[-1] if matches[-1].fits else None
    if fitting is not None and architecture in (None, fitting.architecture):
        return fitting
    if fitting is not None:
        raise CheckpointError(
            f"The checkpoint does not fit {architecture}; its keys and shapes are those of {fitting.architecture}: "
            "choose that, or leave the choice out"
        )
    candidates = [match for match in matches if match.architecture == architecture] or matches
    closest = min(candidates, key=lambda match: match.num_differences)
    wanted = architecture or f"any known architecture; the closest is {closest.architecture}"
    raise CheckpointError(f"The checkpoint does not fit {wanted}: {closest.explain(name)}")


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
    assert isinstance(network, YOLOv9Network)
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    if folded:
        shapes = _folded_shapes(network, shapes)
    return {
        f"network.{key}": (f"model.{official_name(network, key)}", shape) for key, shape in shapes.items()
    }


def _folded_shapes(network: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes after folding, by rule: no normalisation, a bias for each block, one kernel for parallel ones."""
    blocks = {name for name, module in network.named_modules() if isinstance(module, ConvNorm)}
    parallel = {name for name, module in network.named_modules() if isinstance(module, RepConvBlock)}
    result: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes.items():
        block, _, leaf = key.rpartition(".conv.")
        if block in blocks and leaf == "weight":
            parent, _, branch = block.rpartition(".")
            if parent in parallel and branch == "pointwise":
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
