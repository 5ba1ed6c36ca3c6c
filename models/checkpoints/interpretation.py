"""What a checkpoint's tensors mean: which network, which of its keys, which quantizer ranges.

Three steps, each undone in the messages so that they name keys as the file does: bring the keys to one form, set the
quantizers' ranges apart, drop the auxiliary branch of a training checkpoint; then compare with the known networks.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import CheckpointError
from models.checkpoints.convert import Match, normalise_key, normalise_tensor, recognise
from models.checkpoints.reading import Checkpoint
from models.checkpoints.training_forms import Conversion, to_deployed_form
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
    conversion = to_deployed_form(state)
    if conversion is not None:
        _logger.info("%s: %s", source, conversion.describe())
        state = conversion.state
    _take_projections(state)

    def file_name(key: str) -> str:
        training = conversion.form.training_key(key) if conversion is not None else key
        return original.get(training, training)

    match = recognise(state, architecture, file_name)
    amax, unmatched = _match_ranges(ranges, match, conversion)
    if ranges:
        _logger.info("%s: quantized; %d ranges of convolutions read", source, len(amax))
        _logger.info(
            "%s: no counterpart for %d quantizers: %s", source, len(unmatched), ", ".join(unmatched) or "-"
        )
    amax.update(own_ranges)
    return Interpretation(match, state, conversion, amax, tuple(original.get(key, key) for key in unmatched))


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
