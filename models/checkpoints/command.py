"""Look into a checkpoint: `python -m models.checkpoints FILE [--convert OUT.safetensors]`.

Prints what the file holds (format, which of its models, network, classes, parameters, types, quantized or not)
without building a model and without running anything that the file names. `--convert` loads the detector and writes
it as `.safetensors` with a manifest.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from core.command import command_parser, path_argument, reports_errors

EXAMPLES = ("%(prog)s yolov9-c.pt", "%(prog)s best.pt --convert best.safetensors")


@reports_errors
def main(arguments: Sequence[str] | None = None, program: str = "python -m models.checkpoints") -> int:
    """Entry of `python -m models.checkpoints`; returns the exit code (0, or 3 for a problem with the checkpoint)."""
    parser = command_parser(program, "Describe a checkpoint without running anything in it.", EXAMPLES)
    parser.add_argument("file", type=path_argument, help="a .pt, .safetensors or .npz checkpoint")
    parser.add_argument(
        "--convert", type=Path, metavar="OUT", help="write OUT (.safetensors) and its manifest"
    )
    parser.add_argument("--activation", choices=("silu", "relu"), help="for files that do not state it")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    from models.checkpoints.describe import describe_checkpoint
    from models.checkpoints.loading import load_detector, save_detector

    facts = describe_checkpoint(options.file)
    for label, text in facts.items():
        print(f"{label:>12}  {text}")
    if options.convert is not None:
        save_detector(load_detector(options.file, activation=options.activation), options.convert)
        print(f"{'written':>12}  {options.convert}")
    return 0
