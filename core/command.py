"""How every command ends: errors as one message with their exit code, and silently if the output is not read."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from core.errors import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, OctetError
from core.failures import known_failure
from core.files import followed
from core.image_size import ImageSize
from core.names import address_remedy, is_address, printable

Main = Callable[..., int]


def reports_errors(main: Main) -> Main:
    """Decorate the `main(arguments)` of a command: an `OctetError` is printed to stderr and its exit code returned."""

    @functools.wraps(main)
    def command(arguments: Sequence[str] | None = None, **options: str) -> int:
        try:
            return main(arguments, **options)
        except OctetError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            return error.exit_code
        except Exception as error:
            known = known_failure(error)  # a full disk, a loader process that was killed
            if known is None:
                raise
            print(f"error: {printable(str(known))}", file=sys.stderr)
            return known.exit_code

    return command


def command_parser(program: str, description: str, examples: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of a command.

    Args:
        program: how the command was called: `octet data`, or `python -m data`.
        description: one sentence.
        examples: command lines at the end of the help, with `%(prog)s` for the program.
    """
    epilog = "\n  ".join(["examples:", *examples]) if examples else None
    return argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def path_argument(text: str) -> Path:
    """A path of the command line; `latest` may be a text file, see `core.files.followed`.

    Raises:
        argparse.ArgumentTypeError: it is an address.
    """
    if is_address(text):
        raise argparse.ArgumentTypeError(address_remedy(text))
    return followed(Path(text))


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run a command and leave with its exit code: 130 after Ctrl-C, and 141, as in a shell, for a closed pipe."""
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        discard_output()
        code = EXIT_BROKEN_PIPE
    sys.exit(code)


def discard_output() -> None:
    """Discard what is flushed at exit: standard output is no longer read."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def size_argument(text: str) -> ImageSize:
    """An image size on a command line: `640`, or `384x640` (height x width).

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    size = ImageSize.parse(text)
    if size is None:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a size; expected PIXELS or HEIGHTxWIDTH, such as 384x640"
        )
    return size
