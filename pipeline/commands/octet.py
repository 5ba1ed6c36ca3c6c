"""`octet COMMAND ...`: finds the function of a subcommand and calls it; nothing else is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import metadata
from itertools import groupby

from core.command import reports_errors, run_command
from core.confinement import run_confined
from core.errors import EXIT_CONFIG, EXIT_OK, ConfigError
from core.registry import resolve
from pipeline.commands.completing import SCRIPTS, for_shell
from pipeline.commands.table import SUBCOMMANDS

NAME = "octet"
EXAMPLES = (
    "octet doctor +experiment=bccd weights=best.pt data.root=datasets/bccd",
    "octet run +experiment=bccd weights=best.pt data.root=datasets/bccd",
    "octet export run=runs/bccd/latest target=trt10",
    "octet predict runs/bccd/latest photo.jpg --compare float",
)


def console() -> None:
    """The console script: run the command of `sys.argv` and leave with its exit code.

    Commands that open model files run in a child process with limits, see `core.confinement`.
    """
    chosen = SUBCOMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    is_confined = chosen is not None and chosen.opens_models
    run_command((lambda: run_confined(main)) if is_confined else main)


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run `octet`; returns the exit code: that of the subcommand, or 2 where there is no such command.

    Args:
        arguments: the words after `octet`; None reads `sys.argv`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        print(help_text(), file=sys.stderr)
        return EXIT_CONFIG
    first, *rest = words
    if first in ("-h", "--help", "help"):
        print(help_text())
    elif first in ("-V", "--version"):
        print(f"{NAME} {version()}")
    elif first == "--completion":
        print(completion(*rest[:1]))
    elif first == "--complete":  # called by the scripts of --completion
        print("\n".join(for_shell(rest[0] if rest else "", os.environ.get("COMP_LINE", ""))))
    elif first.startswith("-"):
        raise ConfigError(f"Unknown option '{first}': expected a command first; see {NAME} --help.")
    else:
        return _call(first, rest)
    return EXIT_OK


def _call(name: str, rest: Sequence[str]) -> int:
    subcommand = SUBCOMMANDS[name]
    program = f"{NAME} {name}"
    function = resolve(subcommand.target)
    if not subcommand.is_entry:
        return int(function(rest, program=program))
    previous = sys.argv
    sys.argv = [program, *rest]
    try:
        function()
    finally:
        sys.argv = previous
    return EXIT_OK


def version() -> str:
    """The installed version; a source tree that is not installed has none."""
    try:
        return metadata.version(NAME)
    except metadata.PackageNotFoundError:
        return "(not installed: pip install .)"


def completion(shell: str = "") -> str:
    """Commands that let a shell complete commands, options and settings.

    Raises:
        ConfigError: another shell.
    """
    if shell not in SCRIPTS:
        raise ConfigError(f"--completion {shell}: expected one of {', '.join(SCRIPTS)}.")
    return SCRIPTS[shell]


def help_text() -> str:
    """The help of `octet`: commands by group, options, examples."""
    width = max(map(len, SUBCOMMANDS))
    lines = [
        "Quantizes a trained object detector and measures accuracy and speed at every step.",
        "",
        f"usage: {NAME} COMMAND [ARGUMENTS]",
    ]
    for group, members in groupby(SUBCOMMANDS.values(), key=lambda subcommand: subcommand.group):
        lines += ["", f"{group}:"]
        lines += [f"  {member.name:<{width}}  {member.summary}" for member in members]
    options = {
        "--help": f"this text; {NAME} COMMAND --help has the options of a command",
        "--version": "the version",
        "--completion": f"{', '.join(SCRIPTS)}: completion for a shell, see docs/cli.md",
    }
    lines += ["", "options:", *(f"  {name:<{width + 5}}{text}" for name, text in options.items())]
    lines += ["", "examples:", *(f"  {example}" for example in EXAMPLES)]
    lines += [
        "",
        "exit codes: 0 done, 2 wrong arguments or settings, 3 unusable data, checkpoint or engine, 4 gate not met",
    ]
    return "\n".join(lines)
