"""`octet benchmark`: `python -m deploy.benchmark`, which also takes a run directory.

For a run the engines of one runtime are timed alternately, INT8 against float, and the table is written into the run,
as `scripts/benchmark.sh` does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from core.command import path_argument, reports_errors
from core.runtimes import RUNTIMES
from deploy.benchmark.__main__ import main as benchmark
from pipeline.run.directory import CONFIG, Run
from pipeline.run.files import compared_models

BATCHES, SECONDS = "1,4,8,12", "5"


@reports_errors
def main(arguments: Sequence[str] | None = None, program: str = "octet benchmark") -> int:
    """Run the command; returns the exit code."""
    given = list(arguments or ())
    directory = next((path_argument(word) for word in given if not word.startswith("-")), None)
    if directory is not None and (directory / CONFIG).is_file():
        given = compare_run(given, program)
    return benchmark(given, program=program)


def compare_run(arguments: Sequence[str], program: str) -> list[str]:
    """The arguments of a comparison for `octet benchmark RUN [--runtime NAME] ...`; options that are given win.

    Raises:
        DeployError: a graph or an engine of the run is missing.
    """
    parser = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    parser.add_argument("run", type=path_argument)
    parser.add_argument("--runtime", choices=RUNTIMES, default="openvino")
    parser.add_argument("--batch", default=BATCHES)
    parser.add_argument("--time", default=SECONDS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    options, others = parser.parse_known_args(arguments)
    run = Run(options.run.resolve())
    table = options.table or run.path(f"latency-{options.runtime}.md")
    return [
        "--compare", *compared_models(run, RUNTIMES[options.runtime]), "--runtime", options.runtime,
        "--batch", options.batch, "--time", options.time, "--table", str(table),
        "--json", str(options.json or table.with_suffix(".json")), *others,
    ]  # fmt: skip
