"""`octet placement RUN`: prints a run's placement as a tree, with every tensor, layer and reason."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from core.command import command_parser, path_argument, reports_errors

EXAMPLES = ("%(prog)s runs/bccd/latest", "%(prog)s edited.yaml --summary")


@reports_errors
def main(arguments: Sequence[str] | None = None, program: str = "octet placement") -> int:
    """Run the command; returns the exit code."""
    parser = command_parser(
        program, "Print a placement: what is quantized, and which tensors share a scale.", EXAMPLES
    )
    parser.add_argument("placement", type=path_argument, help="run directory, or its placement.yaml")
    parser.add_argument("--summary", action="store_true", help="numbers only")
    options = parser.parse_args(arguments)
    path: Path = options.placement
    from pipeline.stages.place import PLACEMENT
    from quant import load_placement

    placement = load_placement(path / PLACEMENT if path.is_dir() else path)
    print(placement.summarize() if options.summary else placement.describe())
    return 0
