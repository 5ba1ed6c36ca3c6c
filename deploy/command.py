"""How a command of this room ends: with its exit code, and quietly where nobody reads its output any more."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_BROKEN_PIPE = 141


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run a command and leave with its exit code; 141, as in a shell, where nobody reads the pipe (`| head`)."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # what is left to flush at exit goes nowhere
        code = EXIT_BROKEN_PIPE
    sys.exit(code)
