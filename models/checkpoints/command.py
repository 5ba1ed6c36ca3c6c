"""Look into a checkpoint: `python -m models.checkpoints FILE [--convert OUT.safetensors]`.

Prints what the file holds (format, which of its models, network, classes, parameters, types, quantized or not)
without building a model and without running anything that the file names. `--convert` loads the detector and writes
it as `.safetensors` with a manifest.
"""

import collections
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from core.command import command_parser, path_argument, reports_errors
from core.errors import CheckpointError
from core.names import listing
from models.checkpoints.convert import is_folded
from models.checkpoints.interpretation import PROJECTION_KEYS, interpret
from models.checkpoints.loading import load_detector, save_detector
from models.checkpoints.reading import Checkpoint, read_checkpoint

EXAMPLES = ("%(prog)s yolov9-c.pt", "%(prog)s best.pt --convert best.safetensors")
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


@reports_errors
def main(arguments: Sequence[str] | None = None, program: str = "python -m models.checkpoints") -> int:
    """Entry of `python -m models.checkpoints`; returns the exit code (0, or 3 for a problem with the checkpoint)."""
    parser = command_parser(program, "Say what a checkpoint holds, without running anything in it.", EXAMPLES)
    parser.add_argument("file", type=path_argument, help="a .pt, .safetensors or .npz checkpoint")
    parser.add_argument(
        "--convert", type=Path, metavar="OUT", help="write OUT (.safetensors) and its manifest"
    )
    parser.add_argument("--activation", choices=("silu", "relu"), help="for files that do not state it")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    facts = describe_checkpoint(options.file)
    for label, text in facts.items():
        print(f"{label:>12}  {text}")
    if options.convert is not None:
        save_detector(load_detector(options.file, activation=options.activation), options.convert)
        print(f"{'written':>12}  {options.convert}")
    return 0
