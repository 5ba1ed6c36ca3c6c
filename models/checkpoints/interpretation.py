"""What a checkpoint's tensors mean: which network, which of its keys, which quantizer ranges.

Three steps, each undone in the messages so that they name keys as the file does: bring the keys to one form, set the
quantizers' ranges apart, drop the auxiliary branch of a training checkpoint; then compare with the known networks.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import CheckpointError
from core.families import FAMILIES
from core.names import listing
from models.checkpoints.convert import CLASS_BIAS, Match, normalise_key, normalise_tensor, recognise
from models.checkpoints.reading import Checkpoint
from models.families.registry import family_of, load_family
from models.families.training_forms import Conversion, to_deployed_form
from models.heads import REG_MAX

PROJECTION_TOLERANCE = 0.06  # half a step of 0 .. 15 in 8 bits, for weights that were quantized once
PROJECTION_KEYS = (".dfl.conv.weight", ".dfl2.conv.weight")
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
        return self.state[self.match.keys[CLASS_BIAS]].numel()


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
        family_of(architecture)  # which raises where there is none
    try:
        return _interpret(checkpoint, source, architecture)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _interpret(checkpoint: Checkpoint, source: str, architecture: str | None) -> Interpretation:
    original: dict[str, str] = {}
    state: dict[str, Tensor] = {}
    for key, tensor in checkpoint.state.items():
        name = normalise_key(key)
        if name in state:
            raise CheckpointError(
                f"{key} and {original[name]} are the same entry of the network; the file is inconsistent"
            )
        state[name], original[name] = normalise_tensor(tensor), key
    own_ranges = {key.removeprefix("amax."): state.pop(key) for key in list(state) if key.startswith("amax.")}
    ranges = {key: state.pop(key) for key in list(state) if "_quantizer." in key}
    stated = checkpoint.metadata.get("manifest", {}).get("architecture")
    match, state, conversion = _recognise(state, original, architecture, stated)
    if conversion is not None:
        _logger.info("%s: %s", source, conversion.describe())
    amax, unmatched = _match_ranges(ranges, match, conversion)
    if ranges:
        _logger.info("%s: quantized; %d ranges of convolutions read", source, len(amax))
        _logger.info(
            "%s: no counterpart for %d quantizers: %s", source, len(unmatched), listing(unmatched) or "-"
        )
    amax.update(own_ranges)
    return Interpretation(match, state, conversion, amax, tuple(original.get(key, key) for key in unmatched))


def _recognise(
    state: dict[str, Tensor], original: dict[str, str], architecture: str | None, stated: str | None
) -> tuple[Match, dict[str, Tensor], Conversion | None]:
    """The network that fits, of all families, with the state in its deployed form.

    Args:
        state: With normalised keys.
        original: Normalised key -> the file's key.
        architecture: What it must be.
        stated: What the file says it is; tried first.

    Raises:
        CheckpointError: If none fits (with the differences to the closest), or if another than the wanted one does.
    """
    candidates: list[tuple[Match, dict[str, Tensor], Conversion | None]] = []
    first = architecture or stated
    for entry in sorted(FAMILIES, key=lambda entry: first not in (*entry.detectors, *entry.segmenters)):
        conversion = to_deployed_form(state, load_family(entry).training_forms)
        deployed = dict(state) if conversion is None else conversion.state
        _take_projections(deployed)
        match = recognise(deployed, entry, first)
        if match is not None:
            candidates.append((match, deployed, conversion))
            if match.fits:
                break
    if not candidates:
        raise CheckpointError(
            "The checkpoint has no class branch of a head that is known (of YOLOv9: model.<last>.cv3.0.2.bias); its "
            f"keys start with: {listing(sorted(state), 6)}"
        )
    best = min(candidates, key=lambda candidate: candidate[0].num_differences)
    match, _, conversion = best
    if match.fits and architecture in (None, match.architecture):
        return best
    if match.fits:
        raise CheckpointError(
            f"The checkpoint does not fit {architecture}; its keys and shapes are those of {match.architecture}: "
            "choose that, or leave the choice out"
        )

    def file_name(key: str) -> str:
        training = conversion.form.training_key(key) if conversion is not None else key
        return original.get(training, training)

    wanted = architecture or f"any known architecture; the closest is {match.architecture}"
    raise CheckpointError(f"The checkpoint does not fit {wanted}: {match.explain(file_name)}")


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
