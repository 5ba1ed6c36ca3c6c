"""What a checkpoint's tensors mean: which network, which of its keys, which quantizer ranges.

Three steps, each undone in the messages so that they name keys as the file does: bring the keys to one form, set the
quantizers' ranges apart, drop the auxiliary branch of a training checkpoint; then compare with the known networks.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.errors import CheckpointError
from core.families import FAMILIES
from core.names import listing
from models.checkpoints.convert import (
    CLASS_BIASES,
    PROFILER_BUFFERS,
    Match,
    normalise_key,
    normalise_tensor,
    recognise,
)
from models.checkpoints.foreign import describe_unknown, name_foreign, supported
from models.checkpoints.multimedia import has_multimedia_names, official_key
from models.checkpoints.reading import Checkpoint
from models.families.registry import family_of, load_family
from models.families.training_forms import Conversion, to_deployed_form
from models.heads import REG_MAX

PROJECTION_TOLERANCE = 0.06  # half a step of 0 .. 15 in 8 bits, for weights that were quantized once
PROJECTION_KEYS = (".dfl.conv.weight", ".dfl2.conv.weight")
MAX_DIFFERENCE = 0.25  # of the keys: beyond it, a list of what differs says nothing
_QUANTIZERS = {"_input_quantizer": "input", "_weight_quantizer": "weight"}
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Interpretation:
    """A checkpoint understood.

    Attributes:
        match: The network that fits, and which key is which.
        state: Weights by the names that `match.keys` has on its right.
        conversion: What was dropped, for a training checkpoint.
        amax: Ranges of quantized convolutions by our names: `<path in network>.input` (scalar) and `.weight` (per
            output channel).
        unmatched: Quantizer entries of the file that have no counterpart in our network.
    """

    match: Match
    state: dict[str, Tensor]
    conversion: Conversion | None
    amax: dict[str, Tensor]
    unmatched: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """K, as the class branch has it."""
        bias = next(key for key in CLASS_BIASES if key in self.match.keys)
        return self.state[self.match.keys[bias]].numel()


def interpret(checkpoint: Checkpoint, source: str, architecture: str | None = None) -> Interpretation:
    """Recognise a checkpoint.

    Args:
        checkpoint: From `read_checkpoint`.
        source: Where it comes from, for messages and the log.
        architecture: What it must be; recognised when None.

    Raises:
        CheckpointError: If nothing known fits, or something else than `architecture` does; lists the keys.
        ValueError: If `architecture` is unknown.
    """
    if architecture is not None:
        family_of(architecture)  # which raises if there is none
    try:
        return _interpret(checkpoint, source, architecture)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _interpret(checkpoint: Checkpoint, source: str, architecture: str | None) -> Interpretation:
    state, original, note = _normalise(checkpoint.state)
    own_ranges = {key.removeprefix("amax."): state.pop(key) for key in list(state) if key.startswith("amax.")}
    ranges = {key: state.pop(key) for key in list(state) if "_quantizer." in key}
    match, state, conversion = _recognise(state, original, architecture, checkpoint.metadata)
    if conversion is not None:
        note = conversion.describe()
    if note:
        _logger.info("%s: %s", source, note)
    amax, unmatched = _match_ranges(ranges, match, conversion)
    if ranges:
        _logger.info("%s: quantized; %d ranges of convolutions read", source, len(amax))
        _logger.info(
            "%s: no counterpart for %d quantizers: %s", source, len(unmatched), listing(unmatched) or "-"
        )
    amax.update(own_ranges)
    return Interpretation(match, state, conversion, amax, tuple(original.get(key, key) for key in unmatched))


def _normalise(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Tensors by official (or our) names, the file's key for each of them, and what was left out (or "")."""
    names = {key: normalise_key(key) for key in tensors if key.rpartition(".")[2] not in PROFILER_BUFFERS}
    dropped = 0
    if has_multimedia_names(names.values()):
        renamed = {key: official_key(name) for key, name in names.items()}
        names = {key: name for key, name in renamed.items() if name is not None}
        dropped = len(renamed) - len(names)
    original: dict[str, str] = {}
    state: dict[str, Tensor] = {}
    for key, name in names.items():
        if name in state:
            raise CheckpointError(
                f"{key} and {original[name]} are the same entry of the network; the file is inconsistent"
            )
        state[name], original[name] = normalise_tensor(tensors[key]), key
    note = f"names of MultimediaTechLab/YOLO; left out the auxiliary branch ({dropped} tensors)"
    return state, original, note if dropped else ""


def _recognise(
    state: dict[str, Tensor],
    original: dict[str, str],
    architecture: str | None,
    metadata: Mapping[str, Any],
) -> tuple[Match, dict[str, Tensor], Conversion | None]:
    """The network that fits, of all families, with the state in its deployed form.

    Args:
        state: With normalised keys.
        original: Normalised key -> the file's key.
        architecture: What it must be.
        metadata: What else the file says; an architecture that it states is tried first.

    Raises:
        CheckpointError: If none fits (with the differences to the closest), or if another than the wanted one does.
    """
    candidates: list[tuple[Match, dict[str, Tensor], Conversion | None]] = []
    first = architecture or metadata.get("manifest", {}).get("architecture")
    for entry in sorted(FAMILIES, key=lambda entry: first not in (*entry.detectors, *entry.segmenters)):
        family = load_family(entry)
        conversion = to_deployed_form(state, family.training_forms)
        deployed = dict(state) if conversion is None else conversion.state
        if (unused := family.training_only) is not None:
            deployed = {key: tensor for key, tensor in deployed.items() if not unused.match(key)}
        _take_projections(deployed)
        match = recognise(deployed, entry, first)
        if match is not None:
            candidates.append((match, deployed, conversion))
            if match.fits:
                break
    best = min(candidates, key=lambda candidate: candidate[0].num_differences, default=None)
    if best is not None and best[0].fits and architecture in (None, best[0].architecture):
        return best
    raise CheckpointError(_explain(best, state, original, architecture, metadata.get("model_class")))


def _explain(
    best: tuple[Match, dict[str, Tensor], Conversion | None] | None,
    state: Mapping[str, Tensor],
    original: Mapping[str, str],
    architecture: str | None,
    model_class: str | None,
) -> str:
    """Why a checkpoint is refused: what it is instead, or how it differs from the closest network."""
    if best is not None and best[0].fits:
        return (
            f"The checkpoint does not fit {architecture}; its keys and shapes are those of {best[0].architecture}: "
            "choose that, or leave the choice out"
        )
    foreign = name_foreign(state, model_class)
    if foreign is not None:
        return f"The checkpoint is {foreign}, which is not loaded: {supported()}"
    if best is None:
        return describe_unknown(state, None, 0)
    match, _, conversion = best
    if match.num_differences > MAX_DIFFERENCE * len(state):
        return describe_unknown(state, match.architecture, match.num_differences)

    def file_name(key: str) -> str:
        training = conversion.form.training_key(key) if conversion is not None else key
        return original.get(training, training)

    wanted = architecture or f"any known architecture; the closest is {match.architecture}"
    return f"The checkpoint does not fit {wanted}: {match.explain(file_name)}"


def _take_projections(state: dict[str, Tensor]) -> None:
    """Remove the DFL projections; each must be the bins 0, 1, ..., R - 1."""
    expected = torch.arange(REG_MAX, dtype=torch.float32)
    for key in [key for key in state if key == "decode.projection" or key.endswith(PROJECTION_KEYS)]:
        found = state.pop(key).float().flatten()
        if found.shape != expected.shape or not bool(
            ((found - expected).abs() <= PROJECTION_TOLERANCE).all()
        ):
            raise CheckpointError(
                f"{key} is not 0, 1, ..., {REG_MAX - 1}, the bins that this head is made of"
            )


def _match_ranges(
    ranges: dict[str, Tensor], match: Match, conversion: Conversion | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Ranges of convolutions by our names, and the keys of all other quantizer entries."""
    paths = {
        theirs.removesuffix(".weight"): ours.removeprefix("network.").removesuffix(".weight")
        for ours, theirs in match.keys.items()
        if theirs.endswith(".weight")
    }
    amax: dict[str, Tensor] = {}
    unmatched = []
    for key, tensor in ranges.items():
        owner, _, entry = key.rpartition(".")
        module, _, quantizer = owner.rpartition(".")
        deployed = module if conversion is None else conversion.form.deployed_key(module + ".weight")
        ours = None if deployed is None else paths.get(deployed.removesuffix(".weight"))
        role = _QUANTIZERS.get(quantizer)
        if (
            ours is None
            or role is None
            or entry != "_amax"
            or not bool((tensor > 0).all() & tensor.isfinite().all())
        ):
            unmatched.append(key)
        else:
            amax[f"{ours}.{role}"] = (
                tensor.float().flatten() if tensor.numel() > 1 else tensor.float().reshape(())
            )
    return amax, unmatched
