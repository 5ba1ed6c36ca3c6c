"""What a checkpoint holds: format, network, classes, parameters, types, quantized or not; nothing in it is run."""

import collections
from pathlib import Path

from torch import Tensor

from core.errors import CheckpointError
from core.names import listing
from models.checkpoints.convert import is_folded
from models.checkpoints.interpretation import PROJECTION_KEYS, interpret
from models.checkpoints.reading import Checkpoint, read_checkpoint

MEGABYTE = 1_000_000
BINS = ("decode.projection", *PROJECTION_KEYS, *(key.replace(".", "_") for key in PROJECTION_KEYS))


def describe_checkpoint(path: str | Path) -> dict[str, str]:
    """What a checkpoint holds, as label -> text, in the order for printing.

    A file whose keys fit no known network is described too; then `network` says why.

    Raises:
        CheckpointError: If the file can't be read.
    """
    checkpoint = read_checkpoint(path)
    metadata, state = checkpoint.metadata, checkpoint.state
    weights = {
        key: tensor
        for key, tensor in state.items()
        if "_quantizer." not in key and not key.startswith("amax.")
    }
    size = Path(path).stat().st_size / MEGABYTE
    facts = {"file": f"{path} ({size:.1f} MB)", "format": str(metadata["format"])}
    if metadata.get("entry"):
        facts["entry"] = str(metadata["entry"])
    if metadata.get("model_class"):
        facts["model class"] = str(metadata["model_class"])
    facts["network"] = _describe_network(checkpoint)
    facts["classes"] = _describe_classes(checkpoint)
    activation = metadata.get("manifest", {}).get("activation") or metadata.get("activation")
    facts["activation"] = str(
        activation
        or "not stated: SiLU is assumed; set model.activation=relu in a run, or --activation relu here"
    )
    facts["parameters"] = f"{sum(tensor.numel() for key, tensor in weights.items() if _is_parameter(key)):,}"
    facts["tensors"] = f"{len(weights)} ({_describe_types(weights)})"
    facts["quantized"] = _describe_ranges(checkpoint)
    return facts


def _describe_ranges(checkpoint: Checkpoint) -> str:
    """How many quantizer ranges there are, and how many of them a run would use."""
    total = len(checkpoint.amax) + sum(key.startswith("amax.") for key in checkpoint.state)
    if not total:
        return "no"
    try:
        meaning = interpret(checkpoint, "the file")
    except CheckpointError:
        return f"yes, {total} ranges"
    unmatched = f", {len(meaning.unmatched)} without a counterpart here" if meaning.unmatched else ""
    return f"yes, {total} ranges: {len(meaning.amax)} of convolutions{unmatched}"


def _describe_network(checkpoint: Checkpoint) -> str:
    try:
        meaning = interpret(checkpoint, "the file")
    except CheckpointError as error:
        return f"not recognised: {error}"
    match = meaning.match
    form = "folded" if match.folded else "with batch normalisation"
    training = f"; {meaning.conversion.describe()}" if meaning.conversion is not None else ""
    return f"{match.architecture} ({match.head_style} head, {form}{training})"


def _describe_classes(checkpoint: Checkpoint) -> str:
    names = checkpoint.metadata.get("manifest", {}).get("names") or checkpoint.metadata.get("names")
    if names:
        return f"{len(names)}: {listing(map(str, names), 12)}"
    try:
        meaning = interpret(checkpoint, "the file")
    except CheckpointError:
        return "unknown"
    return f"{meaning.num_classes}, without names (in a run they go by the data's order)"


def _describe_types(state: dict[str, Tensor]) -> str:
    counts = collections.Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.values())
    folded = ", no normalisation statistics" if is_folded(state) else ""
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) + folded


def _is_parameter(key: str) -> bool:
    """Whether `count_parameters` would count it: neither statistics nor the bins of the box distribution."""
    return not key.endswith(("running_mean", "running_var", "num_batches_tracked", *BINS))
