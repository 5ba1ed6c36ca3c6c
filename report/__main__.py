"""`python -m report RUN [RUN ...] [--output FILE]`: the page of a run, or of several side by side, from report.json.

RUN is a run directory or its report.json. Nothing is measured, and neither weights nor data are needed. The last line
of stdout is the path of the page. Exit code 2: wrong arguments. 3: a report.json that cannot be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from core.command import command_parser, path_argument, reports_errors, run_command
from report.build import build_report

EXAMPLES = ("%(prog)s runs/bccd/latest", "%(prog)s runs/first runs/second --output comparison.html")


@reports_errors
def main(arguments: Sequence[str] | None = None, program: str = "python -m report") -> int:
    """Run the command; returns the exit code."""
    parser = command_parser(program, "Build report.html from report.json.", EXAMPLES)
    parser.add_argument(
        "runs", nargs="+", type=path_argument, metavar="RUN", help="run directory, or its report.json"
    )
    parser.add_argument(
        "--output", type=Path, help="default: report.html of the run; of several: comparison.html here"
    )
    options = parser.parse_args(arguments)
    print(build_report(options.runs, options.output))
    return 0


if __name__ == "__main__":
    run_command(main)
